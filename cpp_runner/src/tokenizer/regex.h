#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "llama_runner/result.h"

namespace llama_runner {

/// A pattern that splits text before the model runs; it matches like Oniguruma, which the tokenizers library uses.
class Regex {
  public:
    /// Compiles a pattern. Fails if it is wrong, or has a feature that `pcre2_pattern` does not translate.
    static Result<Regex> compile(std::string_view pattern);

    /// Returns a pattern that matches a literal text.
    static Result<Regex> literal(std::string_view text);

    struct Match {
        size_t start;
        size_t end;
    };

    /// Returns all matches in valid UTF-8, in order, including empty ones, except those directly after another match.
    /// Fails if matching exceeds PCRE2's limits.
    Result<std::vector<Match>> find_all(std::string_view text) const;

  private:
    static Result<Regex> compile_as(std::string_view pattern, uint32_t options);

    struct Code;
    struct Delete {
        void operator()(Code* code) const;
    };

    std::unique_ptr<Code, Delete> code_;
};

}  // namespace llama_runner
