#include "tokenizer/whitespace.h"

#include <algorithm>
#include <iterator>

namespace llama_runner {

namespace {

/// The characters of Unicode's White_Space, in UTF-8.
constexpr std::string_view kWhiteSpaces[] = {" ",
                                             "\t",
                                             "\n",
                                             "\v",
                                             "\f",
                                             "\r",
                                             "\xC2\x85",
                                             "\xC2\xA0",
                                             "\xE1\x9A\x80",
                                             "\xE2\x80\x80",
                                             "\xE2\x80\x81",
                                             "\xE2\x80\x82",
                                             "\xE2\x80\x83",
                                             "\xE2\x80\x84",
                                             "\xE2\x80\x85",
                                             "\xE2\x80\x86",
                                             "\xE2\x80\x87",
                                             "\xE2\x80\x88",
                                             "\xE2\x80\x89",
                                             "\xE2\x80\x8A",
                                             "\xE2\x80\xA8",
                                             "\xE2\x80\xA9",
                                             "\xE2\x80\xAF",
                                             "\xE2\x81\x9F",
                                             "\xE3\x80\x80"};

/// Returns whether a character is white space only in Python.
bool is_separator(char c) { return c >= '\x1C' && c <= '\x1F'; }

}  // namespace

size_t spaces_before(std::string_view text) {
    const size_t whole = text.size();
    const auto ends = [&](std::string_view space) { return text.ends_with(space); };
    for (;;) {
        const auto space = std::find_if(std::begin(kWhiteSpaces), std::end(kWhiteSpaces), ends);
        if (space == std::end(kWhiteSpaces)) return whole - text.size();
        text.remove_suffix(space->size());
    }
}

size_t spaces_after(std::string_view text) {
    size_t length = 0;
    const auto starts = [&](std::string_view space) { return text.substr(length).starts_with(space); };
    for (;;) {
        const auto space = std::find_if(std::begin(kWhiteSpaces), std::end(kWhiteSpaces), starts);
        if (space == std::end(kWhiteSpaces)) return length;
        length += space->size();
    }
}

std::string_view stripped(std::string_view text) {
    for (;;) {
        text.remove_prefix(spaces_after(text));
        if (text.empty() || !is_separator(text.front())) return stripped_right(text);
        text.remove_prefix(1);
    }
}

std::string_view stripped_right(std::string_view text) {
    for (;;) {
        text.remove_suffix(spaces_before(text));
        if (text.empty() || !is_separator(text.back())) return text;
        text.remove_suffix(1);
    }
}

}  // namespace llama_runner
