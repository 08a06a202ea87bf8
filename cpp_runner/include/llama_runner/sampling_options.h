#pragma once

#include <cstdint>
#include <map>

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

}  // namespace llama_runner
