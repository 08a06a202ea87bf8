/* The C interface of libllama_runner, for JNI, Swift, ctypes and similar.
 *
 * Handles are opaque. A function that fails returns a negative number or a null handle; llama_runner_last_error() then
 * returns the reason. No function prints, throws or exits. A program and its sessions may be used by only one thread at
 * a time. Text is UTF-8 with its length in bytes, and need not end in a zero. */
#ifndef LLAMA_RUNNER_H
#define LLAMA_RUNNER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LLAMA_RUNNER_API __attribute__((visibility("default")))

/* An opened .pte. */
typedef struct llama_runner_program llama_runner_program;

/* One text: its caches, and the generation that extends it. */
typedef struct llama_runner_session llama_runner_session;

typedef struct {
    double temperature;     /* divides the logits; 0 takes the likeliest token */
    int64_t top_k;          /* keeps only the k likeliest tokens; 0 keeps all */
    double top_p;           /* keeps only the likeliest tokens up to probability p; 1 keeps all */
    uint64_t seed;          /* seed of the random numbers */
    int64_t max_new_tokens; /* maximum number of new tokens; 0 for as many as the context holds */
} llama_runner_options;

typedef enum {
    LLAMA_RUNNER_GOES_ON = 0,
    LLAMA_RUNNER_STOP = 1,  /* after a stop token */
    LLAMA_RUNNER_LENGTH = 2 /* max_new_tokens or the context is used up */
} llama_runner_finish_reason;

typedef struct {
    int64_t token;
    const char* text; /* text that the token completes, ending in a zero; owned by the session, until the next call */
    size_t text_length;
    llama_runner_finish_reason finish_reason;
} llama_runner_step;

/* Returns why this thread's latest failed call failed, in one sentence; valid until its next failure. Empty if none has
 * failed. */
LLAMA_RUNNER_API const char* llama_runner_last_error(void);

/* Returns the default options: temperature 0, all tokens, seed 0, as many new tokens as the context holds. */
LLAMA_RUNNER_API llama_runner_options llama_runner_default_options(void);

/* Opens a .pte. `threads`: number of threads, 0 for one per core. `check`: 0 to skip the checksum. Returns null on
 * failure. */
LLAMA_RUNNER_API llama_runner_program* llama_runner_open(const char* path, int64_t threads, int check);

/* Closes a program; its sessions must be freed first. Null is allowed. */
LLAMA_RUNNER_API void llama_runner_close(llama_runner_program* program);

/* Returns the maximum number of tokens of prompt and answer together. */
LLAMA_RUNNER_API int64_t llama_runner_capacity(const llama_runner_program* program);

/* Returns the size of the vocabulary; ids run from 0 to this number - 1. */
LLAMA_RUNNER_API int64_t llama_runner_vocab_size(const llama_runner_program* program);

/* Writes at most `room` ids of a prompt to `ids`, with BOS first if the model has one. The names of special tokens in
 * the text are ordinary text unless `parse_special`. Returns the number of ids, which may be more than `room`, or -1.
 */
LLAMA_RUNNER_API int64_t llama_runner_encode(const llama_runner_program* program, const char* text, size_t length,
                                             int parse_special, int64_t* ids, size_t room);

/* Returns a new session of a program, which must outlive it, or null on failure. */
LLAMA_RUNNER_API llama_runner_session* llama_runner_session_new(llama_runner_program* program);

/* Frees a session. Null is allowed. */
LLAMA_RUNNER_API void llama_runner_session_free(llama_runner_session* session);

/* Returns the number of tokens in the session's text. */
LLAMA_RUNNER_API int64_t llama_runner_position(const llama_runner_session* session);

/* Removes the tokens from `position` on; 0 starts a new text. Returns 0, or -1 on failure. */
LLAMA_RUNNER_API int llama_runner_rewind(llama_runner_session* session, int64_t position);

/* Returns the last block's output for each token of the latest step, normalised: `rows` times `width` floats, owned by
 * the session, until the next step. Null before the first step, and if the program does not return it. */
LLAMA_RUNNER_API const float* llama_runner_hidden(const llama_runner_session* session, size_t* rows, size_t* width);

/* Begins to extend the session's text by a prompt and the tokens generated after it. Returns 0, or -1 on failure. */
LLAMA_RUNNER_API int llama_runner_start(llama_runner_session* session, const int64_t* prompt, size_t count,
                                        const llama_runner_options* options);

/* Runs the next step; the first one runs the prompt. Returns 1 with a step, 0 after the last, or -1 on failure. */
LLAMA_RUNNER_API int llama_runner_next(llama_runner_session* session, llama_runner_step* step);

#ifdef __cplusplus
}
#endif

#endif
