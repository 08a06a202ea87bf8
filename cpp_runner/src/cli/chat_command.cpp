#include "cli/chat_command.h"

#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <iostream>

#include "llama_runner/conversation.h"
#include "tokenizer/whitespace.h"

namespace llama_runner {

namespace {

constexpr char kHelp[] =
    "/system TEXT  set the system message; without TEXT, remove it\n"
    "/reset        start a new conversation with the same system message\n"
    "/help         list the commands\n"
    "/exit         quit, as Ctrl-D does\n"
    "Ctrl-C ends an answer, and quits at an empty prompt.\n";

volatile std::sig_atomic_t interrupted = 0;

/// While an object of this class exists, Ctrl-C is only recorded, so that a step ends and the session stays usable.
class Interrupts {
  public:
    Interrupts() {
        interrupted = 0;
        struct sigaction note {};
        note.sa_handler = [](int) { interrupted = 1; };
        sigaction(SIGINT, &note, &usual_);
    }
    ~Interrupts() { sigaction(SIGINT, &usual_, nullptr); }
    Interrupts(const Interrupts&) = delete;
    Interrupts& operator=(const Interrupts&) = delete;

  private:
    struct sigaction usual_ {};
};

/// Runs a command line that begins with a slash; returns whether the chat continues. Fails if the command is unknown.
Result<bool> obey(Chat& chat, const std::string& line) {
    const std::string_view whole = stripped(line);
    const std::string name(whole.substr(0, whole.find(' ')));
    const std::string text(stripped(whole.substr(name.size())));
    if (name == "/exit") return false;
    if (name == "/reset") {
        chat.reset();
    } else if (name == "/system") {
        auto instructed = chat.instruct(text.empty() ? std::nullopt : std::optional(text));
        if (!instructed) return instructed.error();
    } else if (name == "/help") {
        std::fputs(kHelp, stderr);
    } else {
        return Error{name + " is unknown; /help lists the commands"};
    }
    return true;
}

/// Prints the answer to a message. Ctrl-C ends the answer.
Result<void> talk(Chat& chat, const std::string& line) {
    if (auto sent = chat.send(line); !sent) return sent;
    const auto context = "the context of " + std::to_string(chat.capacity()) + " tokens is full: ";
    if (const size_t turns = chat.forgotten(); turns > 0) {
        const std::string which = turns == 1 ? "turn was" : std::to_string(turns) + " turns were";
        std::fprintf(stderr, "%sthe oldest %s forgotten\n", context.c_str(), which.c_str());
    }
    FinishReason reason = FinishReason::kNone;
    Result<const Step*> step = nullptr;
    {
        const Interrupts interrupts;
        for (;;) {
            step = chat.next();
            if (!step || *step == nullptr) break;
            std::fwrite((*step)->text.data(), 1, (*step)->text.size(), stdout);
            std::fflush(stdout);
            reason = (*step)->finish_reason;
            if (interrupted != 0) break;
        }
        chat.stop();
    }
    if (!step) return step.error();
    std::puts("");
    std::fflush(stdout);
    if (reason == FinishReason::kLimit && chat.is_full()) {
        std::fprintf(stderr, "%sthe answer ends here\n", context.c_str());
    }
    return {};
}

}  // namespace

Result<void> run_chat(const ChatArguments& arguments) {
    if (auto checked = arguments.generation.check(); !checked) return checked;
    auto program = Program::open(arguments.file, arguments.program);
    if (!program) return program.error();
    Rng rng(arguments.seed);
    GenerationOptions generation = arguments.generation;
    const SamplingOptions& recommended = (*program)->metadata().sampling;
    generation.sampling.temperature = recommended.temperature;
    generation.sampling.top_k = recommended.top_k;
    generation.sampling.top_p = recommended.top_p;
    generation.sampling.repetition_penalty = recommended.repetition_penalty;
    arguments.ask(generation.sampling);
    if (auto checked = generation.check(); !checked) return checked;
    auto chat = Chat::create(**program, generation, rng, arguments.system);
    if (!chat) return chat.error();
    const bool is_terminal = isatty(STDIN_FILENO) != 0;
    for (std::string line;;) {
        if (is_terminal) std::fputs("> ", stdout);
        std::fflush(stdout);
        if (!std::getline(std::cin, line)) break;
        if (line.ends_with('\r')) line.pop_back();
        Result<void> done;
        if (line.starts_with('/')) {
            const auto goes_on = obey(*chat, line);
            if (goes_on && !*goes_on) break;
            if (!goes_on) done = goes_on.error();
        } else if (!stripped(line).empty()) {
            done = talk(*chat, line);
        }
        if (!done) std::fprintf(stderr, "error: %s\n", done.error().message.c_str());
    }
    return {};
}

}  // namespace llama_runner
