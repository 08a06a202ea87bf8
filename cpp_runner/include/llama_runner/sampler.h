#pragma once

#include <cstdint>
#include <map>
#include <memory>
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
    /// Only tokens whose probability is at least p times the likeliest's (Nguyen et al. 2024,
    /// https://arxiv.org/abs/2407.01082); 0 for all.
    double min_p = 0.0;
    /// Divides the positive logits of tokens in the window and multiplies the negative ones (CTRL, Keskar et al. 2019,
    /// https://arxiv.org/abs/1909.05858, section 4.1); 1 for none.
    double repetition_penalty = 1.0;
    /// Taken off the logit of each token in the window, once (as OpenAI defines it); 0 for none.
    double presence_penalty = 0.0;
    /// Taken off as many times as the token occurs in the window; 0 for none.
    double frequency_penalty = 0.0;
    /// How many of the text's latest tokens, the prompt's included, the three penalties look at.
    int64_t penalty_window = 64;
    /// What is added to the logits of some tokens, by their ids.
    std::map<int64_t, double> logit_bias = {};

    /// Fails where a value is outside its range.
    Result<void> check() const;

    /// Whether a token's logit depends on the tokens before it.
    bool penalises() const;
};

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
