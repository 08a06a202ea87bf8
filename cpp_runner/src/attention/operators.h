#pragma once

#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>

namespace llama_runner {

constexpr int64_t kMostThreads = 64;

/// Runs tasks on ExecuTorch's threads. Each thread has a part of consecutive tasks, which often read consecutive
/// memory; then it takes tasks of the others, because tasks and cores differ in speed.
inline void over_threads(int64_t count, void (*task)(const void* context, int64_t index), const void* context) {
    struct alignas(64) Part {
        std::atomic<int64_t> next;
        int64_t end;
    };
    const int64_t threads = std::min({count, executorch::extension::get_thread_count(), kMostThreads});
    if (threads <= 1) {
        for (int64_t i = 0; i < count; ++i) task(context, i);
        return;
    }
    std::array<Part, kMostThreads> parts;
    for (int64_t t = 0; t < threads; ++t) {
        parts[static_cast<size_t>(t)].next.store(t * count / threads, std::memory_order_relaxed);
        parts[static_cast<size_t>(t)].end = (t + 1) * count / threads;
    }
    const auto work = [&](int64_t thread, int64_t) {
        for (int64_t t = 0; t < threads; ++t) {
            Part& part = parts[static_cast<size_t>((thread + t) % threads)];
            for (int64_t i = part.next++; i < part.end; i = part.next++) task(context, i);
        }
    };
    if (!executorch::extension::parallel_for(0, threads, 1, work)) work(0, 1);
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
