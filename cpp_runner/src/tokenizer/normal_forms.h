#pragma once

#include <string>

#include "llama_runner/result.h"

namespace llama_runner {

/// Unicode's normal forms: composed or not, and with compatibility characters replaced or not.
enum class NormalForm { kNfc, kNfd, kNfkc, kNfkd };

/// Converts valid UTF-8 to a normal form like the tokenizers library, whose tables are those of Unicode 9.
Result<void> to_normal_form(std::string& text, NormalForm form);

}  // namespace llama_runner
