#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "llama_runner/result.h"
#include "llama_runner/sampling_options.h"

namespace llama_runner {

/// A token, and the logarithm of its probability.
struct LogProb {
    int64_t token = 0;
    double logprob = 0;
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
    /// The stages: logit_bias is added; the penalties follow, first repetition, then presence and frequency;
    /// temperature; of what then is likely, top_k, top_p and min_p, in this order. Temperature 0 takes the highest
    /// logit after the penalties. All of it is float64.
    ///
    /// One coin is drawn per call unless the temperature is 0. Probabilities are float64, summed from the likeliest
    /// token down where top_k or top_p order them, and by id otherwise.
    ///
    /// `recent` is the text so far, at least its last penalty_window tokens; read only where there is a penalty. Its
    /// ids and those of logit_bias are smaller than the number of logits.
    int64_t sample(std::span<const float> logits, const SamplingOptions& options, Rng& rng,
                   std::span<const int64_t> recent = {});

    /// Logarithms of probabilities in softmax(logits), the model's own distribution: returns that of `token`, and fills
    /// `top` with the k likeliest tokens; equal logits rank by id, the lower first. Allocates where `top` lacks room.
    double logprobs(std::span<const float> logits, int64_t token, int64_t k, std::vector<LogProb>& top);

  private:
    void adjust(std::span<const float> logits, const SamplingOptions& options, std::span<const int64_t> recent);
    template <typename Score>
    int64_t draw(std::span<const Score> scores, const SamplingOptions& options, Rng& rng);
    size_t rank(size_t count, const SamplingOptions& options);

    std::vector<int64_t> ids_;
    std::vector<double> probabilities_;
    std::vector<double> sums_;
    /// Logits with biases and penalties, and how often tokens occur in the window: untouched until there are any.
    std::unique_ptr<double[]> scores_;
    std::unique_ptr<int64_t[]> counts_;
};

}  // namespace llama_runner
