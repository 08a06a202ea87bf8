#pragma once

#include <string_view>

namespace llama_runner {

/// Bytes of the white space that ends a text: Unicode's White_Space, as tokenizers has it.
size_t spaces_before(std::string_view text);

/// Bytes of the white space that starts a text.
size_t spaces_after(std::string_view text);

/// A text without the white space at its start and end, of which Python knows more: U+001C to U+001F.
std::string_view stripped(std::string_view text);

/// A text without the white space at its end.
std::string_view stripped_right(std::string_view text);

}  // namespace llama_runner
