#include "tokenizer/charsmap.h"

#include <utf8proc.h>

#include "support/base64.h"
#include "tokenizer/unicode_sets.h"

namespace llama_runner {

namespace {

constexpr size_t kLongestMappedGrapheme = 5;

uint32_t number_at(std::string_view bytes, size_t at) {
    uint32_t number = 0;
    for (size_t i = 4; i-- > 0;) number = number << 8 | static_cast<unsigned char>(bytes[at + i]);
    return number;
}

bool has_leaf(uint32_t unit) { return (unit >> 8 & 1) != 0; }

uint32_t label(uint32_t unit) { return unit & (1U << 31 | 0xFF); }

uint32_t offset(uint32_t unit) { return (unit >> 10) << ((unit & 1U << 9) >> 6); }

uint32_t value(uint32_t unit) { return unit & ~(1U << 31); }

}  // namespace

Result<CharsMap> CharsMap::open(const std::string& base64) {
    const Error damaged{"damaged tokenizer.json tokenizer (its precompiled_charsmap); copy the file again"};
    const auto bytes = from_base64(base64);
    if (!bytes || bytes->size() < 4) return damaged;
    const size_t size = number_at(*bytes, 0);
    if (size % 4 != 0 || size == 0 || size > bytes->size() - 4) return damaged;
    CharsMap map;
    for (size_t at = 4; at < 4 + size; at += 4) map.units_.push_back(number_at(*bytes, at));
    map.texts_ = bytes->substr(4 + size);
    return map;
}

std::string CharsMap::apply(std::string_view text) const {
    std::string result;
    utf8proc_int32_t state = 0;
    size_t start = 0;
    int32_t last = 0;
    for (size_t at = 0; at < text.size();) {
        auto [code, length] = character_at(text, at);
        if (is_new_mark(code)) code = 0x300;  // U+0300 joins graphemes in the same way
        if (at > 0 && utf8proc_grapheme_break_stateful(last, code, &state)) {
            append_grapheme(text.substr(start, at - start), result);
            start = at;
        }
        last = code;
        at += length;
    }
    append_grapheme(text.substr(start), result);
    return result;
}

void CharsMap::append_grapheme(std::string_view grapheme, std::string& result) const {
    if (grapheme.size() <= kLongestMappedGrapheme && append_mapped(grapheme, result)) return;
    for (size_t at = 0; at < grapheme.size();) {
        const std::string_view part = grapheme.substr(at, character_at(grapheme, at).length);
        if (!append_mapped(part, result)) result += part;
        at += part.size();
    }
}

bool CharsMap::append_mapped(std::string_view part, std::string& result) const {
    size_t node = offset(units_[0]);
    for (const char c : part) {
        const auto byte = static_cast<unsigned char>(c);
        if (byte == 0) return false;
        node ^= byte;
        if (node >= units_.size() || label(units_[node]) != byte) return false;
        const uint32_t unit = units_[node];
        node ^= offset(unit);
        if (!has_leaf(unit)) continue;
        if (node >= units_.size() || value(units_[node]) >= texts_.size()) return false;
        const size_t start = value(units_[node]);
        result += texts_.substr(start, texts_.find('\0', start) - start);
        return true;
    }
    return false;
}

}  // namespace llama_runner
