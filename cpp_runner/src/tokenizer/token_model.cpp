#include "tokenizer/token_model.h"

#include <nlohmann/json.hpp>

#include "support/json.h"
#include "tokenizer/text_stages.h"
#include "tokenizer/unicode_sets.h"

namespace llama_runner {

namespace {

using nlohmann::json;

constexpr uint64_t kMostTokens = uint64_t{1} << 24;

/// Returns the id of the unknown token, which stands for words that are no token.
int64_t unknown_of(const TokenModel& model, const json& file) {
    const auto found = model.vocab().find(text_member(file, "unk_token"));
    return found == model.vocab().end() ? -1 : static_cast<int64_t>(found->second);
}

Error no_unknown() { return {"the text has a word that the tokenizer has no token for, and no unknown token"}; }

/// The model WordLevel: only whole words are tokens.
class WordLevel final : public TokenModel {
  public:
    Result<void> open(const json& model) {
        if (auto read = read_vocab(model); !read) return read;
        unknown_ = unknown_of(*this, model);
        return {};
    }

    Result<void> encode(const std::string& word, std::vector<int64_t>& ids) const override {
        const auto found = vocab_.find(word);
        if (found == vocab_.end() && unknown_ < 0) return no_unknown();
        ids.push_back(found == vocab_.end() ? unknown_ : static_cast<int64_t>(found->second));
        return {};
    }

  private:
    int64_t unknown_ = -1;
};

/// The model WordPiece: takes the longest token at the start of a word, then at the start of the rest, and so on.
class WordPiece final : public TokenModel {
  public:
    Result<void> open(const json& model) {
        if (auto read = read_vocab(model); !read) return read;
        unknown_ = unknown_of(*this, model);
        prefix_ = text_member(model, "continuing_subword_prefix");
        const json& most = member(model, "max_input_chars_per_word");
        if (!most.is_number_unsigned()) return damaged_json("its max_input_chars_per_word");
        most_ = most.get<uint64_t>();
        for (const auto& [token, id] : vocab_) longest_ = std::max(longest_, token.size());
        return {};
    }

    Result<void> encode(const std::string& word, std::vector<int64_t>& ids) const override {
        const size_t before = ids.size();
        size_t characters = 0;
        for (size_t at = 0; at < word.size(); ++characters) at += character_at(word, at).length;
        bool is_known = characters <= most_;
        for (size_t start = 0; is_known && start < word.size();) {
            size_t end = std::min(word.size(), start + longest_);
            for (; end > start; --end) {
                const std::string piece = (start > 0 ? prefix_ : "") + word.substr(start, end - start);
                const auto found = vocab_.find(piece);
                if (found == vocab_.end()) continue;
                ids.push_back(found->second);
                break;
            }
            is_known = end > start;
            start = end;
        }
        if (is_known) return {};
        if (unknown_ < 0) return no_unknown();
        ids.resize(before);
        ids.push_back(unknown_);
        return {};
    }

  private:
    int64_t unknown_ = -1;
    std::string prefix_;
    uint64_t most_ = 0;
    size_t longest_ = 0;
};

}  // namespace

Error damaged_json(const std::string& detail) {
    return {"damaged tokenizer.json tokenizer (" + detail + "); copy the file again"};
}

std::string byte_name(unsigned char byte) {
    constexpr char kDigits[] = "0123456789ABCDEF";
    return std::string("<0x") + kDigits[byte >> 4] + kDigits[byte & 15] + ">";
}

Result<void> TokenModel::read_vocab(const json& model) {
    for (const auto& [token, id] : member(model, "vocab").items()) {
        if (!id.is_number_unsigned() || id.get<uint64_t>() >= kMostTokens) return damaged_json("the id of " + token);
        vocab_.emplace(token, id.get<uint32_t>());
    }
    if (vocab_.empty()) return damaged_json("it has no vocabulary");
    return {};
}

bool TokenModel::append_bytes(const std::string& text, std::vector<uint32_t>& ids) const {
    const size_t before = ids.size();
    for (const char byte : text) {
        const auto found = vocab_.find(byte_name(static_cast<unsigned char>(byte)));
        if (found == vocab_.end()) {
            ids.resize(before);
            return false;
        }
        ids.push_back(found->second);
    }
    return true;
}

Result<std::unique_ptr<TokenModel>> model_from(const json& model) {
    const std::string type = text_member(model, "type");
    if (type.empty() || type == "BPE") return bpe_from(model);
    if (type == "Unigram") return unigram_from(model);
    if (type == "WordLevel") return opened<WordLevel>(model);
    if (type == "WordPiece") return opened<WordPiece>(model);
    return unknown_part("a model of type " + type);
}

}  // namespace llama_runner
