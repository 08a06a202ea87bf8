#pragma once

/// The C functions of runtime/_operators, which Python calls (runtime/engine/executorch.py).

#pragma GCC visibility push(default)
extern "C" {

/// Measures the bytes a second that `threads` threads together read from memory; see `read_bandwidth`.
double llama_pte_read_bandwidth(int threads);

/// Makes XNNPACK pack each weight once for all methods, which halves the memory and shortens loading. Returns
/// ExecuTorch's error code, 0 for none.
int llama_pte_share_packed_weights();

/// Makes ExecuTorch compute in the calling thread only, or on all its threads again.
void llama_pte_set_threads_off(bool off);
}
#pragma GCC visibility pop
