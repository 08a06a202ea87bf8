#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace llama_runner {

/// The bytes of a base64 text with its padding; nothing where it is none, or empty.
std::optional<std::string> from_base64(std::string_view text);

}  // namespace llama_runner
