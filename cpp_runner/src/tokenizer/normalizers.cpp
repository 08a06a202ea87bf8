#include <algorithm>
#include <nlohmann/json.hpp>

#include "support/json.h"
#include "tokenizer/charsmap.h"
#include "tokenizer/normal_forms.h"
#include "tokenizer/text_stages.h"
#include "tokenizer/unicode_sets.h"
#include "tokenizer/whitespace.h"

namespace llama_runner {

namespace {

using nlohmann::json;

/// A change of text that does not depend on neighbouring text, so that the opening can be changed separately.
using Change = std::function<Result<void>(std::string& text)>;

Normalizer each_by_itself(Change change) {
    return [change = std::move(change)](Section& section) -> Result<void> {
        std::string opening = section.text.substr(0, section.opening);
        if (auto done = change(opening); !done) return done;
        if (auto done = change(section.text); !done) return done;
        section.opening = opening.size();
        return {};
    };
}

/// Returns a normalizer for a normal form, in which the opening may be composed with the text after it.
Normalizer form(NormalForm wanted) {
    return [wanted](Section& section) -> Result<void> {
        std::string opening = section.text.substr(0, section.opening);
        if (auto done = to_normal_form(opening, wanted); !done) return done;
        if (auto done = to_normal_form(section.text, wanted); !done) return done;
        if (opening.empty() || section.text.empty()) return {};
        section.opening = section.text.starts_with(opening) ? opening.size() : character_at(section.text, 0).length;
        return {};
    };
}

/// Returns a normalizer that replaces each character, or removes it if `changed` returns -1.
Normalizer characters(int32_t (*changed)(int32_t)) {
    return each_by_itself([changed](std::string& text) -> Result<void> {
        std::string result;
        for (size_t at = 0; at < text.size();) {
            const auto [code, length] = character_at(text, at);
            at += length;
            if (const int32_t now = changed(code); now >= 0) append_character(now, result);
        }
        text = std::move(result);
        return {};
    });
}

int32_t without_marks(int32_t code) { return is_mark(code) ? -1 : code; }

/// Applies the normalization nmt of google/sentencepiece: no control characters, and only one kind of space.
int32_t nmt(int32_t code) {
    const bool is_control = (code >= 0x1 && code <= 0x8) || code == 0xB || (code >= 0xE && code <= 0x1F) ||
                            code == 0x7F || code == 0x8F || code == 0x9F;
    if (is_control) return -1;
    constexpr int32_t kSpaces[] = {0x9, 0xA, 0xC, 0xD, 0x1680, 0x2028, 0x2029, 0x2581, 0xFEFF, 0xFFFD};
    const bool is_space = std::find(std::begin(kSpaces), std::end(kSpaces), code) != std::end(kSpaces) ||
                          (code >= 0x200B && code <= 0x200F);
    return is_space ? ' ' : code;
}

Normalizer strip_from(const json& stage) {
    const bool left = flag_member(stage, "strip_left", false);
    const bool right = flag_member(stage, "strip_right", false);
    return [left, right](Section& section) -> Result<void> {
        const size_t from = left ? spaces_after(section.text) : 0;
        const size_t spaces = right ? spaces_before(section.text) : 0;
        section = section.part(from, std::max(from, section.text.size() - spaces));
        return {};
    };
}

Normalizer prepend_from(const json& stage) {
    return [prefix = text_member(stage, "prepend")](Section& section) -> Result<void> {
        if (section.text.empty()) return {};
        section.text.insert(0, prefix);
        if (section.opening > 0) section.opening += prefix.size();
        return {};
    };
}

Result<Normalizer> replace_from(const json& stage) {
    auto pattern = pattern_from(member(stage, "pattern"));
    if (!pattern) return unknown_part("a normalizer: " + pattern.error().message);
    return Normalizer([pattern = *pattern, content = text_member(stage, "content")](Section& section) -> Result<void> {
        const auto matches = pattern->find_all(section.text);
        if (!matches) return matches.error();
        Section result{"", 0};
        const auto add = [&](std::string_view text, size_t opening) {
            if (result.opening == result.text.size()) result.opening += opening;
            result.text += text;
        };
        size_t done = 0;
        for (const auto& [start, end] : *matches) {
            const Section before = section.part(done, start);
            if (start > done) add(before.text, before.opening);
            // A replacement counts as standing at the end of its match.
            add(content, end <= section.opening ? content.size() : 0);
            done = end;
        }
        const Section rest = section.part(done, section.text.size());
        add(rest.text, rest.opening);
        section = std::move(result);
        return {};
    });
}

Result<Normalizer> charsmap_from(const json& stage) {
    auto map = CharsMap::open(text_member(stage, "precompiled_charsmap"));
    if (!map) return map.error();
    return Normalizer([map = std::make_shared<const CharsMap>(*std::move(map))](Section& section) -> Result<void> {
        const bool opens = section.opening > 0;
        section.text = map->apply(section.text);
        if (opens && !section.text.empty()) section.opening = character_at(section.text, 0).length;
        return {};
    });
}

Result<Normalizer> normalizer_from(const json& stage) {
    const std::string type = text_member(stage, "type");
    if (type == "NFC") return form(NormalForm::kNfc);
    if (type == "NFD") return form(NormalForm::kNfd);
    if (type == "NFKC") return form(NormalForm::kNfkc);
    if (type == "NFKD") return form(NormalForm::kNfkd);
    if (type == "Strip") return strip_from(stage);
    if (type == "StripAccents") return characters(without_marks);
    if (type == "Nmt") return characters(nmt);
    if (type == "Prepend") return prepend_from(stage);
    if (type == "Replace") return replace_from(stage);
    if (type == "Precompiled") return charsmap_from(stage);
    const auto changed_by = [](auto change) {
        return each_by_itself([change](std::string& text) -> Result<void> {
            text = change(text);
            return {};
        });
    };
    if (type == "Lowercase") return changed_by(lowercase);
    if (type == "ByteLevel") return changed_by(byte_level);
    return unknown_part("a normalizer " + stage.dump());
}

}  // namespace

Result<std::vector<Normalizer>> normalizers_from(const json& json) {
    std::vector<Normalizer> normalizers;
    for (const auto& stage : stages_of(json, "normalizers")) {
        auto normalizer = normalizer_from(stage);
        if (!normalizer) return normalizer.error();
        normalizers.push_back(*std::move(normalizer));
    }
    return normalizers;
}

}  // namespace llama_runner
