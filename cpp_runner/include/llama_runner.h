/* The C interface of libllama_runner, for JNI, Swift, ctypes and the like.
 *
 * Handles are opaque. A function that can fail returns a negative number, or leaves a null handle; why is then in
 * llama_runner_last_error(). Nothing prints, throws or exits. One program and its sessions belong to one thread at a
 * time. Text is UTF-8 with its length in bytes, and need not end in a zero. */
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

/* One text in the making: its caches, and the generation that extends it. */
typedef struct llama_runner_session llama_runner_session;

typedef struct {
    double temperature;     /* divides the logits; 0 takes the likeliest token */
    int64_t top_k;          /* only the k likeliest tokens; 0 for all */
    double top_p;           /* only the likeliest tokens up to probability p; 1 for all */
    uint64_t seed;          /* of the random numbers */
    int64_t max_new_tokens; /* 0 for as many as the context holds */
} llama_runner_options;

typedef enum {
    LLAMA_RUNNER_GOES_ON = 0,
    LLAMA_RUNNER_STOP = 1,  /* after a stop token */
    LLAMA_RUNNER_LENGTH = 2 /* max_new_tokens or the context is used up */
} llama_runner_finish_reason;

typedef struct {
    int64_t token;
    const char* text; /* what the token completes, ending in a zero; owned by the session, until the next call */
    size_t text_length;
    llama_runner_finish_reason finish_reason;
} llama_runner_step;

/* Why this thread's latest call failed: one sentence, until its next failure. Empty if none has failed. */
LLAMA_RUNNER_API const char* llama_runner_last_error(void);

/* Greedy, all tokens, seed 0, as long as the context. */
LLAMA_RUNNER_API llama_runner_options llama_runner_default_options(void);

/* Opens a .pte; `threads` 0 for one per core; `check` 0 to skip the checksum. Null on failure. */
LLAMA_RUNNER_API llama_runner_program* llama_runner_open(const char* path, int64_t threads, int check);

/* Closes a program, after its sessions. Null is fine. */
LLAMA_RUNNER_API void llama_runner_close(llama_runner_program* program);

/* How many tokens prompt and answer may have together. */
LLAMA_RUNNER_API int64_t llama_runner_capacity(const llama_runner_program* program);

/* Ids run from 0 to this - 1. */
LLAMA_RUNNER_API int64_t llama_runner_vocab_size(const llama_runner_program* program);

/* Writes the ids of a prompt, BOS first where the model has one, to `ids`, at most `room` of them. The text of special
 * tokens is only text unless `parse_special`. Returns how many ids there are, which may be more than `room`, or -1. */
LLAMA_RUNNER_API int64_t llama_runner_encode(const llama_runner_program* program, const char* text, size_t length,
                                             int parse_special, int64_t* ids, size_t room);

/* A new session over a program, which must outlive it. Null on failure. */
LLAMA_RUNNER_API llama_runner_session* llama_runner_session_new(llama_runner_program* program);

/* Frees a session. Null is fine. */
LLAMA_RUNNER_API void llama_runner_session_free(llama_runner_session* session);

/* How many tokens the session holds. */
LLAMA_RUNNER_API int64_t llama_runner_position(const llama_runner_session* session);

/* Forgets everything from `position` on; 0 starts a new text. Returns 0, or -1. */
LLAMA_RUNNER_API int llama_runner_rewind(llama_runner_session* session, int64_t position);

/* What the model's last block returned for each token of the latest step, normalised: `rows` times `width` floats,
 * owned by the session, until the next step. Null before the first, and where the program does not return it. */
LLAMA_RUNNER_API const float* llama_runner_hidden(const llama_runner_session* session, size_t* rows, size_t* width);

/* Begins to extend the session's text by a prompt and what follows it. Returns 0, or -1. */
LLAMA_RUNNER_API int llama_runner_start(llama_runner_session* session, const int64_t* prompt, size_t count,
                                        const llama_runner_options* options);

/* Runs the next step; the first runs the prompt. Returns 1 with a step, 0 after the last, or -1. */
LLAMA_RUNNER_API int llama_runner_next(llama_runner_session* session, llama_runner_step* step);

#ifdef __cplusplus
}
#endif

#endif
