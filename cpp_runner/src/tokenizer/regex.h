#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "llama_runner/result.h"

namespace llama_runner {

/// A pattern that cuts text before the model sees it, matched as tokenizers does by Oniguruma.
class Regex {
  public:
    /// Fails where the pattern is wrong, or has what `pcre2_pattern` does not translate.
    static Result<Regex> compile(std::string_view pattern);

    /// A text that stands for itself.
    static Result<Regex> literal(std::string_view text);

    struct Match {
        size_t start;
        size_t end;
    };

    /// All matches in valid UTF-8, in order: empty ones too, but for those right behind another. Fails where matching
    /// exceeds PCRE2's limits.
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
