#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace llama_runner {

/// Characters from `first` to `last`.
struct CodeRange {
    int32_t first;
    int32_t last;
};

/// Whether a character is in one of some ranges, which are in order.
bool is_in(std::span<const CodeRange> ranges, int32_t code);

/// A character of valid UTF-8, and the bytes it takes.
struct Character {
    int32_t code;
    size_t length;
};

/// The character at the byte `at`, which is inside `text`.
Character character_at(std::string_view text, size_t at);

/// Appends a character as UTF-8.
void append_character(int32_t code, std::string& text);

/// Unicode's White_Space.
bool is_white_space(int32_t code);

/// Any number, as Digits takes them.
bool is_number(int32_t code);

/// ASCII's punctuation with its symbols, and Unicode's, as Punctuation takes them.
bool is_punctuation(int32_t code);

/// A combining mark, as StripAccents takes them.
bool is_mark(int32_t code);

/// A mark that Unicode got after version 14.
bool is_new_mark(int32_t code);

/// Whether a character is part of a word (\w of Rust's regex).
bool is_word_character(int32_t code);

/// The same of Oniguruma, as members of a pattern's class.
const std::string& word_members();

/// A text in lower case, each character by itself.
std::string lowercase(std::string_view text);

}  // namespace llama_runner
