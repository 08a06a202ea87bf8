#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "llama_runner/result.h"
#include "llama_runner/sampling_options.h"

namespace llama_runner {

/// A token, and the natural logarithm of its probability.
struct LogProb {
    int64_t token = 0;
    double logprob = 0;
};

/// The random number generator SplitMix64 (Steele, Lea and Flood 2014, https://doi.org/10.1145/2714064.2660195). It
/// gives the same numbers in Python and C++.
class Rng {
  public:
    explicit Rng(uint64_t seed) : state(seed) {}

    /// Returns the next number in [0, 1), a multiple of 2^-53.
    double coin();

    /// The whole state.
    uint64_t state;
};

/// Draws tokens from logits. Has only scratch memory, allocated once, so that drawing allocates nothing.
class Sampler {
  public:
    explicit Sampler(int64_t vocab_size);

    /// Draws a token from at most vocab_size logits; equal probabilities rank by id, the lower first.
    ///
    /// The stages, in order: logit_bias is added; the repetition penalty is applied, then the presence and frequency
    /// penalties; the temperature is applied; then top_k, top_p and min_p. Temperature 0 takes the highest logit after
    /// the penalties. All arithmetic is float64.
    ///
    /// One random number is drawn per call unless the temperature is 0. Probabilities are summed from the likeliest
    /// token down if top_k or top_p is set, and in the order of ids otherwise.
    ///
    /// `recent` is the text so far, at least its last penalty_window tokens; read only if there is a penalty. Its ids
    /// and those of logit_bias must be smaller than the number of logits.
    int64_t sample(std::span<const float> logits, const SamplingOptions& options, Rng& rng,
                   std::span<const int64_t> recent = {});

    /// Returns the natural logarithm of a token's probability in softmax(logits), the model's own distribution, and
    /// fills `top` with the k likeliest tokens; equal logits rank by id, the lower first. Allocates only if the
    /// capacity of `top` is too small.
    double logprobs(std::span<const float> logits, int64_t token, int64_t k, std::vector<LogProb>& top);

  private:
    void adjust(std::span<const float> logits, const SamplingOptions& options, std::span<const int64_t> recent);
    template <typename Score>
    int64_t draw(std::span<const Score> scores, const SamplingOptions& options, Rng& rng);
    size_t rank(size_t count, const SamplingOptions& options);

    std::vector<int64_t> ids_;
    std::vector<double> probabilities_;
    std::vector<double> sums_;
    /// Logits with biases and penalties, and the number of times that each token occurs in the window. The memory is
    /// not touched before an option uses it.
    std::unique_ptr<double[]> scores_;
    std::unique_ptr<int64_t[]> counts_;
};

}  // namespace llama_runner
