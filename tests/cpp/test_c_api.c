/* The C interface, from C. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "llama_runner.h"

static void check(int condition, const char* what) {
    if (condition) return;
    fprintf(stderr, "failed: %s (last error: %s)\n", what, llama_runner_last_error());
    exit(1);
}

/* Runs a generation to its end and returns how many tokens it gave. */
static int run(llama_runner_session* session, const int64_t* ids, size_t count, const llama_runner_options* options,
               char* text) {
    llama_runner_step step;
    int tokens = 0;
    int status = llama_runner_start(session, ids, count, options);
    check(status == 0, "start");
    text[0] = '\0';
    while ((status = llama_runner_next(session, &step)) == 1) {
        ++tokens;
        check(strlen(step.text) == step.text_length, "text ends in a zero");
        strcat(text, step.text);
    }
    check(status == 0, "generation ends");
    check(step.finish_reason != LLAMA_RUNNER_GOES_ON, "the last step says why");
    check(llama_runner_next(session, &step) == 0, "nothing follows");
    return tokens;
}

int main(int count, char** arguments) {
    const char* const path = count > 1 ? arguments[1] : "";
    static const char prompt[] = "Once upon a time";
    int64_t ids[64];
    char first[4096];
    char second[4096];

    check(llama_runner_open("nowhere.pte", 0, 1) == NULL, "a missing file is refused");
    check(strstr(llama_runner_last_error(), "nowhere.pte does not exist") != NULL, "the error names the file");
    check(llama_runner_open(NULL, 0, 1) == NULL, "no path is refused");

    llama_runner_program* const program = llama_runner_open(path, 1, 1);
    check(program != NULL, "open");
    check(llama_runner_capacity(program) > 0 && llama_runner_vocab_size(program) > 0, "dimensions");
    const int64_t length = llama_runner_encode(program, prompt, strlen(prompt), 0, ids, 64);
    check(length > 1 && length <= 64, "encode");
    check(llama_runner_encode(program, prompt, strlen(prompt), 0, NULL, 0) == length, "encode only counts");

    llama_runner_session* const session = llama_runner_session_new(program);
    check(session != NULL, "session");
    llama_runner_step step;
    check(llama_runner_next(session, &step) == -1, "next before start is refused");

    llama_runner_options options = llama_runner_default_options();
    options.max_new_tokens = 20;
    check(run(session, ids, (size_t)length, &options, first) == 20, "twenty tokens");
    check(llama_runner_position(session) == length + 19, "position");
    size_t rows = 1;
    size_t width = 1;
    check(llama_runner_hidden(session, &rows, &width) == NULL && rows == 0 && width == 0, "no hidden states");
    check(llama_runner_hidden(session, NULL, NULL) == NULL, "nowhere to say how many is refused");
    check(llama_runner_rewind(session, 1000000) == -1, "rewinding forward is refused");
    check(llama_runner_rewind(session, 0) == 0, "rewind");
    check(run(session, ids, (size_t)length, &options, second) == 20, "again");
    check(strcmp(first, second) == 0, "the same text");

    options.temperature = -1;
    check(llama_runner_start(session, ids, (size_t)length, &options) == -1, "a bad temperature is refused");
    const int64_t unknown = -5;
    check(llama_runner_start(session, &unknown, 1, NULL) == 0 && llama_runner_next(session, &step) == -1,
          "a bad id is refused");
    check(llama_runner_start(NULL, ids, 1, NULL) == -1, "no session is refused");

    llama_runner_session_free(session);
    llama_runner_session_free(NULL);
    llama_runner_close(program);
    llama_runner_close(NULL);
    return 0;
}
