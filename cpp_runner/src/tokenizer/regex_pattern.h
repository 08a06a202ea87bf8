#pragma once

#include <string>
#include <string_view>

#include "llama_runner/result.h"

namespace llama_runner {

/// Rewrites a pattern in Oniguruma's Ruby syntax so that PCRE2 matches the same texts as Oniguruma: \s is Unicode's
/// White_Space, \p{...} has the characters of Unicode 16, classes may be nested and intersected, (?i) ends with its
/// alternative, and {1,3}+ repeats. Meant for the options PCRE2_UTF, PCRE2_UCP and PCRE2_MULTILINE.
///
/// Fails if it has a feature that the two might read differently; `export/planning/cpp_tokenizer.py` refuses the same.
Result<std::string> pcre2_pattern(std::string_view pattern);

}  // namespace llama_runner
