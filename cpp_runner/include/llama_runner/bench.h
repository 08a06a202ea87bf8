#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "llama_runner/program.h"
#include "llama_runner/result.h"

namespace llama_runner {

struct BenchOptions {
    /// Lengths of prompts, and positions at which to decode; those that do not fit in the context are left out.
    std::vector<int64_t> prefill{128, 512, 2048};
    std::vector<int64_t> decode{16, 1000, 4000};
};

/// The measurements of a file, the same as those of runtime.bench.
struct Measured {
    struct Prefill {
        int64_t length;
        double tokens_per_second;
    };

    /// `roofline` is the share of the speed that memory bandwidth allows, if a step reads all weights and the filled
    /// caches.
    struct Decode {
        int64_t position;
        double tokens_per_second;
        double roofline;
    };

    /// Seconds until the file was loaded, and from then to the logits after a prompt of 16 tokens.
    double load = 0;
    double first_token = 0;
    /// Bytes a second that all threads together read from memory.
    double bandwidth = 0;
    /// Peak memory of the process in bytes, the mapped file included.
    int64_t peak_bytes = 0;
    std::vector<Prefill> prefill;
    std::vector<Decode> decode;
};

/// Opens and measures a file. Each prompt is run twice, and the faster run counts; up to 32 tokens are decoded at each
/// position, and their median time counts.
Result<Measured> bench(const std::string& path, const Program::Options& program, const BenchOptions& options);

}  // namespace llama_runner
