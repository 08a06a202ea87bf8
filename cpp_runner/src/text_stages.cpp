#include "text_stages.h"

#include <memory>
#include <nlohmann/json.hpp>

#include "nfc.h"
#include "regex.h"

namespace llama_runner {

namespace {

using nlohmann::json;

/// tokenizers' ByteLevel splits as GPT-2 did (openai/gpt-2, src/encoder.py).
constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

/// The members of a Sequence, the one stage itself, or nothing for null.
std::vector<json> stages_of(const json& stage, const char* list) {
    if (stage.is_null()) return {};
    if (text_member(stage, "type") != "Sequence") return {stage};
    const json& stages = member(stage, list);
    return {stages.begin(), stages.end()};
}

Result<Normalizer> normalizer_from(const json& stage) {
    const std::string type = text_member(stage, "type");
    if (type == "NFC") return Normalizer(to_nfc);
    if (type == "Prepend") {
        return Normalizer([prefix = text_member(stage, "prepend")](std::string& text) -> Result<void> {
            if (!text.empty()) text.insert(0, prefix);
            return {};
        });
    }
    const std::string pattern = text_member(member(stage, "pattern"), "String");
    if (type == "Replace" && !pattern.empty()) {
        return Normalizer([pattern, content = text_member(stage, "content")](std::string& text) -> Result<void> {
            text = replaced(text, pattern, content);
            return {};
        });
    }
    return unknown_part("a normalizer " + stage.dump());
}

/// Cuts a section at every match; what is matched, and what lies between unless `only_matches`, goes on.
PreTokenizer split_at(std::shared_ptr<const Regex> pattern, bool only_matches) {
    return [pattern, only_matches](Section section, std::vector<Section>& parts) -> Result<void> {
        const auto matches = pattern->find_all(section.text);
        if (!matches) return matches.error();
        size_t from = 0;
        const auto add = [&](size_t to) {
            if (to > from) parts.push_back({section.text.substr(from, to - from), section.first && from == 0});
            from = to;
        };
        for (const auto& [start, end] : *matches) {
            only_matches ? void(from = start) : add(start);
            add(end);
        }
        if (!only_matches) add(section.text.size());
        return {};
    };
}

Result<PreTokenizer> split_at(std::string_view pattern, bool only_matches) {
    auto compiled = Regex::compile(pattern);
    if (!compiled) return unknown_part("a pre_tokenizer: " + compiled.error().message);
    return split_at(std::make_shared<const Regex>(*std::move(compiled)), only_matches);
}

Result<PreTokenizer> split_from(const json& stage) {
    const std::string pattern = text_member(member(stage, "pattern"), "Regex");
    const std::string behavior = text_member(stage, "behavior");
    const bool isolated = behavior == "Isolated";
    const bool only_matches = behavior == "Removed" && flag_member(stage, "invert", false);
    if (pattern.empty() || (!isolated && !only_matches)) return unknown_part("a pre_tokenizer " + stage.dump());
    return split_at(pattern, only_matches);
}

/// ByteLevel's last step: bytes become GPT-2's printable characters.
Result<void> map_bytes(Section section, std::vector<Section>& parts) {
    std::string mapped;
    for (const char byte : section.text) mapped += byte_level_alphabet()[static_cast<unsigned char>(byte)];
    parts.push_back({std::move(mapped), section.first});
    return {};
}

Result<void> add_byte_level(const json& stage, std::vector<PreTokenizer>& stages) {
    if (flag_member(stage, "add_prefix_space", true)) {
        stages.emplace_back([](Section section, std::vector<Section>& parts) -> Result<void> {
            if (!section.text.starts_with(' ')) section.text.insert(0, " ");
            parts.push_back(std::move(section));
            return {};
        });
    }
    if (flag_member(stage, "use_regex", true)) {
        auto split = split_at(kGpt2Pattern, false);
        if (!split) return split.error();
        stages.push_back(*std::move(split));
    }
    stages.emplace_back(map_bytes);
    return {};
}

Result<PreTokenizer> metaspace_from(const json& stage) {
    const std::string mark = text_member(stage, "replacement");
    const std::string given = text_member(stage, "prepend_scheme");
    const std::string scheme =
        given.empty() ? flag_member(stage, "add_prefix_space", true) ? "always" : "never" : given;
    if (mark.empty() || (scheme != "always" && scheme != "first" && scheme != "never")) {
        return unknown_part("a pre_tokenizer " + stage.dump());
    }
    const bool split = flag_member(stage, "split", true);
    return PreTokenizer([mark, scheme, split](Section section, std::vector<Section>& parts) -> Result<void> {
        std::string text = replaced(section.text, " ", mark);
        const bool wanted = scheme == "always" || (scheme == "first" && section.first);
        if (wanted && !text.starts_with(mark)) text.insert(0, mark);
        for (size_t from = 0; from < text.size();) {
            const size_t to = split ? std::min(text.find(mark, from + 1), text.size()) : text.size();
            parts.push_back({text.substr(from, to - from), section.first && from == 0});
            from = to;
        }
        return {};
    });
}

}  // namespace

Error unknown_part(const std::string& what) {
    return {"the tokenizer.json has " + what +
            ", which this runner does not know; use the checkpoint's SentencePiece or tiktoken file"};
}

Result<std::vector<Normalizer>> normalizers_from(const json& json) {
    std::vector<Normalizer> normalizers;
    for (const auto& stage : stages_of(json, "normalizers")) {
        auto normalizer = normalizer_from(stage);
        if (!normalizer) return normalizer.error();
        normalizers.push_back(*std::move(normalizer));
    }
    return normalizers;
}

Result<std::vector<PreTokenizer>> pre_tokenizers_from(const json& json) {
    std::vector<PreTokenizer> stages;
    for (const auto& stage : stages_of(json, "pretokenizers")) {
        const std::string type = text_member(stage, "type");
        if (type == "ByteLevel") {
            if (auto added = add_byte_level(stage, stages); !added) return added.error();
            continue;
        }
        auto made = type == "Split"       ? split_from(stage)
                    : type == "Metaspace" ? metaspace_from(stage)
                    : type == "Digits"
                        ? split_at(flag_member(stage, "individual_digits", false) ? R"(\p{N})" : R"(\p{N}+)", false)
                        : Result<PreTokenizer>(unknown_part("a pre_tokenizer " + stage.dump()));
        if (!made) return made.error();
        stages.push_back(*std::move(made));
    }
    return stages;
}

const std::vector<std::string>& byte_level_alphabet() {
    static const std::vector<std::string> alphabet = [] {
        std::vector<std::string> characters;
        int hidden = 0;
        for (int byte = 0; byte < 256; ++byte) {
            const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
            const int code = printable ? byte : 256 + hidden++;
            if (code < 0x80) {
                characters.emplace_back(1, static_cast<char>(code));
            } else {
                characters.push_back({static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 0x3F))});
            }
        }
        return characters;
    }();
    return alphabet;
}

const json& member(const json& json, const char* key) {
    static const nlohmann::json null;
    const auto found = json.is_object() ? json.find(key) : json.end();
    return found == json.end() ? null : *found;
}

std::string text_member(const json& json, const char* key) {
    const auto& value = member(json, key);
    return value.is_string() ? value.get<std::string>() : "";
}

bool flag_member(const json& json, const char* key, bool otherwise) {
    const auto& value = member(json, key);
    return value.is_boolean() ? value.get<bool>() : otherwise;
}

std::string replaced(std::string_view text, std::string_view pattern, std::string_view replacement) {
    std::string result;
    for (;;) {
        const size_t found = text.find(pattern);
        result += text.substr(0, found);
        if (found == std::string_view::npos) return result;
        result += replacement;
        text.remove_prefix(found + pattern.size());
    }
}

}  // namespace llama_runner
