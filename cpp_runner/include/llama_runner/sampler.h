#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "llama_runner/result.h"

namespace llama_runner {

/// How to choose a token.
struct SamplingOptions {
    /// Divides the logits; 0 takes the most likely token.
    double temperature = 0.0;
    /// Only the k most likely tokens; 0 for all.
    int64_t top_k = 0;
    /// Only the smallest set of most likely tokens whose probability reaches p (nucleus sampling, Holtzman et al. 2020,
    /// https://arxiv.org/abs/1904.09751); 1 for all.
    double top_p = 1.0;

    /// Fails where a value is outside its range.
    Result<void> check() const;
};

/// SplitMix64 (Steele, Lea and Flood 2014, https://doi.org/10.1145/2714064.2660195): 64 bits of state, equal in every
/// language.
class Rng {
  public:
    explicit Rng(uint64_t seed) : state(seed) {}

    /// The next number in [0, 1), a multiple of 2^-53.
    double coin();

    /// All there is to save and restore.
    uint64_t state;
};

/// Draws tokens from logits. Holds only scratch memory, sized once, so that drawing allocates nothing.
class Sampler {
  public:
    explicit Sampler(int64_t vocab_size);

    /// Draws a token from at most vocab_size logits; equal probabilities rank by id, the lower first.
    ///
    /// One coin is drawn per call unless the temperature is 0. Probabilities are float64, summed from the likeliest
    /// token down where top_k or top_p order them, and by id otherwise.
    int64_t sample(std::span<const float> logits, const SamplingOptions& options, Rng& rng);

  private:
    size_t rank(size_t count, const SamplingOptions& options);

    std::vector<int64_t> ids_;
    std::vector<double> probabilities_;
    std::vector<double> sums_;
};

}  // namespace llama_runner
