#pragma once

#include <array>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "llama_runner/result.h"

namespace llama_runner {

/// Finds a fixed set of texts inside another, leftmost first and the longest of those.
class SpecialText {
  public:
    struct Match {
        size_t start;
        size_t length;
        /// Index of the text found, in the order of `add`; size() where there is none.
        size_t index;
    };

    void add(std::string text);

    size_t size() const { return texts_.size(); }

    /// The next match at or after `from`; an empty one at the end of the text where there is none.
    Match find(std::string_view text, size_t from) const;

    /// Hands what lies between the matches to `plain` and each match's index to `special`, in order.
    Result<void> cut(std::string_view text, const std::function<Result<void>(std::string_view)>& plain,
                     const std::function<void(size_t)>& special) const;

  private:
    std::vector<std::string> texts_;
    /// Indices by first byte, longest text first.
    std::array<std::vector<size_t>, 256> by_first_byte_;
};

}  // namespace llama_runner
