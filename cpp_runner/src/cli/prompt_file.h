#pragma once

#include <string>

#include "llama_runner/result.h"

namespace llama_runner {

/// A file's text, or what comes in by standard input for "-", without the mark that editors may write before it and
/// without one line end behind it. Fails where it cannot be read.
Result<std::string> read_prompt(const std::string& path);

}  // namespace llama_runner
