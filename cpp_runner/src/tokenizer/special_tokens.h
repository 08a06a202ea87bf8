#pragma once

#include <array>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "llama_runner/result.h"
#include "llama_runner/tokenizer.h"

namespace llama_runner {

/// Finds a fixed set of texts in another text: the leftmost match, and the longest of several there.
class SpecialText {
  public:
    struct Match {
        size_t start;
        size_t length;
        /// Index of the found text, in the order of `add`; size() if there is none.
        size_t index;
    };

    void add(std::string text);

    size_t size() const { return texts_.size(); }

    /// Returns the next match at or after `from`; an empty one at the end of the text if there is none.
    Match find(std::string_view text, size_t from) const;

  private:
    std::vector<std::string> texts_;
    /// Indices of texts by first byte, longest text first.
    std::array<std::vector<size_t>, 256> by_first_byte_;
};

/// A special token, and whether white space before and after it is removed.
struct Special {
    int64_t id;
    bool strips_left = false;
    bool strips_right = false;
};

/// Finds special tokens in a text in parts, only some of which may have them.
class SpecialTokens {
  public:
    void add(std::string text, Special special);

    const TokenIds& ids() const { return ids_; }

    /// Appends the ids of the special tokens in the parts that may have them, and passes each non-empty section between
    /// them to `encode_section`, with whether it begins the text.
    Result<void> encode(std::span<const Part> parts, std::vector<int64_t>& ids,
                        const std::function<Result<void>(std::string_view, bool)>& encode_section) const;

  private:
    SpecialText texts_;
    std::vector<Special> specials_;
    TokenIds ids_;
};

}  // namespace llama_runner
