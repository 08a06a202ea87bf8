#include "tokenizer/normal_forms.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <string_view>

#include "tokenizer/unicode_sets.h"

namespace llama_runner {

namespace {

/// Marks and decomposable characters of Unicode 10 to 16, which the tokenizers library neither reorders nor changes.
constexpr std::array kNewCharacters = std::to_array<CodeRange>(
    {{0x7FD, 0x7FD},     {0x897, 0x89F},     {0x8CA, 0x8D3},     {0x9FE, 0x9FE},     {0xC3C, 0xC3C},
     {0xD3B, 0xD3C},     {0xEBA, 0xEBA},     {0x1715, 0x1715},   {0x1ABF, 0x1ACE},   {0x1DF6, 0x1DFA},
     {0x32FF, 0x32FF},   {0xA7F2, 0xA7F4},   {0xA82C, 0xA82C},   {0xAB69, 0xAB69},   {0x10781, 0x10785},
     {0x10787, 0x107B0}, {0x107B2, 0x107BA}, {0x10D24, 0x10D27}, {0x10D69, 0x10D6D}, {0x10EAB, 0x10EAC},
     {0x10EFD, 0x10EFF}, {0x10F46, 0x10F50}, {0x10F82, 0x10F85}, {0x11070, 0x11070}, {0x1133B, 0x1133B},
     {0x113CE, 0x113D0}, {0x1145E, 0x1145E}, {0x11839, 0x1183A}, {0x11930, 0x11930}, {0x11938, 0x11938},
     {0x1193D, 0x1193E}, {0x11943, 0x11943}, {0x119E0, 0x119E0}, {0x11A34, 0x11A34}, {0x11A47, 0x11A47},
     {0x11A99, 0x11A99}, {0x11D42, 0x11D42}, {0x11D44, 0x11D45}, {0x11D97, 0x11D97}, {0x11F41, 0x11F42},
     {0x1612F, 0x1612F}, {0x16FF0, 0x16FF1}, {0x1E08F, 0x1E08F}, {0x1E130, 0x1E136}, {0x1E2AE, 0x1E2AE},
     {0x1E2EC, 0x1E2EF}, {0x1E4EC, 0x1E4EF}, {0x1E5EE, 0x1E5EF}, {0x1F16C, 0x1F16C}, {0x1FBF0, 0x1FBF9}});

bool is_new(int32_t code) { return is_in(kNewCharacters, code); }

utf8proc_option_t options_of(NormalForm form) {
    const bool composes = form == NormalForm::kNfc || form == NormalForm::kNfkc;
    const bool is_compatible = form == NormalForm::kNfkc || form == NormalForm::kNfkd;
    return static_cast<utf8proc_option_t>(UTF8PROC_STABLE | (composes ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE) |
                                          (is_compatible ? UTF8PROC_COMPAT : 0));
}

Result<void> append_normalized(std::string_view text, NormalForm form, std::string& result) {
    utf8proc_uint8_t* normalized = nullptr;
    const auto* const bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
    const auto size = static_cast<utf8proc_ssize_t>(text.size());
    const auto length = utf8proc_map(bytes, size, &normalized, options_of(form));
    const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(normalized, std::free);
    if (length < 0) return Error{std::string("the text cannot be normalized (") + utf8proc_errmsg(length) + ")"};
    result.append(reinterpret_cast<const char*>(normalized), static_cast<size_t>(length));
    return {};
}

}  // namespace

Result<void> to_normal_form(std::string& text, NormalForm form) {
    const std::string_view whole = text;
    std::string result;
    size_t done = 0;
    for (size_t at = 0; at < whole.size();) {
        const auto [code, length] = character_at(whole, at);
        if (is_new(code)) {
            if (auto added = append_normalized(whole.substr(done, at - done), form, result); !added) return added;
            result += whole.substr(at, length);
            done = at + length;
        }
        at += length;
    }
    if (auto added = append_normalized(whole.substr(done), form, result); !added) return added;
    text = std::move(result);
    return {};
}

}  // namespace llama_runner
