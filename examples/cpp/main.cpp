// Continues a prompt with the C++ library: story tiny.pte "Once upon a time"

#include <llama_runner/generation.h>
#include <llama_runner/program.h>
#include <llama_runner/session.h>

#include <cstdio>

using namespace llama_runner;

static Result<void> tell(const char* path, const char* prompt) {
    auto program = Program::open(path, {});
    if (!program) return program.error();
    auto session = Session::create(**program);
    if (!session) return session.error();
    auto ids = prompt_ids(**program, prompt);
    if (!ids) return ids.error();

    GenerationOptions options;
    options.sampling.temperature = 0.8;
    options.max_new_tokens = 100;
    options.stop_ids = (*program)->metadata().stop_ids;
    Rng rng(7);
    auto generator = Generator::create(*session, *ids, options, rng, (*program)->tokenizer());
    if (!generator) return generator.error();
    while (true) {
        auto step = generator->next();
        if (!step) return step.error();
        if (*step == nullptr) return {};
        std::fputs((*step)->text.c_str(), stdout);
        std::fflush(stdout);
    }
}

int main(int count, char** arguments) {
    if (count != 3) return std::fprintf(stderr, "usage: %s FILE PROMPT\n", arguments[0]), 2;
    if (auto told = tell(arguments[1], arguments[2]); !told) {
        std::fprintf(stderr, "error: %s\n", told.error().message.c_str());
        return 2;
    }
    std::puts("");
}
