#pragma once

#include <cstdint>
#include <span>

namespace llama_runner {

/// Guesses at the next tokens, which one step checks all at once: what followed the latest tokens the last time they
/// occurred in the text, because code and quotations repeat themselves (prompt lookup,
/// https://github.com/apoorvumang/prompt-lookup-decoding).
///
/// A guess changes nothing but the time a text takes: each token is drawn from the model's own logits with its own
/// coin, and the guess only says for which tokens the logits are there already.
class Lookup {
  public:
    /// `longest`: of the latest tokens that are looked for; if they do not occur, fewer are.
    explicit Lookup(int64_t longest = 3) : longest_(longest) {}

    /// Up to `count` tokens that may follow the text: a part of it.
    std::span<const int64_t> guess(std::span<const int64_t> text, int64_t count) const;

  private:
    int64_t longest_;
};

}  // namespace llama_runner
