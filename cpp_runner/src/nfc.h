#pragma once

#include <string>

#include "llama_runner/result.h"

namespace llama_runner {

/// Composes valid UTF-8 (Unicode's form NFC) as the tokenizers library does, whose tables are those of Unicode 9.
Result<void> to_nfc(std::string& text);

}  // namespace llama_runner
