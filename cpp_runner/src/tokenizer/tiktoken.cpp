#include <array>
#include <charconv>
#include <unordered_map>

#include "support/base64.h"
#include "tokenizer/bpe.h"
#include "tokenizer/kinds.h"
#include "tokenizer/regex.h"
#include "tokenizer/special_tokens.h"

namespace llama_runner {

namespace {

constexpr size_t kSpecials = 256;

/// The first of the special tokens that follow the ranks, in the order of their ids; the others are reserved.
constexpr std::array<std::string_view, 11> kNamedSpecials = {
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
};

/// Reads a line `base64 rank`; returns nothing if it has another form.
std::optional<std::pair<std::string, uint32_t>> parse_line(std::string_view line) {
    const size_t space = line.find(' ');
    if (space == std::string_view::npos) return std::nullopt;
    auto token = from_base64(line.substr(0, space));
    uint32_t rank = 0;
    const char* const end = line.data() + line.size();
    const auto [stopped, failure] = std::from_chars(line.data() + space + 1, end, rank);
    if (!token || failure != std::errc() || stopped != end) return std::nullopt;
    return std::pair(*std::move(token), rank);
}

class TiktokenTokenizer final : public Tokenizer {
  public:
    Result<void> open(std::string_view data) {
        std::vector<std::string> tokens;
        if (auto read = read_ranks(data, tokens); !read) return read;
        for (const std::string& token : tokens) add_piece(token, false);
        auto id = std::ssize(tokens);
        for (const std::string& special : llama3_specials()) {
            add_piece("", false);
            special_tokens_.add(special, {id++});
        }
        ranks_.reserve(tokens.size());
        for (size_t i = 0; i < tokens.size(); ++i) {
            ranks_.emplace(piece(static_cast<int64_t>(i), false), static_cast<uint32_t>(i));
        }
        if (ranks_.size() != tokens.size()) return gaps(ranks_.size());
        for (int byte = 0; byte < 256; ++byte) {
            const char c = static_cast<char>(byte);
            if (!ranks_.contains({&c, 1})) {
                return Error{"the tiktoken file has no rank for byte " + std::to_string(byte) +
                             "; copy the file again"};
            }
        }
        auto pattern = Regex::compile(kLlama3Pattern);
        if (!pattern) return pattern.error();
        pattern_ = *std::move(pattern);
        return {};
    }

  protected:
    Result<void> encode_section(std::string_view text, bool, std::vector<int64_t>& ids) const override {
        const auto words = pattern_.find_all(text);
        if (!words) return words.error();
        for (const auto& [start, end] : *words) encode_word(text.substr(start, end - start), ids);
        return {};
    }

    const SpecialTokens& special_tokens() const override { return special_tokens_; }

  private:
    static Result<void> read_ranks(std::string_view data, std::vector<std::string>& tokens) {
        std::vector<std::pair<std::string, uint32_t>> lines;
        while (!data.empty()) {
            const size_t end = std::min(data.find_first_of("\r\n"), data.size());
            auto line = parse_line(data.substr(0, end));
            if (!line) {
                return Error{"line " + std::to_string(lines.size() + 1) +
                             " of the tiktoken file is not `base64 rank`; copy the file again"};
            }
            lines.push_back(*std::move(line));
            data.remove_prefix(std::min(end + (data.substr(end).starts_with("\r\n") ? 2 : 1), data.size()));
        }
        tokens.resize(lines.size());
        for (auto& [token, rank] : lines) {
            if (rank >= tokens.size() || !tokens[rank].empty()) return gaps(lines.size());
            tokens[rank] = std::move(token);
        }
        return {};
    }

    static Error gaps(size_t ranks) {
        return {"the tiktoken file's " + std::to_string(ranks) + " ranks have gaps or repeats; copy the file again"};
    }

    void encode_word(std::string_view word, std::vector<int64_t>& ids) const {
        if (const auto whole = ranks_.find(word); whole != ranks_.end()) return ids.push_back(whole->second);
        std::vector<Symbol> symbols(word.size());
        for (uint32_t i = 0; i < symbols.size(); ++i) symbols[i] = {ranks_.find(word.substr(i, 1))->second, i, 1};
        merge_symbols(symbols, [&](const Symbol& left, const Symbol& right) -> std::optional<Merge> {
            const auto found = ranks_.find(word.substr(left.start, left.length + right.length));
            if (found == ranks_.end()) return std::nullopt;
            return Merge{found->second, found->second};
        });
        for (const Symbol& symbol : symbols) ids.push_back(symbol.id);
    }

    std::unordered_map<std::string_view, uint32_t> ranks_;
    Regex pattern_;
    SpecialTokens special_tokens_;
};

}  // namespace

std::vector<std::string> llama3_specials() {
    std::vector<std::string> specials(kNamedSpecials.begin(), kNamedSpecials.end());
    for (int reserved = 2; specials.size() < kSpecials; ++reserved) {
        specials.push_back("<|reserved_special_token_" + std::to_string(reserved) + "|>");
    }
    return specials;
}

Result<std::unique_ptr<Tokenizer>> open_tiktoken(std::string_view data) {
    auto tokenizer = std::make_unique<TiktokenTokenizer>();
    if (auto opened = tokenizer->open(data); !opened) return opened.error();
    return std::unique_ptr<Tokenizer>(std::move(tokenizer));
}

}  // namespace llama_runner
