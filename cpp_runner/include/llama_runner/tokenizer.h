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

/// A part of a text, in which names of special tokens are those tokens (`parse_special`) or ordinary text.
struct Part {
    std::string text;
    bool parse_special;
};

/// Text of a token -> its id.
using TokenIds = std::map<std::string, int64_t, std::less<>>;

class SpecialTokens;

/// A tokenizer, which turns text into ids and back: SentencePiece, tiktoken or a Hugging Face tokenizer.json.
/// Immutable.
class Tokenizer {
  public:
    virtual ~Tokenizer() = default;

    /// Size of the vocabulary; ids run from 0 to vocab_size() - 1.
    int64_t vocab_size() const { return static_cast<int64_t>(pieces_.size()); }

    /// Returns the ids of a text, without BOS. Invalid UTF-8 is read as U+FFFD.
    ///
    /// Names of special tokens are ordinary text unless `parse_special`.
    Result<std::vector<int64_t>> encode(std::string_view text, bool parse_special = false) const;

    /// Returns the ids of a text in parts. Borders of parts have no effect: text between two special tokens is encoded
    /// as a whole.
    Result<std::vector<int64_t>> encode_parts(std::span<const Part> parts) const;

    /// The special tokens.
    const TokenIds& specials() const;

    /// Tokens that are not special, but are always matched as a whole wherever they occur in a text.
    const TokenIds& fixed() const { return fixed_; }

    /// Returns the bytes of one id in a text; empty for control tokens and unknown ids. Owned by the tokenizer.
    ///
    /// `first`: whether the id begins the text, where SentencePiece's dummy space is removed.
    std::string_view piece(int64_t token, bool first) const;

  protected:
    /// The bytes of an id: a range of `bytes_`. A dummy space in front is skipped at the start of a text.
    struct Piece {
        uint32_t start;
        uint32_t length;
        bool dummy_space;
    };

    /// Returns the ids of valid UTF-8.
    virtual Result<std::vector<int64_t>> encode_plain(std::string_view text, bool parse_special) const;

    /// Appends the ids of valid UTF-8 without special tokens; `first`: whether it begins the text.
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

/// Opens a tokenizer from its file's bytes. `kind`: sentencepiece, tiktoken or tokenizer.json; if it is empty, it is
/// detected from the content. Fails if the bytes are damaged or need a feature that this runner lacks.
Result<std::unique_ptr<Tokenizer>> from_bytes(std::string_view data, std::string_view kind = {});

/// Turns bytes into valid UTF-8, piece by piece. Invalid bytes become U+FFFD, as Unicode recommends (one for each
/// maximal part of a character).
class Utf8Decoder {
  public:
    /// Appends to `text` the characters that `bytes` complete.
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

/// Returns a text with invalid UTF-8 replaced by U+FFFD.
std::string valid_utf8(std::string_view text);

/// Turns ids into text, one at a time, and never returns an incomplete UTF-8 character.
class StreamDecoder {
  public:
    /// Starts a text. `tokenizer` must outlive the decoder.
    explicit StreamDecoder(const Tokenizer& tokenizer) : tokenizer_(&tokenizer) {}

    /// Appends to `text` the characters that `token` completes; none while a character is incomplete.
    void add(int64_t token, std::string& text);

    /// Ends the text: appends U+FFFD if a character was never completed.
    void finish(std::string& text) { utf8_.finish(text); }

  private:
    const Tokenizer* tokenizer_;
    Utf8Decoder utf8_;
    bool first_ = true;
};

/// Returns the text of ids, with invalid UTF-8 replaced by U+FFFD.
std::string decode(const Tokenizer& tokenizer, std::span<const int64_t> ids);

}  // namespace llama_runner
