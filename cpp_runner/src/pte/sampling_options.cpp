#include "llama_runner/sampling_options.h"

#include <cmath>
#include <string>
#include <utility>

namespace llama_runner {

namespace {

std::string shown(double value) {
    std::string text = std::to_string(value);
    text.erase(text.find_last_not_of('0') + 1);
    return text.back() == '.' ? text + "0" : text;
}

}  // namespace

Result<void> SamplingOptions::check() const {
    if (!(temperature >= 0) || std::isinf(temperature)) {
        return Error{"temperature " + shown(temperature) + " is invalid; give 0 or more"};
    }
    if (top_k < 0) return Error{"top-k " + std::to_string(top_k) + " is invalid; give 0 (all) or more"};
    if (!(top_p > 0 && top_p <= 1)) {
        return Error{"top-p " + shown(top_p) + " is invalid; give more than 0, up to 1"};
    }
    if (!(min_p >= 0 && min_p <= 1)) return Error{"min-p " + shown(min_p) + " is invalid; give 0 (all) to 1"};
    if (!(repetition_penalty > 0) || std::isinf(repetition_penalty)) {
        return Error{"repetition-penalty " + shown(repetition_penalty) +
                     " is invalid; give more than 0, where 1 is none"};
    }
    for (const auto& [name, penalty] : {std::pair{"presence", presence_penalty}, {"frequency", frequency_penalty}}) {
        if (!std::isfinite(penalty)) {
            return Error{std::string(name) + "-penalty " + shown(penalty) +
                         " is invalid; give a finite number, where 0 is none"};
        }
    }
    if (penalty_window < 1) {
        return Error{"penalty-window " + std::to_string(penalty_window) + " is invalid; give 1 or more"};
    }
    for (const auto& [token, bias] : logit_bias) {
        if (token < 0 || !std::isfinite(bias)) {
            return Error{"logit-bias " + std::to_string(token) + "=" + shown(bias) +
                         " is invalid; give an id of 0 or more and a finite number"};
        }
    }
    return {};
}

bool SamplingOptions::penalises() const {
    return repetition_penalty != 1 || presence_penalty != 0 || frequency_penalty != 0;
}

}  // namespace llama_runner
