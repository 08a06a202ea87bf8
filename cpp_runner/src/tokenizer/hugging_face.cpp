#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <unordered_map>

#include "support/json.h"
#include "tokenizer/kinds.h"
#include "tokenizer/special_tokens.h"
#include "tokenizer/text_stages.h"
#include "tokenizer/token_model.h"
#include "tokenizer/unicode_sets.h"
#include "tokenizer/whitespace.h"

namespace llama_runner {

namespace {

using nlohmann::json;

constexpr int kMostNesting = 32;

/// A token that is searched for in the text before the model runs.
struct AddedToken {
    int64_t id;
    bool special;
    bool strip_left;
    bool strip_right;
    bool single_word;
};

/// The added tokens to search for in the raw text, or those in the normalized text.
struct AddedTokens {
    SpecialText texts;
    std::vector<AddedToken> tokens;
};

class JsonTokenizer final : public Tokenizer {
  public:
    Result<void> open(const json& file) {
        auto model = model_from(member(file, "model"));
        if (!model) return model.error();
        model_ = *std::move(model);
        auto normalizers = normalizers_from(member(file, "normalizer"));
        if (!normalizers) return normalizers.error();
        normalizers_ = *std::move(normalizers);
        auto stages = pre_tokenizers_from(member(file, "pre_tokenizer"));
        if (!stages) return stages.error();
        stages_ = *std::move(stages);
        if (auto checked = check_decoder(member(file, "decoder")); !checked) return checked;
        for (const json& token : member(file, "added_tokens")) {
            if (auto added = add_token(token); !added) return added;
        }
        add_pieces();
        return {};
    }

  protected:
    Result<std::vector<int64_t>> encode_plain(std::string_view text, bool parse_special) const override {
        std::vector<int64_t> ids;
        const auto done = encode_raw(section_of(text, true), parse_special, ids);
        if (!done) return done.error();
        return ids;
    }

    Result<void> encode_section(std::string_view text, bool first, std::vector<int64_t>& ids) const override {
        return encode_raw(section_of(text, first), false, ids);
    }

    const SpecialTokens& special_tokens() const override { return special_tokens_; }

  private:
    static Section section_of(std::string_view text, bool first) {
        return {std::string(text), first && !text.empty() ? character_at(text, 0).length : 0};
    }

    /// Appends the ids of the added tokens in `section`, and passes the text between them to `encode_rest`.
    static Result<void> cut(const AddedTokens& added, const Section& section, bool parse_special,
                            std::vector<int64_t>& ids, const std::function<Result<void>(Section)>& encode_rest) {
        const std::string_view text = section.text;
        size_t done = 0;
        size_t from = 0;
        for (;;) {
            const auto match = added.texts.find(text, from);
            const AddedToken* token = match.index < added.tokens.size() ? &added.tokens[match.index] : nullptr;
            from = match.start + match.length;
            if (token != nullptr && token->special && !parse_special) continue;
            if (token != nullptr && token->single_word && !stands_alone(text, match.start, from)) continue;
            size_t end = match.start;
            if (token != nullptr && token->strip_left) end = std::max(done, end - spaces_before(text.substr(0, end)));
            if (end > done) {
                auto rest = encode_rest(section.part(done, end));
                if (!rest) return rest;
            }
            if (token == nullptr) return {};
            ids.push_back(token->id);
            done = from + (token->strip_right ? spaces_after(text.substr(from)) : 0);
        }
    }

    /// Returns whether no word character is directly before or after bytes `start` to `end` of a text.
    static bool stands_alone(std::string_view text, size_t start, size_t end) {
        size_t before = start;
        while (before > 0 && (static_cast<unsigned char>(text[--before]) & 0xC0) == 0x80) {
        }
        return (start == 0 || !is_word_character(character_at(text, before).code)) &&
               (end == text.size() || !is_word_character(character_at(text, end).code));
    }

    Result<void> encode_raw(const Section& section, bool parse_special, std::vector<int64_t>& ids) const {
        const auto encode_normalized = [&](Section part) -> Result<void> {
            for (const Normalizer& normalizer : normalizers_) {
                if (auto done = normalizer(part); !done) return done;
            }
            return cut(normalized_, part, parse_special, ids,
                       [&](Section words) { return encode_words(std::move(words), ids); });
        };
        return cut(raw_, section, parse_special, ids, encode_normalized);
    }

    Result<void> encode_words(Section section, std::vector<int64_t>& ids) const {
        std::vector<Section> parts;
        parts.push_back(std::move(section));
        for (const PreTokenizer& stage : stages_) {
            std::vector<Section> next;
            for (Section& part : parts) {
                if (auto split = stage(std::move(part), next); !split) return split;
            }
            parts = std::move(next);
        }
        for (const Section& part : parts) {
            if (auto encoded = model_->encode(part.text, ids); !encoded) return encoded;
        }
        return {};
    }

