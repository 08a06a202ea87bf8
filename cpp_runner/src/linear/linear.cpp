#include "linear/linear.h"

#include <algorithm>
#include <array>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#include <sys/auxv.h>
#endif

#include "attention/sets.h"

namespace llama_runner {

namespace {

constexpr int64_t kTileTokens = 64;  // rows of x of a task
constexpr int64_t kTasks = 128;      // at least, if there are as many groups of rows
constexpr int64_t kMostGroups = 8;   // in a task
constexpr int64_t kRoundTokens = 8;  // rows of x that a task rounds

// The rounded rows of x, for each block: 32 codes, the scale, and two numbers that depend on the sums of the codes.
constexpr int64_t kRoundedBytes = kBlockColumns + 4 + 8;

struct Work {
    const Linear& linear;
    std::byte* scratch;
    Split split;

    int64_t blocks() const { return linear.columns / kBlockColumns; }
    std::byte* rounded(int64_t token) const { return scratch + token * blocks() * kRoundedBytes; }
};

/// The functions for one instruction set.
struct Kernel {
    IntegerSet set;
    void (*round)(const Work& work, int64_t tile);  // tile: of kRoundTokens rows of x
    void (*multiply)(const Work& work, int64_t task);
};

}  // namespace

}  // namespace llama_runner

// kernel.inc is compiled once for each instruction set in this file, independently of the compiler's flags.

#if defined(__GNUC__) && !defined(__clang__) && (defined(__x86_64__) || defined(__aarch64__))
#pragma GCC push_options
#pragma GCC optimize("Os")  // small, because it hardly ever runs if there is another instruction set
#define LLAMA_RUNNER_IS_SMALL
#endif
#define LLAMA_RUNNER_SET kPortable
#define LLAMA_RUNNER_LANES 4
#define LLAMA_RUNNER_REGISTERS 4  // one row of x at once, for the same reason
#include "linear/kernel.inc"
#ifdef LLAMA_RUNNER_IS_SMALL
#pragma GCC pop_options
#endif

#if defined(__aarch64__)
#define LLAMA_RUNNER_NEON
#define LLAMA_RUNNER_SET kNeon
#define LLAMA_RUNNER_LANES 4
#define LLAMA_RUNNER_REGISTERS 32
#include "linear/kernel.inc"

LLAMA_RUNNER_BEGIN("arch=armv8.2-a+dotprod")
#define LLAMA_RUNNER_DOT
#define LLAMA_RUNNER_SET kNeonDot
#define LLAMA_RUNNER_LANES 4
#define LLAMA_RUNNER_REGISTERS 32
#include "linear/kernel.inc"
#undef LLAMA_RUNNER_DOT
LLAMA_RUNNER_END
#undef LLAMA_RUNNER_NEON
#endif

#if defined(__x86_64__)
LLAMA_RUNNER_BEGIN("avx,avx2,fma,f16c")
#define LLAMA_RUNNER_SET kAvx2
#define LLAMA_RUNNER_AVX2
#define LLAMA_RUNNER_LANES 8
#define LLAMA_RUNNER_REGISTERS 16
#include "linear/kernel.inc"
#undef LLAMA_RUNNER_AVX2
LLAMA_RUNNER_END

LLAMA_RUNNER_BEGIN("avx,avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#define LLAMA_RUNNER_SET kAvx512Vnni
#define LLAMA_RUNNER_AVX512
#define LLAMA_RUNNER_LANES 16
#define LLAMA_RUNNER_REGISTERS 32
#include "linear/kernel.inc"
#undef LLAMA_RUNNER_AVX512
LLAMA_RUNNER_END
#endif

namespace llama_runner {

namespace {

constexpr Kernel kKernels[] = {
    kPortable::kKernel,
#if defined(__aarch64__)
    kNeon::kKernel,
    kNeonDot::kKernel,
#elif defined(__x86_64__)
    kAvx2::kKernel,
    kAvx512Vnni::kKernel,
#endif
};

using RowReader = void (*)(int64_t columns, const std::byte* group, int row, float* out);

template <int... I>
constexpr std::array<RowReader, sizeof...(I)> row_readers(std::integer_sequence<int, I...>) {
    return {kPortable::read_row_of<static_cast<BlockType>(I)>...};
}

/// Reads a row, for each type. One instruction set is enough for the few rows that an embedding reads.
constexpr auto kRowReaders = row_readers(std::make_integer_sequence<int, static_cast<int>(kBlockForms.size())>());

bool supports([[maybe_unused]] IntegerSet set) {
#if defined(__x86_64__)
    if (set == IntegerSet::kAvx2) return has_avx2();
    if (set == IntegerSet::kAvx512Vnni) return has_avx512() && __builtin_cpu_supports("avx512vnni");
#elif defined(__aarch64__)
    if (set == IntegerSet::kNeonDot) return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#endif
    return true;
}

}  // namespace

std::span<const IntegerSet> integer_sets() {
    static const SupportedSets found(kKernels, supports);
    return found.sets();
}

size_t scratch_bytes(const Linear& linear) {
    return static_cast<size_t>(linear.tokens * (linear.columns / kBlockColumns) * kRoundedBytes);
}

Split split(const Linear& linear) {
    const int64_t groups = groups_of(linear.rows);
    Split split{};
    split.token_tiles = (linear.tokens + kTileTokens - 1) / kTileTokens;
    split.groups_per_task = std::clamp(groups * split.token_tiles / kTasks, int64_t{1}, kMostGroups);
    split.tasks_per_tile = (groups + split.groups_per_task - 1) / split.groups_per_task;
    return split;
}

void multiply(const Linear& linear, std::byte* scratch, ParallelFor parallel_for, IntegerSet set) {
    struct Context {
        const Kernel& kernel;
        const Work& work;
    };
    if (linear.tokens == 0) return;
    const Work work{linear, scratch, split(linear)};
    const Context context{kernel_of(kKernels, set), work};

    // For a few rows, waking a second thread would take longer than rounding them.
    const int64_t tiles = (linear.tokens + kRoundTokens - 1) / kRoundTokens;
    if (tiles == 1) {
        context.kernel.round(work, 0);
    } else {
        parallel_for(
            tiles,
            [](const void* opaque, int64_t tile) {
                const auto& [kernel, whole] = *static_cast<const Context*>(opaque);
                kernel.round(whole, tile);
            },
            &context);
    }
    parallel_for(
        work.split.token_tiles * work.split.tasks_per_tile,
        [](const void* opaque, int64_t task) {
            const auto& [kernel, whole] = *static_cast<const Context*>(opaque);
            kernel.multiply(whole, task);
        },
        &context);
}

void read_row(BlockType type, int64_t columns, const std::byte* weight, int64_t row, float* out) {
    const std::byte* group = weight + static_cast<size_t>(row / kGroupRows) * group_bytes(type, columns);
    kRowReaders[static_cast<size_t>(type)](columns, group, static_cast<int>(row % kGroupRows), out);
}

}  // namespace llama_runner
