#include "llama_runner/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace llama_runner {

double Rng::coin() {
    state += 0x9E3779B97F4A7C15;
    uint64_t z = state;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

Sampler::Sampler(int64_t vocab_size)
    : ids_(static_cast<size_t>(vocab_size)),
      probabilities_(ids_.size()),
      sums_(ids_.size()),
      scores_(std::make_unique_for_overwrite<double[]>(ids_.size())),
      counts_(std::make_unique_for_overwrite<int64_t[]>(ids_.size())) {}

int64_t Sampler::sample(std::span<const float> logits, const SamplingOptions& options, Rng& rng,
                        std::span<const int64_t> recent) {
    if (options.logit_bias.empty() && !options.penalises()) return draw(logits, options, rng);
    adjust(logits, options, recent);
    return draw(std::span<const double>(scores_.get(), logits.size()), options, rng);
}

/// Applies the stages before temperature and writes the result to `scores_`.
void Sampler::adjust(std::span<const float> logits, const SamplingOptions& options, std::span<const int64_t> recent) {
    std::copy(logits.begin(), logits.end(), scores_.get());
    for (const auto& [token, bias] : options.logit_bias) scores_[static_cast<size_t>(token)] += bias;
    if (!options.penalises()) return;
    const auto window = recent.last(std::min(recent.size(), static_cast<size_t>(options.penalty_window)));
    for (const int64_t token : window) counts_[static_cast<size_t>(token)] = 0;
    for (const int64_t token : window) ++counts_[static_cast<size_t>(token)];
    for (const int64_t token : window) {
        int64_t& times = counts_[static_cast<size_t>(token)];
        if (times == 0) continue;  // already applied
        double& score = scores_[static_cast<size_t>(token)];
        score = score > 0 ? score / options.repetition_penalty : score * options.repetition_penalty;
        score -= options.presence_penalty + options.frequency_penalty * static_cast<double>(times);
        times = 0;
    }
}

template <typename Score>
int64_t Sampler::draw(std::span<const Score> scores, const SamplingOptions& options, Rng& rng) {
    const auto likeliest = std::max_element(scores.begin(), scores.end());
    if (options.temperature == 0) return likeliest - scores.begin();

    size_t count = scores.size();
    const double highest = *likeliest;
    for (size_t i = 0; i < count; ++i) {
        const double probability = std::exp((scores[i] - highest) / options.temperature);
        probabilities_[i] = probability >= 0 ? probability : 0;  // because NaN has no order
        ids_[i] = static_cast<int64_t>(i);
    }
    if (options.top_k > 0 || options.top_p < 1) count = rank(count, options);
    if (options.min_p > 0) {  // in logarithms, which Python and C++ round alike
        const double least = std::log(options.min_p);
        const auto unlikely = [&](int64_t id) {
            return (scores[static_cast<size_t>(id)] - highest) / options.temperature < least;
        };
        const auto last = ids_.begin() + static_cast<ptrdiff_t>(count);
        count = static_cast<size_t>(std::remove_if(ids_.begin(), last, unlikely) - ids_.begin());
    }
    const auto end = sums_.begin() + static_cast<ptrdiff_t>(count);
    double sum = 0;
    for (size_t i = 0; i < count; ++i) sums_[i] = sum += probabilities_[static_cast<size_t>(ids_[i])];
    const auto drawn = std::upper_bound(sums_.begin(), end, rng.coin() * sum);
    return ids_[std::min(static_cast<size_t>(drawn - sums_.begin()), count - 1)];
}

/// Orders ids by probability and returns how many remain after top_k and top_p.
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

double Sampler::logprobs(std::span<const float> logits, int64_t token, int64_t k, std::vector<LogProb>& top) {
    const double highest = *std::max_element(logits.begin(), logits.end());
    double sum = 0;
    for (const float logit : logits) sum += std::exp(logit - highest);
    const double whole = std::log(sum);
    const auto logprob = [&](int64_t id) { return logits[static_cast<size_t>(id)] - highest - whole; };

    const auto ids = std::span(ids_).first(logits.size());
    const auto likeliest = ids.first(std::min(ids.size(), static_cast<size_t>(k)));
    std::iota(ids.begin(), ids.end(), 0);
    const auto before = [&](int64_t a, int64_t b) {
        const float p = logits[static_cast<size_t>(a)];
        const float q = logits[static_cast<size_t>(b)];
        return p > q || (p == q && a < b);
    };
    std::partial_sort(ids.begin(), ids.begin() + std::ssize(likeliest), ids.end(), before);
    top.clear();
    for (const int64_t id : likeliest) top.push_back({id, logprob(id)});
    return logprob(token);
}

}  // namespace llama_runner
