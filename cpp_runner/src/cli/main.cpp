#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include "cli/chat_command.h"
#include "cli/flags.h"
#include "cli/prompt_file.h"
#include "llama_runner/bench.h"
#include "llama_runner/generation.h"
#include "llama_runner/measure.h"
#include "llama_runner/program.h"
#include "llama_runner/session.h"

namespace {

using namespace llama_runner;

constexpr int kBadInput = 2;

/// The times of a run, in seconds.
struct Statistics {
    double load = 0;
    size_t prompt_tokens = 0;
    double first_token = 0;
    int64_t new_tokens = 0;
    double decode = 0;
};

Error unusable(const std::string& flag, const std::string& value, const std::string& fix) {
    return {"--" + flag + " " + value + " is invalid; " + fix};
}

/// Reads a whole number from -2^63 to 2^64 - 1, modulo 2^64.
Result<uint64_t> seed_of(const std::string& text) {
    char* end = nullptr;
    errno = 0;
    const uint64_t seed = text.starts_with('-') ? static_cast<uint64_t>(std::strtoll(text.c_str(), &end, 10))
                                                : std::strtoull(text.c_str(), &end, 10);
    if (text.empty() || *end != '\0' || errno != 0)
        return unusable("seed", text, "give a whole number of up to 64 bits");
    return seed;
}

void print_text(const Step& step) {
    std::fwrite(step.text.data(), 1, step.text.size(), stdout);
    std::fflush(stdout);
}

/// The whole output of a run, for --format json.
struct Transcript {
    std::vector<int64_t> prompt_ids;
    std::vector<int64_t> token_ids;
    std::string text;
    std::string finish_reason;
    nlohmann::ordered_json logprobs = nullptr;

