#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace llama_runner {

/// Decodes a base64 text with padding; returns nothing if it is empty or invalid.
std::optional<std::string> from_base64(std::string_view text);

}  // namespace llama_runner
