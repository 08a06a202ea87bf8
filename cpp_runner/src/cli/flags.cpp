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
        throw CLI::ValidationError("--memory-budget", "'" + text + "' is invalid; give a size such as 400MB or 2GiB");
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
    app.add_option("--temperature", asked.temperature,
                   "sampling temperature; 0 takes the most likely token (default: 0; with --chat, the default of this "
                   "and the next three is the checkpoint's recommendation)")
        ->type_name("T");
    app.add_option("--top-k", asked.top_k, "sample from the K most likely tokens (default: all)")->type_name("K");
    app.add_option("--top-p", asked.top_p, "sample from the most likely tokens up to probability P (default: 1)")
        ->type_name("P");
    app.add_option("--repetition-penalty", asked.repetition_penalty,
                   "divisor for logits of recent tokens (default: 1: none)")
        ->type_name("R");
}

void add_penalties(CLI::App& app, SamplingOptions& sampling) {
    const auto add = [&](const char* flag, double& value, const char* help) {
        return app.add_option(flag, value, help);
    };
    add("--presence-penalty", sampling.presence_penalty, "amount subtracted from logits of recent tokens (default: 0)")
        ->type_name("A");
    add("--frequency-penalty", sampling.frequency_penalty,
        "amount subtracted from logits of recent tokens once per occurrence (default: 0)")
        ->type_name("A");
    app.add_option("--penalty-window", sampling.penalty_window,
                   "number of tokens that count as recent (default: " + std::to_string(sampling.penalty_window) + ")")
        ->type_name("N");
    app.add_option_function<std::vector<std::string>>(
           "--logit-bias",
           [&](const std::vector<std::string>& given) {
               for (const std::string& text : given) {
                   if (!read_bias(text, sampling.logit_bias)) {
                       throw CLI::ValidationError(
                           "--logit-bias", "'" + text + "' is invalid; give an id and a number such as 1724=-2.5");
                   }
               }
           },
           "value added to a token's logit; repeatable")
        ->allow_extra_args(false)
        ->type_name("ID=VALUE");
}

void add_prompt_flags(CLI::App& app, Arguments& arguments) {
    app.add_option("file", arguments.file, ".pte file, or folder of shards")->required()->type_name("");
    auto* text =
        app.add_option("--prompt", arguments.prompt, "text to continue (default: none, only BOS)")->type_name("TEXT");
    auto* file =
        app.add_option("--prompt-file", arguments.prompt_file,
                       "file with the text to continue, or - for standard input; one trailing line end is dropped")
            ->excludes(text)
            ->type_name("FILE");
    app.add_option("--prompt-ids", arguments.prompt_ids, "token ids instead of text: 1,15043,3186")
        ->delimiter(',')
        ->allow_extra_args(false)
        ->excludes(text)
        ->excludes(file)
        ->type_name("IDS");
}

void add_program_flags(CLI::App& app, Program::Options& options) {
    app.add_option("--threads", options.threads, "number of threads (default: one per core; one for a small model)")
        ->type_name("N");
    app.add_option_function<std::string>(
           "--memory-budget", [&options](const std::string& size) { options.memory_budget = byte_count(size); },
           "memory that this process may use, such as 2GB; shards that do not fit are read again for each step "
           "(default: no limit)")
        ->type_name("SIZE");
    app.add_flag_callback(
        "--no-check", [&options] { options.check = false; }, "skip the checksum, which reads the whole file once");
}

void add_mode_flags(CLI::App& app, Arguments& arguments) {
    app.add_flag("--bench", arguments.is_bench,
                 "measure the speed of the file on this machine instead of generating text");
    app.add_option("--prefill", arguments.bench.prefill,
                   "with --bench: prompt lengths for prefill (default: 128 512 2048)")
        ->type_name("N ...");
    app.add_option("--decode", arguments.bench.decode, "with --bench: positions for decode (default: 16 1000 4000)")
        ->type_name("N ...");
    auto* chat = app.add_flag("--chat", arguments.is_chat, "chat: answer messages from standard input, one per line");
    app.add_option("--system", arguments.system,
                   "with --chat: system message (default: the chat template's own, if any)")
        ->needs(chat)
        ->type_name("TEXT");
    for (const char* other : {"--prompt", "--prompt-file", "--prompt-ids", "--parse-special", "--format", "--logprobs",
                              "--bench", "--session", "--lookup", "--on-full"}) {
        chat->excludes(app.get_option(other));
    }
}

}  // namespace

void add_flags(CLI::App& app, Arguments& arguments) {
    add_prompt_flags(app, arguments);
    app.add_flag("--parse-special", arguments.parse_special,
                 "read special tokens such as </s> in the prompt as tokens, not as text");
    app.add_option("--max-new-tokens", arguments.generation.max_new_tokens,
                   "maximum number of new tokens (default: what the context has room for)")
        ->type_name("N");
    auto& sampling = arguments.generation.sampling;
    add_asked(app, arguments.asked);
    app.add_option("--min-p", sampling.min_p,
                   "sample from tokens at least P times as likely as the most likely one (default: 0)")
        ->type_name("P");
    add_penalties(app, sampling);
    app.add_option_function<std::string>(
           "--on-full",
           [&arguments](const std::string& given) { arguments.generation.slides_when_full = given == "slide"; },
           "when the context is full: end, or forget the older half of the text and continue (default: stop)")
        ->check(CLI::IsMember({"stop", "slide"}));
    app.add_flag_callback(
        "--lookup", [&arguments] { arguments.generation.lookup.emplace(); }, "speculative decoding from repeated text");
    app.add_option("--session", arguments.session,
                   "load the KV cache from this file if it exists, and save it there at the end")
        ->type_name("FILE");
    app.add_option_function<std::vector<std::string>>(
           "--stop",
           [&](const std::vector<std::string>& given) {
               for (const std::string& text : given) arguments.generation.stop_strings.push_back(valid_utf8(text));
           },
           "end before this text; repeatable")
        ->allow_extra_args(false)
        ->type_name("TEXT");
    app.add_option("--seed", arguments.seed, "random seed (default: 0)")->type_name("N");
    app.add_option_function<std::string>(
           "--format", [&](const std::string& format) { arguments.json = format == "json"; },
           "output format: text or json, one object with ids, text and timings (default: text)")
        ->check(CLI::IsMember({"text", "json"}))
        ->type_name("FORMAT");
    app.add_option("--logprobs", arguments.generation.logprobs,
                   "with --format json: each token's log-probability and the K highest")
        ->type_name("K");
    add_program_flags(app, arguments.program);
    add_mode_flags(app, arguments);
}

}  // namespace llama_runner
