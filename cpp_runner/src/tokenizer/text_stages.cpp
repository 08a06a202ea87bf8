#include "tokenizer/text_stages.h"

#include <nlohmann/json.hpp>

#include "support/json.h"

namespace llama_runner {

using nlohmann::json;

Section Section::part(size_t from, size_t to) const {
    return {text.substr(from, to - from), std::min(std::max(opening, from), to) - from};
}

Error unknown_part(const std::string& what) {
    return {"the tokenizer.json has " + what +
            ", which this runner does not support; use the checkpoint's SentencePiece or tiktoken file, or the Python "
            "runtime"};
}

std::vector<json> stages_of(const json& stage, const char* list) {
    if (stage.is_null()) return {};
    if (text_member(stage, "type") != "Sequence") return {stage};
    std::vector<json> stages;
    for (const json& inner : member(stage, list)) {
        const std::vector<json> found = stages_of(inner, list);
        stages.insert(stages.end(), found.begin(), found.end());
    }
    return stages;
}

Result<std::shared_ptr<const Regex>> pattern_from(const json& pattern) {
    const json& text = member(pattern, "String");
    auto compiled =
        text.is_string() ? Regex::literal(text.get<std::string>()) : Regex::compile(text_member(pattern, "Regex"));
    if (!compiled) return compiled.error();
    return std::make_shared<const Regex>(*std::move(compiled));
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

std::string byte_level(std::string_view text) {
    std::string mapped;
    for (const char byte : text) mapped += byte_level_alphabet()[static_cast<unsigned char>(byte)];
    return mapped;
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