    Result<void> check_decoder(const json& decoder) {
        if (decoder.is_null()) return {};
        const bool many = text_member(decoder, "type") == "Sequence";
        for (const json& step : many ? member(decoder, "decoders") : json::array({decoder})) {
            const std::string type = text_member(step, "type");
            if (type == "ByteLevel") {
                byte_level_ = true;
            } else if (type != "Replace" && type != "ByteFallback" && type != "Fuse" && type != "Strip" &&
                       type != "Metaspace") {
                return unknown_part("a decoder " + step.dump());
            }
        }
        return {};
    }

    Result<void> add_token(const json& entry) {
        std::string text = text_member(entry, "content");
        if (text.empty()) return damaged_json("an added token " + entry.dump());
        const AddedToken token{id_of(text), flag_member(entry, "special", false), flag_member(entry, "lstrip", false),
                               flag_member(entry, "rstrip", false), flag_member(entry, "single_word", false)};
        added_.emplace(text, token.id);
        if (token.special) {
            special_ids_.insert(token.id);
            special_tokens_.add(text, {token.id, token.strip_left, token.strip_right});
        } else {
            fixed_.emplace(text, token.id);
        }
        const bool normalized = flag_member(entry, "normalized", !token.special);
        Section section{text, 0};
        for (const Normalizer& normalizer : normalizers_) {
            if (!normalized) break;
            if (auto done = normalizer(section); !done) return done;
        }
        text = section.text;
        shown_.insert_or_assign(token.id, text);
        AddedTokens& group = normalized ? normalized_ : raw_;
        group.texts.add(std::move(text));
        group.tokens.push_back(token);
        return {};
    }

    /// Returns the id that the tokenizers library gives an added token, regardless of the file: the model's, or the
    /// next.
    int64_t id_of(const std::string& text) {
        if (const auto found = model_->vocab().find(text); found != model_->vocab().end()) return found->second;
        if (const auto found = added_.find(text); found != added_.end()) return found->second;
        next_id_ = std::max(next_id_, model_->size());
        return next_id_++;
    }

    void add_pieces() {
        std::vector<const std::string*> tokens;
        const auto add = [&](size_t id, const std::string& text) {
            if (id >= tokens.size()) tokens.resize(id + 1, nullptr);
            tokens[id] = &text;
        };
        for (const auto& [text, id] : model_->vocab()) add(id, text);
        for (const auto& [id, text] : shown_) add(static_cast<size_t>(id), text);
        std::unordered_map<std::string, char> bytes;
        for (int byte = 0; byte < 256; ++byte) {
            const auto value = static_cast<unsigned char>(byte);
            bytes.emplace(byte_level_ ? byte_level_alphabet()[value] : byte_name(value), static_cast<char>(byte));
        }
        for (size_t id = 0; id < tokens.size(); ++id) {
            const bool visible = tokens[id] != nullptr && !special_ids_.contains(static_cast<int64_t>(id));
            visible ? add_text_piece(*tokens[id], bytes) : add_piece("", false);
        }
    }

    void add_text_piece(const std::string& token, const std::unordered_map<std::string, char>& bytes) {
        if (!byte_level_) {
            const auto byte = bytes.find(token);
            return byte != bytes.end() ? add_piece({&byte->second, 1}, false)
                                       : add_piece(replaced(token, kSpaceMark, " "), true);
        }
        std::string piece;
        for (size_t start = 0; start < token.size();) {
            const std::string character = token.substr(start, character_at(token, start).length);
            const auto byte = bytes.find(character);
            byte != bytes.end() ? void(piece += byte->second) : void(piece += character);
            start += character.size();
        }
        add_piece(piece, false);
    }

    std::unique_ptr<TokenModel> model_;
    std::vector<Normalizer> normalizers_;
    std::vector<PreTokenizer> stages_;
    AddedTokens raw_;
    AddedTokens normalized_;
    std::unordered_map<std::string, int64_t> added_;
    std::map<int64_t, std::string> shown_;  // id of an added token -> its text after normalization
    int64_t next_id_ = 0;
    std::set<int64_t> special_ids_;
    SpecialTokens special_tokens_;
    bool byte_level_ = false;
};

}  // namespace

Result<std::unique_ptr<Tokenizer>> open_tokenizer_json(std::string_view data) {
    bool too_deep = false;
    const auto is_flat = [&](int depth, json::parse_event_t, const json&) {
        too_deep = too_deep || depth > kMostNesting;
        return !too_deep;
    };
    const json file = json::parse(data, is_flat, false);
    if (file.is_discarded() || too_deep) return damaged_json("it is not JSON");
    // The post_processor only adds special tokens, which `encode` never adds; padding and truncation are ignored, too.
    auto tokenizer = std::make_unique<JsonTokenizer>();
    if (auto opened = tokenizer->open(file); !opened) return opened.error();
    return std::unique_ptr<Tokenizer>(std::move(tokenizer));
}

}  // namespace llama_runner
