#pragma once

#include <cstdint>
#include <span>

namespace llama_runner {

/// Guesses the next tokens, which the model then checks all in one step: it guesses what followed the latest tokens the
/// last time they occurred in the text. This helps with code and quotations, which repeat themselves (prompt lookup,
/// https://github.com/apoorvumang/prompt-lookup-decoding).
///
/// A guess changes only the time a text takes: each token is drawn from the model's own logits with its own random
/// number. The guess only decides for which tokens the step computes logits in advance.
class Lookup {
  public:
    /// Sets the number of latest tokens to search for; if they do not occur, fewer are searched for.
    explicit Lookup(int64_t longest = 3) : longest_(longest) {}

    /// Returns at most `count` tokens that may follow the text, as a view of a part of it.
    std::span<const int64_t> guess(std::span<const int64_t> text, int64_t count) const;

  private:
    int64_t longest_;
};

}  // namespace llama_runner
