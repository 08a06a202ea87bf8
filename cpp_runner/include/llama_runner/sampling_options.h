#pragma once

#include <cstdint>
#include <map>

#include "llama_runner/result.h"

namespace llama_runner {

/// Options for choosing a token.
struct SamplingOptions {
    /// Divides the logits; 0 takes the most likely token.
    double temperature = 0.0;
    /// Keeps only the k most likely tokens; 0 keeps all.
    int64_t top_k = 0;
    /// Keeps only the smallest set of most likely tokens whose probability reaches p (nucleus sampling, Holtzman et al.
    /// 2020, https://arxiv.org/abs/1904.09751); 1 keeps all.
    double top_p = 1.0;
    /// Keeps only tokens whose probability is at least p times the likeliest's (Nguyen et al. 2024,
    /// https://arxiv.org/abs/2407.01082); 0 keeps all.
    double min_p = 0.0;
    /// Divides the positive logits of tokens in the window and multiplies the negative ones (CTRL, Keskar et al. 2019,
    /// https://arxiv.org/abs/1909.05858, section 4.1); 1 for none.
    double repetition_penalty = 1.0;
    /// Subtracted once from the logit of each token in the window (as OpenAI defines it); 0 for none.
    double presence_penalty = 0.0;
    /// Subtracted from a token's logit as often as the token occurs in the window; 0 for none.
    double frequency_penalty = 0.0;
    /// Number of latest tokens of the text, prompt included, to which the three penalties apply.
    int64_t penalty_window = 64;
    /// Id -> number that is added to the token's logit.
    std::map<int64_t, double> logit_bias = {};

    /// Fails if a value is outside its range.
    Result<void> check() const;

    /// Returns whether a token's logit depends on the tokens before it.
    bool penalises() const;
};

}  // namespace llama_runner
