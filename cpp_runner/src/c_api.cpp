#include <algorithm>
#include <string>

#include "llama_runner.h"
#include "llama_runner/generation.h"
#include "llama_runner/program.h"
#include "support/no_throw.h"

struct llama_runner_program {
    std::unique_ptr<llama_runner::Program> program;
};

struct llama_runner_session {
    llama_runner::Program* program;
    llama_runner::Session session;
    llama_runner::Rng rng{0};
    std::optional<llama_runner::Generator> generator;
};

namespace {

using namespace llama_runner;

thread_local std::string last_error;

int fail(const Error& error) {
    last_error = error.message;
    return -1;
}

Error missing(const char* name) { return {std::string(name) + " is null; give a valid one"}; }

}  // namespace

const char* llama_runner_last_error(void) { return last_error.c_str(); }

llama_runner_options llama_runner_default_options(void) { return {0.0, 0, 1.0, 0, 0}; }

llama_runner_program* llama_runner_open(const char* path, int64_t threads, int check) {
    if (path == nullptr) return fail(missing("path")), nullptr;
    Program::Options options{std::nullopt, check != 0};
    if (threads != 0) options.threads = threads;
    auto program = Program::open(path, options);
    if (!program) return fail(program.error()), nullptr;
    return new (std::nothrow) llama_runner_program{*std::move(program)};
}

void llama_runner_close(llama_runner_program* program) { delete program; }

int64_t llama_runner_capacity(const llama_runner_program* program) {
    return program == nullptr ? fail(missing("program")) : program->program->metadata().max_seq_len;
}

int64_t llama_runner_vocab_size(const llama_runner_program* program) {
    return program == nullptr ? fail(missing("program")) : program->program->metadata().vocab_size;
}

int64_t llama_runner_encode(const llama_runner_program* program, const char* text, size_t length, int parse_special,
                            int64_t* ids, size_t room) {
    if (program == nullptr) return fail(missing("program"));
    if (text == nullptr && length > 0) return fail(missing("text"));
    if (ids == nullptr && room > 0) return fail(missing("ids"));
    const auto found = prompt_ids(*program->program, {text, length}, parse_special != 0);
    if (!found) return fail(found.error());
    std::copy_n(found->begin(), std::min(room, found->size()), ids);
    return static_cast<int64_t>(found->size());
}

llama_runner_session* llama_runner_session_new(llama_runner_program* program) {
    if (program == nullptr) return fail(missing("program")), nullptr;
    auto session = Session::create(*program->program);
    if (!session) return fail(session.error()), nullptr;
    return new (std::nothrow) llama_runner_session{program->program.get(), *std::move(session), Rng(0), std::nullopt};
}

void llama_runner_session_free(llama_runner_session* session) { delete session; }

int64_t llama_runner_position(const llama_runner_session* session) {
    return session == nullptr ? fail(missing("session")) : session->session.position();
}

int llama_runner_rewind(llama_runner_session* session, int64_t position) {
    if (session == nullptr) return fail(missing("session"));
    session->generator.reset();
    const auto rewound = session->session.rewind(position);
    return rewound ? 0 : fail(rewound.error());
}

const float* llama_runner_hidden(const llama_runner_session* session, size_t* rows, size_t* width) {
    if (session == nullptr) return fail(missing("session")), nullptr;
    if (rows == nullptr || width == nullptr) return fail(missing("rows or width")), nullptr;
    const auto hidden = session->session.hidden();
    *width = static_cast<size_t>(session->session.hidden_width());
    *rows = *width == 0 ? 0 : hidden.size() / *width;
    return hidden.empty() ? nullptr : hidden.data();
}

int llama_runner_start(llama_runner_session* session, const int64_t* prompt, size_t count,
                       const llama_runner_options* options) {
    if (session == nullptr) return fail(missing("session"));
    if (prompt == nullptr && count > 0) return fail(missing("prompt"));
    const llama_runner_options given = options == nullptr ? llama_runner_default_options() : *options;
    session->generator.reset();
    session->rng = Rng(given.seed);
    const auto started = guarded([&]() -> Result<void> {
        GenerationOptions generation{
            {given.temperature, given.top_k, given.top_p}, std::nullopt, session->program->metadata().stop_ids};
        if (given.max_new_tokens != 0) generation.max_new_tokens = given.max_new_tokens;
        auto generator = Generator::create(session->session, {prompt, count}, std::move(generation), session->rng,
                                           session->program->tokenizer());
        if (!generator) return generator.error();
        session->generator.emplace(*std::move(generator));
        return {};
    });
    return started ? 0 : fail(started.error());
}

int llama_runner_next(llama_runner_session* session, llama_runner_step* step) {
    if (session == nullptr) return fail(missing("session"));
    if (step == nullptr) return fail(missing("step"));
    if (!session->generator) return fail({"no generation has been started; call llama_runner_start first"});
    const auto next = session->generator->next();
    if (!next) return fail(next.error());
    if (*next == nullptr) return 0;
    const FinishReason reason = (*next)->finish_reason;
    *step = {(*next)->token, (*next)->text.c_str(), (*next)->text.size(),
             reason == FinishReason::kNone   ? LLAMA_RUNNER_GOES_ON
             : reason == FinishReason::kStop ? LLAMA_RUNNER_STOP
                                             : LLAMA_RUNNER_LENGTH};
    return 1;
}