    void add(const Step& step) {
        token_ids.push_back(step.token);
        text += step.text;
        if (step.logprob) {
            auto top = nlohmann::ordered_json::array();
            for (const LogProb& likely : step.top_logprobs) top.push_back({likely.token, likely.logprob});
            logprobs.push_back({{"logprob", *step.logprob}, {"top_logprobs", top}});
        }
        if (const auto reason = name_of(step.finish_reason)) finish_reason = *reason;
    }
};

void print_json(const Transcript& transcript, const Statistics& statistics) {
    nlohmann::ordered_json result = {{"prompt_ids", transcript.prompt_ids},
                                     {"token_ids", transcript.token_ids},
                                     {"text", transcript.text},
                                     {"finish_reason", transcript.finish_reason}};
    if (!transcript.logprobs.is_null()) result["logprobs"] = transcript.logprobs;
    result["timings"] = {{"load", statistics.load}, {"prefill", statistics.first_token}, {"decode", statistics.decode}};
    std::printf("%s\n", result.dump().c_str());
}

void print_statistics(const Statistics& statistics) {
    const auto decoded = statistics.new_tokens - 1;
    char decode[32] = "none";
    if (decoded > 0) {
        std::snprintf(decode, sizeof decode, "%.1f tok/s", static_cast<double>(decoded) / statistics.decode);
    }
    std::fprintf(stderr,
                 "load %.2f s; prefill %zu tokens, %.1f tok/s; first token %.2f s after start of load; "
                 "decode %lld tokens, %s; peak memory %.0f MB\n",
                 statistics.load, statistics.prompt_tokens,
                 static_cast<double>(statistics.prompt_tokens) / statistics.first_token,
                 statistics.load + statistics.first_token, static_cast<long long>(decoded), decode,
                 static_cast<double>(peak_memory()) / 1e6);
}

/// Runs the generation to its end. Steps are added to the transcript if there is one, and printed otherwise.
Result<void> run_steps(Generator& generator, Transcript* transcript, Statistics& statistics) {
    const double start = now();
    double first = start;
    for (;;) {
        const auto step = generator.next();
        if (!step) return step.error();
        if (*step == nullptr) break;
        const double finished = now();
        if (statistics.new_tokens++ == 0) {
            first = finished;
            statistics.first_token = finished - start;
        }
        statistics.decode = finished - first;
        if (transcript != nullptr) {
            transcript->add(**step);
        } else {
            print_text(**step);
        }
    }
    if (transcript == nullptr && isatty(STDOUT_FILENO) != 0) std::puts("");
    return {};
}

Result<void> run(Arguments& arguments) {
    arguments.asked.change(arguments.generation.sampling);
    if (auto checked = arguments.generation.check(); !checked) return checked;
    if (arguments.generation.logprobs && !arguments.json) {
        return Error{"--logprobs " + std::to_string(*arguments.generation.logprobs) +
                     " is invalid for --format text; give --format json"};
    }
    const auto seed = seed_of(arguments.seed);
    if (!seed) return seed.error();
    Rng rng(*seed);
    if (!arguments.prompt_file.empty()) {
        auto text = read_prompt(arguments.prompt_file);
        if (!text) return text.error();
        arguments.prompt = *std::move(text);
    }

    Statistics statistics;
    const double start = now();
    auto program = Program::open(arguments.file, arguments.program);
    if (!program) return program.error();
    statistics.load = now() - start;
    auto prompt = arguments.prompt_ids ? Result<std::vector<int64_t>>(*arguments.prompt_ids)
                                       : prompt_ids(**program, arguments.prompt, arguments.parse_special);
    if (!prompt) return prompt.error();
    statistics.prompt_tokens = prompt->size();
    auto session = Session::create(**program);
    if (!session) return session.error();
    if (!arguments.session.empty() && std::filesystem::exists(arguments.session)) {
        if (auto loaded = session->load(arguments.session); !loaded) return loaded;
    }
    arguments.generation.stop_ids = (*program)->metadata().stop_ids;
    auto generator = Generator::create(*session, *prompt, arguments.generation, rng, (*program)->tokenizer());
    if (!generator) return generator.error();
    Transcript transcript{.prompt_ids = *prompt, .token_ids = {}, .text = {}, .finish_reason = {}, .logprobs = {}};
    if (auto ran = run_steps(*generator, arguments.json ? &transcript : nullptr, statistics); !ran) return ran;
    if (arguments.json) print_json(transcript, statistics);
    print_statistics(statistics);
    return arguments.session.empty() ? Result<void>() : session->save(arguments.session);
}

nlohmann::ordered_json to_json(const Measured& measured) {
    auto prefill = nlohmann::ordered_json::array();
    for (const auto& row : measured.prefill) {
        prefill.push_back({{"length", row.length}, {"tokens_per_second", row.tokens_per_second}});
    }
    auto decode = nlohmann::ordered_json::array();
    for (const auto& row : measured.decode) {
        decode.push_back(
            {{"position", row.position}, {"tokens_per_second", row.tokens_per_second}, {"roofline", row.roofline}});
    }
    return {{"load", measured.load},
            {"first_token", measured.first_token},
            {"bandwidth", measured.bandwidth},
            {"peak_bytes", measured.peak_bytes},
            {"prefill", prefill},
            {"decode", decode}};
}

Result<void> run_bench(Arguments& arguments) {
    const auto measured = bench(arguments.file, arguments.program, arguments.bench);
    if (!measured) return measured.error();
    if (arguments.json) {
        std::printf("%s\n", to_json(*measured).dump(2).c_str());
        return {};
    }
    std::printf("load %.2f s, then first token %.3f s; memory read at %.1f GB/s; peak memory %.0f MB\n", measured->load,
                measured->first_token, measured->bandwidth / 1e9, static_cast<double>(measured->peak_bytes) / 1e6);
    for (const auto& row : measured->prefill) {
        std::printf("prefill %6lld tokens  %10.1f tok/s\n", static_cast<long long>(row.length), row.tokens_per_second);
    }
    for (const auto& row : measured->decode) {
        std::printf("decode at %6lld       %10.1f tok/s  %5.1f%% of roofline\n", static_cast<long long>(row.position),
                    row.tokens_per_second, 100 * row.roofline);
    }
    return {};
}

Result<void> talk(Arguments& arguments) {
    const auto seed = seed_of(arguments.seed);
    if (!seed) return seed.error();
    return run_chat({arguments.file, arguments.program, arguments.generation,
                     [&](SamplingOptions& sampling) { arguments.asked.change(sampling); }, *seed, arguments.system});
}

}  // namespace

/// Runs the command: prints text to stdout and statistics to stderr. Returns exit code 0, or 2 for bad input.
int main(int count, char** values) {
    CLI::App app("Continues a prompt with the model in a .pte file.", "llama_runner");
    app.footer(
        "\nExamples:\n"
        "  llama_runner tiny.pte --prompt \"Once upon a time\"\n"
        "  llama_runner tiny.pte --prompt \"The dog\" --temperature 0.8 --top-p 0.9 --seed 7 --max-new-tokens 100\n"
        "  llama_runner llama.pte --chat --system \"Answer in one sentence.\"\n"
        "  llama_runner llama.pte --bench --decode 16 1000");
    Arguments arguments;
    add_flags(app, arguments);
    try {
        app.parse(count, values);
    } catch (const CLI::CallForHelp&) {
        std::fputs(app.help().c_str(), stdout);
        return 0;
    } catch (const CLI::ParseError& error) {
        std::fprintf(stderr, "error: %s; see llama_runner --help\n", error.what());
        return kBadInput;
    }
    const auto command = arguments.is_bench ? run_bench : arguments.is_chat ? talk : run;
    if (auto ran = command(arguments); !ran) {
        std::fflush(stdout);
        std::fprintf(stderr, "error: %s\n", ran.error().message.c_str());
        return kBadInput;
    }
    return 0;
}
