#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "llama_runner/bench.h"
#include "llama_runner/generation.h"
#include "llama_runner/program.h"

namespace llama_runner {

/// The given flags for options that a file may recommend.
struct Asked {
    std::optional<double> temperature;
    std::optional<int64_t> top_k;
    std::optional<double> top_p;
    std::optional<double> repetition_penalty;

    void change(SamplingOptions& sampling) const {
        sampling.temperature = temperature.value_or(sampling.temperature);
        sampling.top_k = top_k.value_or(sampling.top_k);
        sampling.top_p = top_p.value_or(sampling.top_p);
        sampling.repetition_penalty = repetition_penalty.value_or(sampling.repetition_penalty);
    }
};

/// The arguments of the command.
struct Arguments {
    Asked asked;
    std::string file;
    std::string prompt;
    std::string prompt_file;
    std::optional<std::vector<int64_t>> prompt_ids;
    GenerationOptions generation;
    std::string session;
    std::string seed = "0";
    Program::Options program;
    BenchOptions bench;
    bool is_bench = false;
    bool is_chat = false;
    std::optional<std::string> system;
    bool json = false;
    bool parse_special = false;
};

/// Adds all flags, which fill `arguments` as they are parsed.
void add_flags(CLI::App& app, Arguments& arguments);

}  // namespace llama_runner
