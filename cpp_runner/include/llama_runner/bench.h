#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "llama_runner/program.h"
#include "llama_runner/result.h"

namespace llama_runner {

struct BenchOptions {
    /// Lengths of prompts, and positions; those that the context has no room for are left out.
    std::vector<int64_t> prefill{128, 512, 2048};
    std::vector<int64_t> decode{16, 1000, 4000};
};

/// How fast a file runs here, as runtime.bench measures it.
struct Measured {
    struct Prefill {
        int64_t length;
        double tokens_per_second;
    };

    /// `roofline` is the share of the speed at which memory could be read for a token: all weights, and the caches up
    /// to its position.
    struct Decode {
        int64_t position;
        double tokens_per_second;
        double roofline;
    };

    /// Seconds until the file was ready, and from there to the first token behind a prompt of 16.
    double load = 0;
    double first_token = 0;
    /// Bytes a second that all threads together read from memory.
    double bandwidth = 0;
    /// The most memory that the process held, the mapped file included.
    int64_t peak_bytes = 0;
    std::vector<Prefill> prefill;
    std::vector<Decode> decode;
};

/// Opens a file and runs it: each prompt twice, of which the faster counts, and up to 32 tokens at each position, of
/// which the median does.
Result<Measured> bench(const std::string& path, const Program::Options& program, const BenchOptions& options);

}  // namespace llama_runner
