#pragma once

#include <string>

#include "llama_runner/result.h"

namespace llama_runner {

/// Reads a text from a file, or from standard input for "-", without a byte order mark and without one line end at its
/// end. Fails if it cannot be read.
Result<std::string> read_prompt(const std::string& path);

}  // namespace llama_runner
