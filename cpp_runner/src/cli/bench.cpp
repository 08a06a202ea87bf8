#include "llama_runner/bench.h"

#include <algorithm>
#include <thread>

#include "attention/bandwidth.h"
#include "llama_runner/measure.h"
#include "llama_runner/session.h"

namespace llama_runner {

namespace {

constexpr int64_t kSteps = 32;
constexpr int64_t kShortPrompt = 16;

/// Returns the seconds that a prompt of `length` tokens takes from the start of a text.
Result<double> prefilled(Session& session, int64_t length, int64_t vocab_size) {
    std::vector<int64_t> prompt(static_cast<size_t>(length));
    for (int64_t i = 0; i < length; ++i) prompt[static_cast<size_t>(i)] = 7919 * i % vocab_size;
    session.reset();
    const double start = now();
    if (auto logits = session.prefill(prompt); !logits) return logits.error();
    return now() - start;
}

/// Returns the median of the seconds that a token takes after `position` tokens, of at most kSteps tokens.
Result<double> decoded(Session& session, int64_t position, int64_t vocab_size) {
    if (auto filled = prefilled(session, position, vocab_size); !filled) return filled.error();
    std::vector<double> times;
    const int64_t token = 1;
    for (int64_t i = 0; i < std::min(kSteps, session.capacity() - position); ++i) {
        const double start = now();
        if (auto logits = session.prefill({&token, 1}); !logits) return logits.error();
        times.push_back(now() - start);
    }
    const auto middle = times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2);
    std::ranges::nth_element(times, middle);
    return *middle;
}

}  // namespace

Result<Measured> bench(const std::string& path, const Program::Options& options, const BenchOptions& wanted) {
    Measured measured;
    const double start = now();
    auto program = Program::open(path, options);
    if (!program) return program.error();
    auto session = Session::create(**program);
    if (!session) return session.error();
    measured.load = now() - start;
    const Metadata& metadata = (*program)->metadata();
    const int64_t vocab_size = metadata.vocab_size;

    const auto first = prefilled(*session, std::min(kShortPrompt, session->capacity()), vocab_size);
    if (!first) return first.error();
    measured.first_token = *first;
    for (const int64_t length : wanted.prefill) {
        if (length < 1 || length > session->capacity()) continue;
        const auto once = prefilled(*session, length, vocab_size);
        const auto twice = prefilled(*session, length, vocab_size);
        if (!once || !twice) return (once ? twice : once).error();
        measured.prefill.push_back({length, static_cast<double>(length) / std::min(*once, *twice)});
    }
    for (const int64_t position : wanted.decode) {
        if (position < 1 || position >= session->capacity()) continue;
        const auto seconds = decoded(*session, position, vocab_size);
        if (!seconds) return seconds.error();
        const auto moved =
            static_cast<double>(metadata.matrix_bytes) + static_cast<double>(session->cache().filled_bytes(position));
        measured.decode.push_back({position, 1 / *seconds, moved / *seconds});
    }
    if (measured.prefill.empty() && measured.decode.empty()) {
        return Error{"--prefill and --decode are too large for the " + std::to_string(session->capacity()) +
                     " positions of " + path + "; give smaller numbers"};
    }
    measured.peak_bytes = peak_memory();
    // Last, because it raises the peak memory.
    measured.bandwidth =
        read_bandwidth(static_cast<int>(options.threads.value_or(std::max(1U, std::thread::hardware_concurrency()))));
    for (Measured::Decode& row : measured.decode) row.roofline /= measured.bandwidth;
    return measured;
}

}  // namespace llama_runner
