#include "attention/bandwidth.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#include "llama_runner/measure.h"

namespace llama_runner {

namespace {

constexpr size_t kWords = size_t{1} << 25;
constexpr int kPasses = 5;

/// Sums words in so many lanes that reading them, not adding, takes the time.
uint64_t sum(const uint64_t* words, size_t count) {
    uint64_t sums[32] = {};
    for (size_t i = 0; i + 32 <= count; i += 32) {
        for (size_t lane = 0; lane < 32; ++lane) sums[lane] += words[i + lane];
    }
    uint64_t total = 0;
    for (const uint64_t lane : sums) total += lane;
    return total;
}

}  // namespace

double read_bandwidth(int threads) {
    const std::vector<uint64_t> words(kWords, 1);
    const auto parts = static_cast<size_t>(std::max(threads, 1));
    std::vector<uint64_t> sums(parts);
    double best = 0;
    for (int pass = 0; pass < kPasses; ++pass) {
        const double start = now();
        std::vector<std::thread> readers;
        for (size_t i = 0; i < parts; ++i) {
            readers.emplace_back([&, i] { sums[i] = sum(words.data() + i * (kWords / parts), kWords / parts); });
        }
        for (std::thread& reader : readers) reader.join();
        const double taken = now() - start;
        uint64_t read = 0;
        for (const uint64_t part : sums) read += part;  // also prevents the compiler from removing the sums
        best = std::max(best, static_cast<double>(read * sizeof(uint64_t)) / taken);
    }
    return best;
}

}  // namespace llama_runner
