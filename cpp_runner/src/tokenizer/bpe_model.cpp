#include <nlohmann/json.hpp>

#include "support/json.h"
#include "tokenizer/bpe.h"
#include "tokenizer/text_stages.h"
#include "tokenizer/token_model.h"
#include "tokenizer/unicode_sets.h"

namespace llama_runner {

namespace {

using nlohmann::json;

class BpeModel final : public TokenModel {
  public:
    Result<void> open(const json& model) {
        if (auto checked = check_options(model); !checked) return checked;
        byte_fallback_ = flag_member(model, "byte_fallback", false);
        ignore_merges_ = flag_member(model, "ignore_merges", false);
        fuse_unknown_ = flag_member(model, "fuse_unk", false);
        prefix_ = text_member(model, "continuing_subword_prefix");
        suffix_ = text_member(model, "end_of_word_suffix");
        if (auto read = read_vocab(model); !read) return read;
        for (const json& merge : member(model, "merges")) {
            if (auto added = add_merge(merge); !added) return added;
        }
        if (const std::string name = text_member(model, "unk_token"); !name.empty()) {
            const auto found = vocab_.find(name);
            has_unknown_ = true;
            if (found != vocab_.end()) unknown_ = found->second;
        }
        return {};
    }

    Result<void> encode(const std::string& word, std::vector<int64_t>& ids) const override {
        if (const auto whole = vocab_.find(word); ignore_merges_ && whole != vocab_.end()) {
            ids.push_back(whole->second);
            return {};
        }
        bool is_known = true;
        std::vector<Symbol> symbols = symbols_of(word, is_known);
        if (!is_known) return Error{"the text has a character that the tokenizer has no token for; give another text"};
        merge_symbols(symbols, [this](const Symbol& left, const Symbol& right) -> std::optional<Merge> {
            const auto found = merges_.find(uint64_t{left.id} << 32 | right.id);
            return found == merges_.end() ? std::nullopt : std::optional(found->second);
        });
        for (const Symbol& symbol : symbols) ids.push_back(symbol.id);
        return {};
    }

  private:
    static Result<void> check_options(const json& model) {
        const json& dropout = member(model, "dropout");
        if (!dropout.is_null() && dropout != 0.0) return unknown_part("a model with dropout " + dropout.dump());
        return {};
    }

    Result<void> add_merge(const json& merge) {
        std::string left;
        std::string right;
        if (merge.is_string()) {
            const std::string pair = merge.get<std::string>();
            const size_t space = pair.find(' ');
            left = pair.substr(0, space);
            right = space == std::string::npos ? "" : pair.substr(space + 1);
        } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
            left = merge[0].get<std::string>();
            right = merge[1].get<std::string>();
        }
        const auto a = vocab_.find(left);
        const auto b = vocab_.find(right);
        const auto merged = vocab_.find(left + right.substr(std::min(prefix_.size(), right.size())));
        if (a == vocab_.end() || b == vocab_.end() || merged == vocab_.end()) {
            return damaged_json("merge " + std::to_string(rank_) + " is not in its vocabulary");
        }
        merges_[uint64_t{a->second} << 32 | b->second] = {rank_++, merged->second};
        return {};
    }

    std::vector<Symbol> symbols_of(const std::string& word, bool& is_known) const {
        std::vector<Symbol> symbols;
        std::optional<Symbol> pending;  // an unknown character, to which later ones may be joined
        const auto flush = [&] {
            if (pending) symbols.push_back(*pending);
            pending.reset();
        };
        for (size_t start = 0; start < word.size();) {
            std::string character = word.substr(start, character_at(word, start).length);
            const auto at = static_cast<uint32_t>(start);
            const auto length = static_cast<uint32_t>(character.size());
            if (start > 0) character.insert(0, prefix_);
            start += length;
            if (start == word.size()) character += suffix_;
            std::vector<uint32_t> bytes;
            if (const auto found = vocab_.find(character); found != vocab_.end()) {
                flush();
                symbols.push_back({found->second, at, length});
            } else if (byte_fallback_ && append_bytes(character, bytes)) {
                for (const uint32_t byte : bytes) symbols.push_back({byte, at, 1});
            } else if (unknown_ && pending && fuse_unknown_) {
                pending->length += length;
            } else if (unknown_) {
                flush();
                pending = Symbol{*unknown_, at, length};
            } else {
                is_known = is_known && !has_unknown_;
            }
        }
        flush();
        return symbols;
    }

    std::unordered_map<uint64_t, Merge> merges_;
    uint32_t rank_ = 0;
    std::optional<uint32_t> unknown_;
    bool has_unknown_ = false;  // true even if the vocabulary lacks it
    std::string prefix_;        // before a character that is not the word's first
    std::string suffix_;        // after a word's last character
    bool byte_fallback_ = false;
    bool ignore_merges_ = false;
    bool fuse_unknown_ = false;
};

}  // namespace

Result<std::unique_ptr<TokenModel>> bpe_from(const json& model) { return opened<BpeModel>(model); }

}  // namespace llama_runner
