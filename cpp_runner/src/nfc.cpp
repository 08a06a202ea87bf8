#include "nfc.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <string_view>

namespace llama_runner {

namespace {

struct Range {
    utf8proc_int32_t first;
    utf8proc_int32_t last;
};

/// Marks that Unicode 10 to 15 added: to tokenizers they are plain characters, which neither move nor compose.
constexpr std::array kNewMarks = std::to_array<Range>({
    {0x7FD, 0x7FD},     {0x898, 0x89F},     {0x8CA, 0x8D3},     {0x9FE, 0x9FE},     {0xC3C, 0xC3C},
    {0xD3B, 0xD3C},     {0xEBA, 0xEBA},     {0x1715, 0x1715},   {0x1ABF, 0x1ACE},   {0x1DF6, 0x1DFA},
    {0xA82C, 0xA82C},   {0x10D24, 0x10D27}, {0x10EAB, 0x10EAC}, {0x10EFD, 0x10EFF}, {0x10F46, 0x10F50},
    {0x10F82, 0x10F85}, {0x11070, 0x11070}, {0x1133B, 0x1133B}, {0x1145E, 0x1145E}, {0x11839, 0x1183A},
    {0x11930, 0x11930}, {0x1193D, 0x1193E}, {0x11943, 0x11943}, {0x119E0, 0x119E0}, {0x11A34, 0x11A34},
    {0x11A47, 0x11A47}, {0x11A99, 0x11A99}, {0x11D42, 0x11D42}, {0x11D44, 0x11D45}, {0x11D97, 0x11D97},
    {0x11F41, 0x11F42}, {0x16FF0, 0x16FF1}, {0x1E08F, 0x1E08F}, {0x1E130, 0x1E136}, {0x1E2AE, 0x1E2AE},
    {0x1E2EC, 0x1E2EF}, {0x1E4EC, 0x1E4EF},
});

bool is_new_mark(utf8proc_int32_t code) {
    const auto range = std::lower_bound(kNewMarks.begin(), kNewMarks.end(), code,
                                        [](const Range& candidate, utf8proc_int32_t c) { return candidate.last < c; });
    return range != kNewMarks.end() && range->first <= code;
}

const utf8proc_uint8_t* bytes_of(std::string_view text) {
    return reinterpret_cast<const utf8proc_uint8_t*>(text.data());
}

Result<void> append_composed(std::string_view text, std::string& result) {
    utf8proc_uint8_t* composed = nullptr;
    const auto options = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    const auto length = utf8proc_map(bytes_of(text), static_cast<utf8proc_ssize_t>(text.size()), &composed, options);
    const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(composed, std::free);
    if (length < 0) return Error{std::string("the text cannot be normalized (") + utf8proc_errmsg(length) + ")"};
    result.append(reinterpret_cast<const char*>(composed), static_cast<size_t>(length));
    return {};
}

}  // namespace

Result<void> to_nfc(std::string& text) {
    const std::string_view whole = text;
    std::string result;
    size_t done = 0;
    for (size_t at = 0; at < whole.size();) {
        utf8proc_int32_t code = 0;
        const auto length =
            utf8proc_iterate(bytes_of(whole) + at, static_cast<utf8proc_ssize_t>(whole.size() - at), &code);
        const auto end = at + static_cast<size_t>(std::max<utf8proc_ssize_t>(length, 1));
        if (is_new_mark(code)) {
            if (auto appended = append_composed(whole.substr(done, at - done), result); !appended) return appended;
            result += whole.substr(at, end - at);
            done = end;
        }
        at = end;
    }
    if (auto appended = append_composed(whole.substr(done), result); !appended) return appended;
    text = std::move(result);
    return {};
}

}  // namespace llama_runner
