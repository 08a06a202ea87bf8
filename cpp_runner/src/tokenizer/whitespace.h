#pragma once

#include <string_view>

namespace llama_runner {

/// Returns the number of bytes of white space at the end of a text: Unicode's White_Space, as in the tokenizers
/// library.
size_t spaces_before(std::string_view text);

/// Returns the number of bytes of white space at the start of a text.
size_t spaces_after(std::string_view text);

/// Returns a text without white space at its start and end, which includes U+001C to U+001F as in Python.
std::string_view stripped(std::string_view text);

/// Returns a text without white space at its end.
std::string_view stripped_right(std::string_view text);

}  // namespace llama_runner
