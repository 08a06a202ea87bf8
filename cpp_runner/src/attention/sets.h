#pragma once

// How a file is compiled for several instruction sets at once, independently of the compiler's flags.

#define LLAMA_RUNNER_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define LLAMA_RUNNER_UNROLL LLAMA_RUNNER_PRAGMA(clang loop unroll(full))
#define LLAMA_RUNNER_BEGIN(features) \
    LLAMA_RUNNER_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define LLAMA_RUNNER_END LLAMA_RUNNER_PRAGMA(clang attribute pop)
#else
#define LLAMA_RUNNER_UNROLL LLAMA_RUNNER_PRAGMA(GCC unroll 16)
#define LLAMA_RUNNER_BEGIN(features) LLAMA_RUNNER_PRAGMA(GCC push_options) LLAMA_RUNNER_PRAGMA(GCC target(features))
#define LLAMA_RUNNER_END LLAMA_RUNNER_PRAGMA(GCC pop_options)
#endif
