#include "tokenizer/unicode_sets.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstdio>

#include "tokenizer/unicode_tables.h"

namespace llama_runner {

namespace {

/// Letters in circles and squares.
constexpr auto kEnclosedLetters =
    std::to_array<CodeRange>({{0x24B6, 0x24E9}, {0x1F130, 0x1F149}, {0x1F150, 0x1F169}, {0x1F170, 0x1F189}});

bool is_category_in(int32_t code, utf8proc_category_t first, utf8proc_category_t last) {
    const utf8proc_category_t category = utf8proc_category(code);
    return category >= first && category <= last;
}

/// Capital letters that are newer than utf8proc's tables, and the distance to their small letters.
struct NewCapitals {
    CodeRange range;
    int32_t distance;
};

constexpr auto kNewCapitals = std::to_array<NewCapitals>({{{0x1C89, 0x1C89}, 1},
                                                          {{0xA7CB, 0xA7CB}, 0x264 - 0xA7CB},
                                                          {{0xA7CC, 0xA7CC}, 1},
                                                          {{0xA7CE, 0xA7CE}, 1},
                                                          {{0xA7D2, 0xA7D2}, 1},
                                                          {{0xA7D4, 0xA7D4}, 1},
                                                          {{0xA7DA, 0xA7DA}, 1},
                                                          {{0xA7DC, 0xA7DC}, 0x19B - 0xA7DC},
                                                          {{0x10D50, 0x10D65}, 0x20},
                                                          {{0x16EA0, 0x16EB8}, 0x1B}});

int32_t small_letter(int32_t code) {
    for (const auto& [range, distance] : kNewCapitals) {
        if (code >= range.first && code <= range.last) return code + distance;
    }
    return utf8proc_tolower(code);
}

}  // namespace

bool is_in(std::span<const CodeRange> ranges, int32_t code) {
    const auto range = std::lower_bound(ranges.begin(), ranges.end(), code,
                                        [](const CodeRange& candidate, int32_t c) { return candidate.last < c; });
    return range != ranges.end() && range->first <= code;
}

Character character_at(std::string_view text, size_t at) {
    utf8proc_int32_t code = 0;
    const auto* const bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data()) + at;
    const auto length = utf8proc_iterate(bytes, static_cast<utf8proc_ssize_t>(text.size() - at), &code);
    return length > 0 ? Character{code, static_cast<size_t>(length)} : Character{0xFFFD, 1};
}

void append_character(int32_t code, std::string& text) {
    utf8proc_uint8_t bytes[4];
    const auto length = utf8proc_encode_char(code, bytes);
    text.append(reinterpret_cast<const char*>(bytes), static_cast<size_t>(length));
}

bool is_white_space(int32_t code) {
    return (code >= '\t' && code <= '\r') || code == 0x85 ||
           is_category_in(code, UTF8PROC_CATEGORY_ZS, UTF8PROC_CATEGORY_ZP);
}

bool is_number(int32_t code) {
    return is_category_in(code, UTF8PROC_CATEGORY_ND, UTF8PROC_CATEGORY_NO) || is_in(kNewNumbers, code);
}

bool is_punctuation(int32_t code) {
    if (code < 0x80) {
        return (code >= '!' && code <= '/') || (code >= ':' && code <= '@') || (code >= '[' && code <= '`') ||
               (code >= '{' && code <= '~');
    }
    if (code == 0x166D || code == 0x111C9) return true;
    return is_category_in(code, UTF8PROC_CATEGORY_PC, UTF8PROC_CATEGORY_PO) && !is_in(kPlainPunctuation, code);
}

bool is_mark(int32_t code) {
    if (code == 0x1CF2 || code == 0x1CF3) return true;
    return is_category_in(code, UTF8PROC_CATEGORY_MN, UTF8PROC_CATEGORY_ME) && !is_in(kPlainMarks, code);
}

bool is_new_mark(int32_t code) { return is_in(kNewMarks, code); }

bool is_word_character(int32_t code) {
    switch (utf8proc_category(code)) {
        case UTF8PROC_CATEGORY_LU:
        case UTF8PROC_CATEGORY_LL:
        case UTF8PROC_CATEGORY_LT:
        case UTF8PROC_CATEGORY_LM:
        case UTF8PROC_CATEGORY_LO:
        case UTF8PROC_CATEGORY_MN:
        case UTF8PROC_CATEGORY_MC:
        case UTF8PROC_CATEGORY_ME:
        case UTF8PROC_CATEGORY_ND:
        case UTF8PROC_CATEGORY_NL:
        case UTF8PROC_CATEGORY_PC:
            return true;
        default:
            break;
    }
    const bool is_joiner = code == 0x200C || code == 0x200D;
    return is_joiner || is_in(kEnclosedLetters, code) || is_in(kNewWordCharacters, code);
}

const std::string& word_members() {
    static const std::string kMembers = [] {
        std::string members = R"(\p{L}\p{M}\p{Nd}\p{Nl}\p{Pc}\x{B2}\x{B3}\x{B9}\x{BC}-\x{BE})";
        const auto add = [&members](const CodeRange& range) {
            char text[32];
            std::snprintf(text, sizeof text, R"(\x{%X}-\x{%X})", static_cast<unsigned>(range.first),
                          static_cast<unsigned>(range.last));
            members += text;
        };
        std::ranges::for_each(kEnclosedLetters, add);
        std::ranges::for_each(kNewWordCharacters, add);
        return members;
    }();
    return kMembers;
}

std::string lowercase(std::string_view text) {
    std::string result;
    for (size_t at = 0; at < text.size();) {
        const auto [code, length] = character_at(text, at);
        at += length;
        code == 0x130 ? void(result += "i\xCC\x87") : append_character(small_letter(code), result);
    }
    return result;
}

}  // namespace llama_runner
