#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace llama_runner {

// The parts of a pattern that match one character. Each function reads one from the beginning of `rest`, shortens
// `rest` by it, and returns the same in PCRE2's syntax, see `pcre2_pattern`; or returns nothing if there is none that
// PCRE2 certainly reads as Oniguruma does.

inline bool is_ascii(char c) { return static_cast<unsigned char>(c) < 0x80; }

inline char lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; }

/// Reads a literal character, and returns it escaped for use inside and outside of classes.
std::optional<std::string> read_literal(std::string_view& rest);

/// Reads \s, \p{L} and similar outside of classes. `is_caseless` tells whether case is ignored here.
std::optional<std::string> read_set(std::string_view& rest, bool is_caseless);

/// Reads a class, [...].
std::optional<std::string> read_class(std::string_view& rest, bool is_caseless);

}  // namespace llama_runner
