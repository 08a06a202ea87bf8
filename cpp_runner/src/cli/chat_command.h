#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "llama_runner/generation.h"
#include "llama_runner/program.h"
#include "llama_runner/result.h"

namespace llama_runner {

/// What `llama_runner FILE --chat` is given.
struct ChatArguments {
    std::string file;
    Program::Options program;
    GenerationOptions generation;
    /// Changes what the file recommends to what was asked for.
    std::function<void(SamplingOptions&)> ask;
    uint64_t seed = 0;
    std::optional<std::string> system;
};

/// Talks: a message a line from stdin, answers to stdout, all else to stderr.
Result<void> run_chat(const ChatArguments& arguments);

}  // namespace llama_runner
