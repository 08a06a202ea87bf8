#pragma once

#include <stddef.h>

/// The C functions of runtime/_operators, which Python calls (runtime/engine/executorch.py).

#pragma GCC visibility push(default)
extern "C" {

/// Measures the bytes a second that `threads` threads together read from memory; see `read_bandwidth`.
double llama_pte_read_bandwidth(int threads);

/// Makes XNNPACK pack each weight once for all methods, which halves the memory and shortens loading. Returns
/// ExecuTorch's error code, 0 for none.
int llama_pte_share_packed_weights();

/// Returns what is wrong with a program, see `malformed`; null for nothing. Valid until the next call of this thread.
const char* llama_pte_malformed(const void* bytes, size_t size);

/// Makes ExecuTorch throw an exception where it would end the process, because a program is not what a kernel expects.
void llama_pte_throw_at_abort();

/// Makes ExecuTorch compute in the calling thread only, or on all its threads again.
void llama_pte_set_threads_off(bool off);
}
#pragma GCC visibility pop
