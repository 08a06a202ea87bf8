#include <charconv>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <nlohmann/json.hpp>

#include "support/json.h"
#include "tokenizer/text_stages.h"
#include "tokenizer/token_model.h"
#include "tokenizer/unicode_sets.h"

namespace llama_runner {

namespace {

using nlohmann::json;

constexpr double kUnknownPenalty = 10;

/// Returns a number as the JSON reader of the tokenizers library (serde_json) reads its shortest decimal form: digits
/// times or divided by a power of ten, which may be wrong in the last bit. That bit can decide between equal scores.
double as_serde_reads(double number) {
    char text[32];
    const auto [end, failure] = std::to_chars(text, text + sizeof text, number, std::chars_format::scientific);
    const std::string_view whole(text, failure == std::errc() ? static_cast<size_t>(end - text) : 0);
    const size_t e = whole.find('e');
    if (e == std::string_view::npos) return number;  // infinite or NaN
    uint64_t digits = 0;
    int exponent = std::atoi(std::string(whole.substr(e + 1)).c_str());
    bool is_behind_point = false;
    for (const char c : whole.substr(0, e)) {
        if (c == '.') is_behind_point = true;
        if (c < '0' || c > '9') continue;
        digits = digits * 10 + static_cast<uint64_t>(c - '0');
        exponent -= is_behind_point;
    }
    if (exponent < -300 || exponent > 300) return number;
    const double power = std::pow(10.0, std::abs(exponent));
    const auto size = static_cast<double>(digits);
    return std::copysign(exponent < 0 ? size / power : size * power, number);
}

class Unigram final : public TokenModel {
  public:
    Result<void> open(const json& model) {
        const json& vocab = member(model, "vocab");
        if (!vocab.is_array() || vocab.empty()) return damaged_json("it has no vocabulary");
        double least = std::numeric_limits<double>::infinity();
        for (const json& entry : vocab) {
            const bool is_entry = entry.is_array() && entry.size() == 2 && entry[0].is_string() && entry[1].is_number();
            if (!is_entry) return damaged_json("the token " + entry.dump());
            const std::string token = entry[0].get<std::string>();
            vocab_.insert_or_assign(token, static_cast<uint32_t>(scores_.size()));
            scores_.push_back(as_serde_reads(entry[1].get<double>()));
            least = std::min(least, scores_.back());
            add_to_trie(token);
        }
        unknown_score_ = least - kUnknownPenalty;
        byte_fallback_ = flag_member(model, "byte_fallback", false);
        const json& unknown = member(model, "unk_id");
        if (unknown.is_null()) return {};
        if (!unknown.is_number_unsigned() || unknown.get<uint64_t>() >= scores_.size()) {
            return damaged_json("its unk_id " + unknown.dump());
        }
        unknown_ = unknown.get<uint32_t>();
        return {};
    }

    int64_t size() const override { return static_cast<int64_t>(scores_.size()); }

    Result<void> encode(const std::string& word, std::vector<int64_t>& ids) const override {
        std::vector<Best> best(word.size() + 1);
        for (size_t start = 0; start < word.size();) {
            const size_t length = character_at(word, start).length;
            if (!propose_tokens(word, start, length, best)) {
                if (!unknown_) return no_unknown();
                propose({best[start].score + unknown_score_, start, *unknown_}, best[start + length]);
            }
            start += length;
        }
        std::vector<std::string> tokens;  // from last to first; neighbouring unknown characters are one token
        bool after_unknown = false;
        for (size_t end = word.size(); end > 0; end = best[end].start) {
            const std::string token = word.substr(best[end].start, end - best[end].start);
            const bool is_unknown = best[end].id == unknown_;
            is_unknown&& after_unknown ? void(tokens.back().insert(0, token)) : tokens.push_back(token);
            after_unknown = is_unknown;
        }
        for (size_t i = tokens.size(); i-- > 0;) {
            if (auto appended = append(tokens[i], ids); !appended) return appended;
        }
        return {};
    }

  private:
    /// The best tokens up to a place in a word: the sum of their scores, and the last token with its start.
    struct Best {
        double score = 0;
        size_t start = SIZE_MAX;
        std::optional<uint32_t> id;
    };

    struct Node {
        std::unordered_map<unsigned char, uint32_t> next;
        std::optional<uint32_t> id;
    };

    static Error no_unknown() {
        return {"the text has a character that the tokenizer has no token for, and no unknown token"};
    }

    static void propose(const Best& candidate, Best& best) {
        if (best.start == SIZE_MAX || candidate.score > best.score) best = candidate;
    }

    void add_to_trie(const std::string& token) {
        uint32_t node = 0;
        for (const char c : token) {
            const auto [place, is_new] =
                trie_[node].next.try_emplace(static_cast<unsigned char>(c), static_cast<uint32_t>(trie_.size()));
            node = place->second;
            if (is_new) trie_.emplace_back();
        }
        trie_[node].id = vocab_.at(token);
    }

    /// Tries every token at `start` of the word; returns false if none of them is exactly the character there.
    bool propose_tokens(const std::string& word, size_t start, size_t length, std::vector<Best>& best) const {
        bool has_character = false;
        uint32_t node = 0;
        for (size_t end = start; end < word.size();) {
            const auto next = trie_[node].next.find(static_cast<unsigned char>(word[end++]));
            if (next == trie_[node].next.end()) break;
            node = next->second;
            if (!trie_[node].id) continue;
            propose({best[start].score + scores_[*trie_[node].id], start, trie_[node].id}, best[end]);
            has_character = has_character || end - start == length;
        }
        return has_character;
    }

    Result<void> append(const std::string& token, std::vector<int64_t>& ids) const {
        if (const auto found = vocab_.find(token); found != vocab_.end()) {
            ids.push_back(found->second);
            return {};
        }
        std::vector<uint32_t> bytes;
        if (byte_fallback_ && append_bytes(token, bytes)) {
            ids.insert(ids.end(), bytes.begin(), bytes.end());
            return {};
        }
        if (!unknown_) return no_unknown();
        ids.push_back(*unknown_);
        return {};
    }

    std::vector<double> scores_;
    std::vector<Node> trie_{1};
    std::optional<uint32_t> unknown_;
    double unknown_score_ = 0;
    bool byte_fallback_ = false;
};

}  // namespace

Result<std::unique_ptr<TokenModel>> unigram_from(const json& model) { return opened<Unigram>(model); }

}  // namespace llama_runner
