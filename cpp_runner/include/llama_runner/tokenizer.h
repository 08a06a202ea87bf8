#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "llama_runner/result.h"

namespace llama_runner {

/// A part of a text, in which the text of a special token is that token, or is only text.
struct Part {
    std::string text;
    bool parse_special;
};

/// Text of a token -> its id.
using TokenIds = std::map<std::string, int64_t, std::less<>>;

class SpecialTokens;

/// Text to ids and back: SentencePiece, tiktoken and Hugging Face tokenizer.json behind one interface. Immutable.
class Tokenizer {
  public:
    virtual ~Tokenizer() = default;

    /// Ids run from 0 to vocab_size() - 1.
    int64_t vocab_size() const { return static_cast<int64_t>(pieces_.size()); }

    /// Ids of a text, which no BOS is added to. Invalid UTF-8 counts as U+FFFD.
    ///
    /// The text of a special token is only text unless `parse_special`.
    Result<std::vector<int64_t>> encode(std::string_view text, bool parse_special = false) const;

    /// Ids of a text in parts, whose borders do not show: what lies between two special tokens is encoded as one.
    Result<std::vector<int64_t>> encode_parts(std::span<const Part> parts) const;

    /// Special tokens.
    const TokenIds& specials() const;

    /// What is not special, and yet a token wherever it stands in a text.
    const TokenIds& fixed() const { return fixed_; }

    /// The bytes one id stands for, as part of a text; empty for control tokens and ids that are none. Owned by the
    /// tokenizer.
    ///
    /// `first` says that no text stands before it: SentencePiece's dummy space falls away there.
    std::string_view piece(int64_t token, bool first) const;

  protected:
    /// Bytes of an id: a range of `bytes_`. A dummy space at the front is skipped at the start of a text.
    struct Piece {
        uint32_t start;
        uint32_t length;
        bool dummy_space;
    };

    /// Ids of valid UTF-8.
    virtual Result<std::vector<int64_t>> encode_plain(std::string_view text, bool parse_special) const;

    /// Appends the ids of valid UTF-8 without special tokens, `first` if it starts the text.
    virtual Result<void> encode_section(std::string_view text, bool first, std::vector<int64_t>& ids) const = 0;

    virtual const SpecialTokens& special_tokens() const = 0;

    /// Adds the piece of the next id.
    void add_piece(std::string_view bytes, bool may_start_with_dummy_space);

    std::string bytes_;
    std::vector<Piece> pieces_;
    TokenIds fixed_;

  private:
    Result<std::vector<int64_t>> encode_valid(std::span<const Part> parts) const;
};

/// Opens a tokenizer from its file's bytes. Kind: sentencepiece, tiktoken or tokenizer.json; found from the content
/// where it is empty. Fails where the bytes are damaged or ask for what this runner cannot do.
Result<std::unique_ptr<Tokenizer>> from_bytes(std::string_view data, std::string_view kind = {});

/// Turns bytes into valid UTF-8 piece by piece; what is invalid becomes U+FFFD, as Unicode recommends (one for each
/// maximal part of a character).
class Utf8Decoder {
  public:
    /// Appends to `text` what `bytes` complete.
    void add(std::string_view bytes, std::string& text);

    /// Appends U+FFFD to `text` if a character was never completed.
    void finish(std::string& text);

  private:
    char held_[4] = {};
    int count_ = 0;
    int missing_ = 0;
    unsigned char low_ = 0x80;
    unsigned char high_ = 0xBF;
};

/// A text in which what was invalid UTF-8 is U+FFFD.
std::string valid_utf8(std::string_view text);

/// Turns ids into text one at a time, never giving out half a UTF-8 character.
class StreamDecoder {
  public:
    /// `tokenizer` must outlive the decoder.
    explicit StreamDecoder(const Tokenizer& tokenizer) : tokenizer_(&tokenizer) {}

    /// Appends to `text` what `token` completes; nothing while a character is still open.
    void add(int64_t token, std::string& text);

    /// Appends what is left: U+FFFD if a character was never completed.
    void finish(std::string& text) { utf8_.finish(text); }

  private:
    const Tokenizer* tokenizer_;
    Utf8Decoder utf8_;
    bool first_ = true;
};

/// The text of ids, with invalid UTF-8 as U+FFFD.
std::string decode(const Tokenizer& tokenizer, std::span<const int64_t> ids);

}  // namespace llama_runner
