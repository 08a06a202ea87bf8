#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <unordered_map>

#include "bpe.h"
#include "spaces.h"
#include "special_text.h"
#include "text_stages.h"
#include "tokenizer_kinds.h"

namespace llama_runner {

namespace {

using nlohmann::json;

constexpr int64_t kMostTokens = int64_t{1} << 24;
constexpr int kMostNesting = 32;

Error damaged(const std::string& detail) {
    return {"damaged tokenizer.json tokenizer (" + detail + "); copy the file again"};
}

size_t length_of_character(char lead) {
    const auto byte = static_cast<unsigned char>(lead);
    return byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
}

/// "<0x0A>" and its like.
std::string byte_name(unsigned char byte) {
    constexpr char kDigits[] = "0123456789ABCDEF";
    return std::string("<0x") + kDigits[byte >> 4] + kDigits[byte & 15] + ">";
}

/// The BPE model: characters, merged by the ranks of pairs.
class BpeModel {
  public:
    Result<void> open(const json& model) {
        if (auto checked = check_options(model); !checked) return checked;
        byte_fallback_ = flag_member(model, "byte_fallback", false);
        ignore_merges_ = flag_member(model, "ignore_merges", false);
        fuse_unknown_ = flag_member(model, "fuse_unk", false);
        for (const auto& [token, id] : member(model, "vocab").items()) {
            if (!id.is_number_unsigned() || id.get<uint64_t>() >= kMostTokens) return damaged("the id of " + token);
            vocab_.emplace(token, id.get<uint32_t>());
        }
        if (vocab_.empty()) return damaged("it has no vocabulary");
        for (const json& merge : member(model, "merges")) {
            if (auto added = add_merge(merge); !added) return added;
        }
        if (const std::string name = text_member(model, "unk_token"); !name.empty()) {
            const auto found = vocab_.find(name);
            if (found == vocab_.end()) return damaged("its unk_token is not in the vocabulary");
            unknown_ = found->second;
        }
        return {};
    }

    const std::unordered_map<std::string, uint32_t>& vocab() const { return vocab_; }

    void encode(const std::string& word, std::vector<int64_t>& ids) const {
        if (ignore_merges_) {
            if (const auto whole = vocab_.find(word); whole != vocab_.end()) return ids.push_back(whole->second);
        }
        std::vector<Symbol> symbols = symbols_of(word);
        merge_symbols(symbols, [this](const Symbol& left, const Symbol& right) -> std::optional<Merge> {
            const auto found = merges_.find(uint64_t{left.id} << 32 | right.id);
            return found == merges_.end() ? std::nullopt : std::optional(found->second);
        });
        for (const Symbol& symbol : symbols) ids.push_back(symbol.id);
    }

  private:
    static Result<void> check_options(const json& model) {
        const std::string type = text_member(model, "type");
        if (!type.empty() && type != "BPE") return unknown_part("a model of type " + type);
        for (const char* option : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}) {
            const json& value = member(model, option);
            if (!value.is_null() && value != "" && value != 0.0) return unknown_part(option + (" " + value.dump()));
        }
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
        const auto merged = vocab_.find(left + right);
        if (a == vocab_.end() || b == vocab_.end() || merged == vocab_.end()) {
            return damaged("merge " + std::to_string(rank_) + " is not of its vocabulary");
        }
        merges_[uint64_t{a->second} << 32 | b->second] = {rank_++, merged->second};
        return {};
    }

    std::vector<Symbol> symbols_of(const std::string& word) const {
        std::vector<Symbol> symbols;
        std::optional<Symbol> pending;  // an unknown that later unknowns may join
        const auto flush = [&] {
            if (pending) symbols.push_back(*pending);
            pending.reset();
        };
        for (size_t start = 0; start < word.size();) {
            const std::string character = word.substr(start, length_of_character(word[start]));
            const auto at = static_cast<uint32_t>(start);
            const auto length = static_cast<uint32_t>(character.size());
            start += length;
            if (const auto found = vocab_.find(character); found != vocab_.end()) {
                flush();
                symbols.push_back({found->second, at, length});
            } else if (byte_fallback_ && add_bytes(character, at, symbols)) {
                continue;
            } else if (unknown_) {
                if (pending && fuse_unknown_) {
                    pending->length += length;
                } else {
                    flush();
                    pending = Symbol{*unknown_, at, length};
                }
            }
        }
        flush();
        return symbols;
    }

    bool add_bytes(const std::string& character, uint32_t start, std::vector<Symbol>& symbols) const {
        std::vector<Symbol> bytes;
        for (const char byte : character) {
            const auto found = vocab_.find(byte_name(static_cast<unsigned char>(byte)));
            if (found == vocab_.end()) return false;
            bytes.push_back({found->second, start++, 1});
        }
        symbols.insert(symbols.end(), bytes.begin(), bytes.end());
        return true;
    }

