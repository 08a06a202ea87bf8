#include "llama_runner/sampler.h"

#include <algorithm>
#include <cmath>

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
        return Error{"temperature " + shown(temperature) + " is impossible; give 0 or more"};
    }
    if (top_k < 0) return Error{"top-k " + std::to_string(top_k) + " is impossible; give 0 (all) or more"};
    if (!(top_p > 0 && top_p <= 1)) {
        return Error{"top-p " + shown(top_p) + " is impossible; give more than 0, up to 1"};
    }
    return {};
}

double Rng::coin() {
    state += 0x9E3779B97F4A7C15;
    uint64_t z = state;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

Sampler::Sampler(int64_t vocab_size)
    : ids_(static_cast<size_t>(vocab_size)), probabilities_(ids_.size()), sums_(ids_.size()) {}

int64_t Sampler::sample(std::span<const float> logits, const SamplingOptions& options, Rng& rng) {
    const auto likeliest = std::max_element(logits.begin(), logits.end());
    if (options.temperature == 0) return likeliest - logits.begin();

    size_t count = logits.size();
    const double highest = *likeliest;
    for (size_t i = 0; i < count; ++i) {
        const double probability = std::exp((logits[i] - highest) / options.temperature);
        probabilities_[i] = probability >= 0 ? probability : 0;  // NaN cannot be ordered
        ids_[i] = static_cast<int64_t>(i);
    }
    if (options.top_k > 0 || options.top_p < 1) count = rank(count, options);
    const auto end = sums_.begin() + static_cast<ptrdiff_t>(count);
    double sum = 0;
    for (size_t i = 0; i < count; ++i) sums_[i] = sum += probabilities_[static_cast<size_t>(ids_[i])];
    const auto drawn = std::upper_bound(sums_.begin(), end, rng.coin() * sum);
    return ids_[std::min(static_cast<size_t>(drawn - sums_.begin()), count - 1)];
}

/// Orders ids by probability and returns how many of them remain.
size_t Sampler::rank(size_t count, const SamplingOptions& options) {
    const auto k = static_cast<size_t>(options.top_k);
    const size_t kept = k > 0 && k < count ? k : count;
    const auto end = ids_.begin() + static_cast<ptrdiff_t>(count);
    const auto middle = ids_.begin() + static_cast<ptrdiff_t>(kept);
    const auto before = [this](int64_t a, int64_t b) {
        const double p = probabilities_[static_cast<size_t>(a)];
        const double q = probabilities_[static_cast<size_t>(b)];
        return p > q || (p == q && a < b);
    };
    if (kept < count) std::nth_element(ids_.begin(), middle, end, before);
    std::sort(ids_.begin(), middle, before);
    if (options.top_p == 1) return kept;
    double sum = 0;
    for (size_t i = 0; i < kept; ++i) sums_[i] = sum += probabilities_[static_cast<size_t>(ids_[i])];
    const auto last = sums_.begin() + static_cast<ptrdiff_t>(kept);
    const auto reached = std::lower_bound(sums_.begin(), last, options.top_p * sum);
    return std::min(static_cast<size_t>(reached - sums_.begin()) + 1, kept);
}

}  // namespace llama_runner
