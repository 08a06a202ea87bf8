#include "cli/flags.h"

#include <cctype>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <map>
#include <string_view>

namespace llama_runner {

namespace {

template <typename Number>
bool read_number(std::string_view text, Number& number) {
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    return error == std::errc() && end == text.data() + text.size();
}

/// Reads a number of bytes such as 400MB, 1.5GB or 64MiB, as in Python. CLI::AsSizeValue accepts no fractions.
int64_t byte_count(const std::string& text) {
    char* rest = nullptr;
    const double number = std::strtod(text.c_str(), &rest);
    std::string unit(rest);
    if (!unit.empty() && (unit.back() == 'B' || unit.back() == 'b')) unit.pop_back();
    const bool binary = unit.size() == 2 && unit[1] == 'i';
    const std::string_view units = "kmgt";
    const size_t power = unit.empty() ? 0 : units.find(static_cast<char>(std::tolower(unit[0]))) + 1;
    if (rest == text.c_str() || !(number >= 0 && number < 1e15) || unit.size() > 1U + binary ||
        (!unit.empty() && power == 0)) {
        throw CLI::ValidationError("--memory-budget", "'" + text + "' is no size; give one such as 400MB or 2GiB");
    }
    return static_cast<int64_t>(number * std::pow(binary ? 1024 : 1000, power));
}

/// Reads ID=VALUE into `bias`; returns false if the text has another form.
bool read_bias(std::string_view text, std::map<int64_t, double>& bias) {
    const size_t equals = text.find('=');
    int64_t token = 0;
    double value = 0;
    if (equals == std::string::npos || !read_number(text.substr(0, equals), token) ||
        !read_number(text.substr(equals + 1), value)) {
        return false;
    }
    bias[token] = value;
    return true;
}

void add_asked(CLI::App& app, Asked& asked) {
    app.add_option(
           "--temperature", asked.temperature,
           "0 takes the likeliest token (default: 0; of --chat, this and the next: what the checkpoint recommends)")
        ->type_name("T");
    app.add_option("--top-k", asked.top_k, "only the K likeliest tokens (default: all)")->type_name("K");
    app.add_option("--top-p", asked.top_p, "only the likeliest tokens up to probability P")->type_name("P");
    app.add_option("--repetition-penalty", asked.repetition_penalty, "divides logits of recent tokens (1: none)")
        ->type_name("R");
}

void add_penalties(CLI::App& app, SamplingOptions& sampling) {
    const auto add = [&](const char* flag, double& value, const char* help) {
        return app.add_option(flag, value, help);
    };
    add("--presence-penalty", sampling.presence_penalty, "taken off logits of recent tokens (0: none)")->type_name("A");
    add("--frequency-penalty", sampling.frequency_penalty, "the same, as often as they occurred")->type_name("A");
    app.add_option("--penalty-window", sampling.penalty_window,
                   "how many tokens are recent (default: " + std::to_string(sampling.penalty_window) + ")")
        ->type_name("N");
    app.add_option_function<std::vector<std::string>>(
           "--logit-bias",
           [&](const std::vector<std::string>& given) {
               for (const std::string& text : given) {
                   if (!read_bias(text, sampling.logit_bias)) {
                       throw CLI::ValidationError(
                           "--logit-bias", "'" + text + "' is no bias; give an id and a number such as 1724=-2.5");
                   }
               }
           },
           "added to a token's logit; may be given repeatedly")
        ->allow_extra_args(false)
        ->type_name("ID=VALUE");
}

void add_prompt_flags(CLI::App& app, Arguments& arguments) {
    app.add_option("file", arguments.file, "the .pte, or the folder of its shards")->required()->type_name("");
    auto* text =
        app.add_option("--prompt", arguments.prompt, "text to continue (default: none, only BOS)")->type_name("TEXT");
    auto* file = app.add_option("--prompt-file", arguments.prompt_file,
                                "text to continue, in a file or, for -, from standard input; one line end behind it is "
                                "left out")
                     ->excludes(text)
                     ->type_name("FILE");
    app.add_option("--prompt-ids", arguments.prompt_ids, "token ids in place of a text: 1,15043,3186")
        ->delimiter(',')
        ->allow_extra_args(false)
        ->excludes(text)
        ->excludes(file)
        ->type_name("IDS");
}

}  // namespace

void add_flags(CLI::App& app, Arguments& arguments) {
    add_prompt_flags(app, arguments);
    app.add_option("--max-new-tokens", arguments.generation.max_new_tokens, "default: as many as the context holds")
        ->type_name("N");
    auto& sampling = arguments.generation.sampling;
    add_asked(app, arguments.asked);
    app.add_option("--min-p", sampling.min_p, "only tokens P times as likely as the likeliest, or more")
        ->type_name("P");
    add_penalties(app, sampling);
    app.add_option_function<std::string>(
           "--on-full",
           [&arguments](const std::string& given) { arguments.generation.slides_when_full = given == "slide"; },
           "where the context is used up: end, or forget the older half of the text and go on (default: stop)")
        ->check(CLI::IsMember({"stop", "slide"}));
    app.add_flag_callback(
        "--lookup", [&arguments] { arguments.generation.lookup.emplace(); },
        "guess from what the text repeats: the same, sooner");
    app.add_option("--session", arguments.session, "go on from what is cached in this file, and keep it there again")
        ->type_name("FILE");
    app.add_option_function<std::vector<std::string>>(
           "--stop",
           [&](const std::vector<std::string>& given) {
               for (const std::string& text : given) arguments.generation.stop_strings.push_back(valid_utf8(text));
           },
           "end before this text; may be given repeatedly")
        ->allow_extra_args(false)
        ->type_name("TEXT");
    app.add_option("--seed", arguments.seed, "of the random numbers (default: 0)")->type_name("N");
    app.add_option("--threads", arguments.program.threads, "default: one per core, and one for a small model")
        ->type_name("N");
    app.add_option_function<std::string>(
           "--memory-budget", [&](const std::string& size) { arguments.program.memory_budget = byte_count(size); },
           "what this process may hold, such as 2GB; of a model in shards, those that do not fit are read for each "
           "step "
           "(default: no limit)")
        ->type_name("SIZE");
    app.add_option_function<std::string>(
           "--format", [&](const std::string& format) { arguments.json = format == "json"; },
           "text or json: one object with ids, text and timings (default: text)")
        ->check(CLI::IsMember({"text", "json"}))
        ->type_name("FORMAT");
    app.add_option("--logprobs", arguments.generation.logprobs,
                   "with --format json, each token's log-probability and the K highest")
        ->type_name("K");
    app.add_flag_callback(
        "--no-check", [&] { arguments.program.check = false; }, "skip the checksum, which reads the file through once");
    app.add_flag("--bench", arguments.is_bench, "measure how fast the file runs here, in place of a text");
    app.add_option("--prefill", arguments.bench.prefill, "of --bench: lengths of prompts (default: 128 512 2048)")
        ->type_name("N ...");
    app.add_option("--decode", arguments.bench.decode, "of --bench: positions (default: 16 1000 4000)")
        ->type_name("N ...");
    app.add_flag("--parse-special", arguments.parse_special,
                 "take the text of special tokens in the prompt for tokens");
    auto* chat = app.add_flag("--chat", arguments.is_chat, "talk: a message a line from stdin, in place of a text");
    app.add_option("--system", arguments.system, "of --chat: the system message")->needs(chat)->type_name("TEXT");
    for (const char* other : {"--prompt", "--prompt-file", "--prompt-ids", "--parse-special", "--format", "--logprobs",
                              "--bench", "--session", "--lookup", "--on-full"}) {
        chat->excludes(app.get_option(other));
    }
}

}  // namespace llama_runner
