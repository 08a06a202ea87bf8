#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace llama_runner {

/// The range of characters from `first` to `last`.
struct CodeRange {
    int32_t first;
    int32_t last;
};

/// Returns whether a character is in one of some ranges, which must be sorted.
bool is_in(std::span<const CodeRange> ranges, int32_t code);

/// A character of valid UTF-8, and its number of bytes.
struct Character {
    int32_t code;
    size_t length;
};

/// Returns the character at byte `at`, which must be inside `text`.
Character character_at(std::string_view text, size_t at);

/// Appends a character as UTF-8.
void append_character(int32_t code, std::string& text);

/// Returns whether a character is in Unicode's White_Space.
bool is_white_space(int32_t code);

/// Returns whether a character is a number for the stage Digits.
bool is_number(int32_t code);

/// Returns whether a character is punctuation for the stage Punctuation: ASCII's, with symbols, and Unicode's.
bool is_punctuation(int32_t code);

/// Returns whether a character is a combining mark for the stage StripAccents.
bool is_mark(int32_t code);

/// Returns whether a character is a mark that was added to Unicode after version 14.
bool is_new_mark(int32_t code);

/// Returns whether a character is part of a word (\w of Rust's regex crate).
bool is_word_character(int32_t code);

/// Returns the word characters of Oniguruma, as members of a pattern's class.
const std::string& word_members();

/// Returns a text in lower case; each character is converted separately.
std::string lowercase(std::string_view text);

}  // namespace llama_runner
