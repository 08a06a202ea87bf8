#pragma once

#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

namespace llama_runner {

/// Runs tasks on ExecuTorch's threads, assigned one at a time, because tasks and cores differ in speed.
inline void over_threads(int64_t count, void (*task)(const void* context, int64_t index), const void* context) {
    const int64_t threads = std::min(count, executorch::extension::get_thread_count());
    std::atomic<int64_t> next = 0;
    const auto work = [&](int64_t, int64_t) {
        for (int64_t i = next++; i < count; i = next++) task(context, i);
    };
    if (threads > 1 && executorch::extension::parallel_for(0, threads, 1, work)) return;
    work(0, 1);
}

/// Registers an operator only once: a process may load its file twice, with the C library and with Python's, and
/// registering twice would abort it. `name` must outlive the program.
inline executorch::runtime::Error register_once(const char* name, executorch::runtime::OpFunction function) {
    for (const executorch::runtime::Kernel& kernel : executorch::runtime::get_registered_kernels()) {
        if (std::strcmp(kernel.name_, name) == 0) return executorch::runtime::Error::Ok;
    }
    const executorch::runtime::Kernel kernel(name, function);
    return executorch::runtime::register_kernels({&kernel, 1});
}

}  // namespace llama_runner
