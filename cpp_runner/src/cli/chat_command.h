#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "llama_runner/generation.h"
#include "llama_runner/program.h"
#include "llama_runner/result.h"

namespace llama_runner {

/// The arguments of `llama_runner FILE --chat`.
struct ChatArguments {
    std::string file;
    Program::Options program;
    GenerationOptions generation;
    /// Replaces the file's recommended options by those given as flags.
    std::function<void(SamplingOptions&)> ask;
    uint64_t seed = 0;
    std::optional<std::string> system;
};

/// Runs a chat: reads one message per line from stdin, prints answers to stdout and everything else to stderr.
Result<void> run_chat(const ChatArguments& arguments);

}  // namespace llama_runner
