#pragma once

#include <array>
#include <cstddef>
#include <span>

// How a file is compiled for several instruction sets at once, independently of the compiler's flags, and how one of
// them is chosen when it runs.

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

namespace llama_runner {

#if defined(__x86_64__)
/// Whether the CPU has the features of kAvx2.
inline bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

/// Whether the CPU has the features of kAvx512, besides those of kAvx2.
inline bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

/// The instruction sets that the CPU supports, of a table of N kernels. A CPU that has one has all that stand before
/// it.
template <class Set, size_t N>
class SupportedSets {
  public:
    template <class Kernel>
    SupportedSets(const Kernel (&kernels)[N], bool (*supports)(Set)) {
        for (const Kernel& kernel : kernels) {
            if (!supports(kernel.set)) break;
            sets_[count_++] = kernel.set;
        }
    }

    std::span<const Set> sets() const { return {sets_.data(), count_}; }

  private:
    std::array<Set, N> sets_{};
    size_t count_ = 0;
};

/// Returns the kernel of an instruction set; the first if the table does not have it.
template <class Kernel, size_t N, class Set>
const Kernel& kernel_of(const Kernel (&kernels)[N], Set set) {
    for (const Kernel& kernel : kernels) {
        if (kernel.set == set) return kernel;
    }
    return kernels[0];
}

}  // namespace llama_runner