    std::unordered_map<std::string, uint32_t> vocab_;
    std::unordered_map<uint64_t, Merge> merges_;
    uint32_t rank_ = 0;
    std::optional<uint32_t> unknown_;
    bool byte_fallback_ = false;
    bool ignore_merges_ = false;
    bool fuse_unknown_ = false;
};

/// A token that is found in the text before the model sees it.
struct AddedToken {
    int64_t id;
    bool special;
    bool strip_left;
    bool strip_right;
};

/// Added tokens that are looked for in the same text: the raw one, or the normalized one.
struct AddedTokens {
    SpecialText texts;
    std::vector<AddedToken> tokens;
};

class JsonTokenizer final : public Tokenizer {
  public:
    Result<void> open(const json& file) {
        if (auto opened = model_.open(member(file, "model")); !opened) return opened;
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
        const auto done = encode_raw({std::string(text), true}, parse_special, ids);
        if (!done) return done.error();
        return ids;
    }

    Result<void> encode_section(std::string_view text, bool first, std::vector<int64_t>& ids) const override {
        return encode_raw({std::string(text), first}, false, ids);
    }

    const SpecialTokens& special_tokens() const override { return special_tokens_; }

  private:
    /// Appends the ids of the added tokens in `section` and hands what lies between them to `encode_rest`.
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
            size_t end = match.start;
            if (token != nullptr && token->strip_left) end -= spaces_before(text.substr(done, end - done));
            if (end > done) {
                auto rest = encode_rest({std::string(text.substr(done, end - done)), section.first && done == 0});
                if (!rest) return rest;
            }
            if (token == nullptr) return {};
            if (token->strip_right) from += spaces_after(text.substr(from));
            ids.push_back(token->id);
            done = from;
        }
    }

    Result<void> encode_raw(const Section& section, bool parse_special, std::vector<int64_t>& ids) const {
        const auto encode_normalized = [&](Section part) -> Result<void> {
            for (const Normalizer& normalizer : normalizers_) {
                if (auto done = normalizer(part.text); !done) return done;
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
        for (const Section& part : parts) model_.encode(part.text, ids);
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
        if (text.empty()) return damaged("an added token " + entry.dump());
        if (flag_member(entry, "single_word", false)) return unknown_part("an added token " + entry.dump());
        const AddedToken token{id_of(text), flag_member(entry, "special", false), flag_member(entry, "lstrip", false),
                               flag_member(entry, "rstrip", false)};
        added_.emplace(text, token.id);
        if (token.special) {
            special_ids_.insert(token.id);
            special_tokens_.add(text, {token.id, token.strip_left, token.strip_right});
        } else {
            fixed_.emplace(text, token.id);
        }
        const bool normalized = flag_member(entry, "normalized", !token.special);
        for (const Normalizer& normalizer : normalizers_) {
            if (!normalized) break;
            if (auto done = normalizer(text); !done) return done;
        }
        AddedTokens& group = normalized ? normalized_ : raw_;
        group.texts.add(std::move(text));
        group.tokens.push_back(token);
        return {};
    }

    /// The id that tokenizers gives an added token, whatever the file says: the model's, or the next one.
    int64_t id_of(const std::string& text) {
        if (const auto found = model_.vocab().find(text); found != model_.vocab().end()) return found->second;
        if (const auto found = added_.find(text); found != added_.end()) return found->second;
        next_id_ = std::max(next_id_, static_cast<int64_t>(model_.vocab().size()));
        return next_id_++;
    }

    void add_pieces() {
        std::vector<const std::string*> tokens;
        const auto add = [&](size_t id, const std::string& text) {
            if (id >= tokens.size()) tokens.resize(id + 1, nullptr);
            tokens[id] = &text;
        };
        for (const auto& [text, id] : model_.vocab()) add(id, text);
        for (const auto& [text, id] : added_) add(static_cast<size_t>(id), text);
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
            const std::string character = token.substr(start, length_of_character(token[start]));
            const auto byte = bytes.find(character);
            byte != bytes.end() ? void(piece += byte->second) : void(piece += character);
            start += character.size();
        }
        add_piece(piece, false);
    }

    BpeModel model_;
    std::vector<Normalizer> normalizers_;
    std::vector<PreTokenizer> stages_;
    AddedTokens raw_;
    AddedTokens normalized_;
    std::unordered_map<std::string, int64_t> added_;
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
    if (file.is_discarded() || too_deep) return damaged("it is no JSON");
    // The post_processor only adds special tokens, which encode never does; padding and truncation are not wanted.
    auto tokenizer = std::make_unique<JsonTokenizer>();
    if (auto opened = tokenizer->open(file); !opened) return opened.error();
    return std::unique_ptr<Tokenizer>(std::move(tokenizer));
}

}  // namespace llama_runner
