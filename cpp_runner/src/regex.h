#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "llama_runner/result.h"

namespace llama_runner {

/// A pattern that splits text before BPE merges it, matched as tiktoken (Rust's regex) and tokenizers (Oniguruma) do:
/// \s is Unicode's White_Space, \p{L} and \p{N} are those of Unicode 16, whatever PCRE2 was built with.
class Regex {
  public:
    /// Fails where the pattern is wrong or uses more than the tokenizers' patterns do.
    static Result<Regex> compile(std::string_view pattern);

    struct Match {
        size_t start;
        size_t end;
    };

    /// All non-empty matches in valid UTF-8, in order. Fails where matching exceeds PCRE2's limits.
    Result<std::vector<Match>> find_all(std::string_view text) const;

  private:
    struct Code;
    struct Delete {
        void operator()(Code* code) const;
    };

    std::unique_ptr<Code, Delete> code_;
};

}  // namespace llama_runner
