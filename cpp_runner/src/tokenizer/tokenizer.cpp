#include "llama_runner/tokenizer.h"

#include "support/no_throw.h"
#include "tokenizer/kinds.h"
#include "tokenizer/special_tokens.h"

namespace llama_runner {

namespace {

/// Detects the kind of a file: a JSON object, `base64 rank` lines, or SentencePiece's protobuf, whose first tag is
/// 0x0A.
std::string_view kind_of(std::string_view data) {
    const size_t text = data.find_first_not_of(" \t\r\n\f\v");
    if (text != std::string_view::npos && data[text] == '{') return "tokenizer.json";
    const std::string_view line = data.substr(0, std::min<size_t>(data.find('\n'), 512));
    const size_t space = line.find(' ');
    if (space != std::string_view::npos && space > 0 &&
        line.find_first_not_of("0123456789\r", space + 1) == std::string_view::npos) {
        return "tiktoken";
    }
    return data.starts_with('\n') ? "sentencepiece" : "";
}

}  // namespace

Result<std::vector<int64_t>> Tokenizer::encode(std::string_view text, bool parse_special) const {
    return guarded([&] { return encode_plain(valid_utf8(text), parse_special); });
}

Result<std::vector<int64_t>> Tokenizer::encode_parts(std::span<const Part> parts) const {
    return guarded([&] {
        std::vector<Part> found;
        for (const Part& part : parts) found.push_back({valid_utf8(part.text), part.parse_special});
        return encode_valid(found);
    });
}

const TokenIds& Tokenizer::specials() const { return special_tokens().ids(); }

Result<std::vector<int64_t>> Tokenizer::encode_plain(std::string_view text, bool parse_special) const {
    const Part whole{std::string(text), parse_special};
    return encode_valid({&whole, 1});
}

Result<std::vector<int64_t>> Tokenizer::encode_valid(std::span<const Part> parts) const {
    std::vector<int64_t> ids;
    const auto encoded = special_tokens().encode(
        parts, ids, [&](std::string_view section, bool first) { return encode_section(section, first, ids); });
    if (!encoded) return encoded.error();
    return ids;
}

std::string_view Tokenizer::piece(int64_t token, bool first) const {
    if (token < 0 || token >= vocab_size()) return {};
    const Piece& piece = pieces_[static_cast<size_t>(token)];
    const std::string_view bytes = std::string_view(bytes_).substr(piece.start, piece.length);
    return bytes.substr(first ? piece.dummy_space : 0);
}

void Tokenizer::add_piece(std::string_view bytes, bool may_start_with_dummy_space) {
    pieces_.push_back({static_cast<uint32_t>(bytes_.size()), static_cast<uint32_t>(bytes.size()),
                       may_start_with_dummy_space && bytes.starts_with(' ')});
    bytes_ += bytes;
}

Result<std::unique_ptr<Tokenizer>> from_bytes(std::string_view data, std::string_view kind) {
    if (kind.empty()) kind = kind_of(data);
    return guarded([&]() -> Result<std::unique_ptr<Tokenizer>> {
        if (kind == "sentencepiece") return open_sentencepiece(data);
        if (kind == "tiktoken") return open_tiktoken(data);
        if (kind == "tokenizer.json") return open_tokenizer_json(data);
        if (kind.empty()) return Error{"its content is neither SentencePiece, tiktoken ranks nor a tokenizer.json"};
        return Error{"tokenizer kind " + std::string(kind) + " is unknown to this runner; update it"};
    });
}

void StreamDecoder::add(int64_t token, std::string& text) {
    utf8_.add(tokenizer_->piece(token, first_), text);
    first_ = first_ && tokenizer_->piece(token, false).empty();
}

std::string decode(const Tokenizer& tokenizer, std::span<const int64_t> ids) {
    std::string text;
    StreamDecoder decoder(tokenizer);
    for (const int64_t id : ids) decoder.add(id, text);
    decoder.finish(text);
    return text;
}

}  // namespace llama_runner
