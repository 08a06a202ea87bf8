#include "linear/linear.h"

#include <algorithm>
#include <array>
#include <utility>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#include <sys/auxv.h>
#endif

#include "attention/sets.h"

namespace llama_runner {

namespace {

constexpr int64_t kTileTokens = 64;   // rows of x of a task
constexpr int64_t kTasks = 128;       // at least, if there are as many groups of rows
constexpr int64_t kMostGroups = 8;    // in a task
constexpr int64_t kRoundTokens = 16;  // rows of x that a task rounds

// Products of fewer bytes of weights, for each row of x, are computed sooner by one thread than a second one wakes up.
constexpr size_t kAlone = size_t{1} << 17;

// The rounded rows of x, for each block: 32 codes, the scale, their sum as float32, and minus the sums of all codes and
// of the first 16 as int32.
constexpr int64_t kRoundedBytes = kBlockColumns + 16;

/// Rows of x, and where they are rounded to.
struct Rounding {
    const float* x;
    int64_t tokens;
    int64_t columns;
    std::byte* scratch;

    int64_t blocks() const { return columns / kBlockColumns; }
    std::byte* rounded(int64_t token) const { return scratch + token * blocks() * kRoundedBytes; }
};

/// Groups of rows of a matrix, and rows of x by which they are multiplied.
struct Task {
    const Linear& linear;
    const Rounding& rounding;
    int64_t group;
    int64_t end;  // after the last group
    int64_t token;
    int count;  // of rows of x
};

using BlockTypes = std::make_integer_sequence<int, static_cast<int>(kBlockForms.size())>;

/// One of each type. An array of the standard library would not do, see vector.inc.
template <class T>
struct ByType {
    T of[kBlockForms.size()];
};

using Functions = ByType<void (*)(const Task& task)>;

/// The functions for one instruction set.
struct Kernel {
    IntegerSet set;
    void (*round)(const Rounding& rounding, int64_t tile);  // tile: of kRoundTokens rows of x
    void (*multiply)(const Task& task);
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
LLAMA_RUNNER_END

LLAMA_RUNNER_BEGIN("arch=armv8.2-a+dotprod+i8mm")
#define LLAMA_RUNNER_I8MM
#define LLAMA_RUNNER_SET kNeonI8mm
#define LLAMA_RUNNER_LANES 4
#define LLAMA_RUNNER_REGISTERS 32
#include "linear/kernel.inc"
#undef LLAMA_RUNNER_I8MM
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

LLAMA_RUNNER_BEGIN("avx,avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8")
#include "linear/amx.inc"
LLAMA_RUNNER_END
#endif

namespace llama_runner {

namespace {

constexpr Kernel kKernels[] = {
    kPortable::kKernel,
#if defined(__aarch64__)
    kNeon::kKernel,
    kNeonDot::kKernel,
    kNeonI8mm::kKernel,
#elif defined(__x86_64__)
    kAvx2::kKernel,
    kAvx512Vnni::kKernel,
    kAvx512Vnni::kTileKernel,
#endif
};

using RowReader = void (*)(int64_t columns, const std::byte* group, int row, float* out);

template <int... I>
constexpr std::array<RowReader, sizeof...(I)> row_readers(std::integer_sequence<int, I...>) {
    return {kPortable::read_row_of<static_cast<BlockType>(I)>...};
}

/// Reads a row, for each type. One instruction set is enough for the few rows that an embedding reads.
constexpr auto kRowReaders = row_readers(BlockTypes());

#if defined(__x86_64__)
/// Whether the CPU has tiles of bytes. If so, asks Linux for the memory that they need when it switches between
/// threads, for all threads of this process.
bool may_use_tiles() {
#if defined(__linux__)
    constexpr unsigned kTilesOfBytes = 3U << 24;  // AMX-TILE and AMX-INT8
    constexpr int kRequestPermission = 0x1023;    // ARCH_REQ_XCOMP_PERM
    constexpr int kTileData = 18;                 // XFEATURE_XTILEDATA
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kTilesOfBytes) == kTilesOfBytes &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
#endif

bool supports([[maybe_unused]] IntegerSet set) {
#if defined(__x86_64__)
    if (set == IntegerSet::kAvx2) return has_avx2();
    if (set == IntegerSet::kAvx512Vnni) return has_avx512() && __builtin_cpu_supports("avx512vnni");
    if (set == IntegerSet::kAmxInt8) return may_use_tiles();
#elif defined(__aarch64__)
    if (set == IntegerSet::kNeonDot) return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
    if (set == IntegerSet::kNeonI8mm) return (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0;
#endif
    return true;
}

void in_order(int64_t count, void (*task)(const void* context, int64_t index), const void* context) {
    for (int64_t i = 0; i < count; ++i) task(context, i);
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

void multiply(std::span<const Linear> linears, std::byte* scratch, ParallelFor parallel_for, IntegerSet set) {
    struct Context {
        const Kernel& kernel;
        const Rounding& rounding;
        std::span<const Linear> linears;
        int64_t tasks_per_tile;

        void run(int64_t task) const {
            const int64_t token = task / tasks_per_tile * kTileTokens;
            const auto count = static_cast<int>(std::min(rounding.tokens - token, kTileTokens));
            task %= tasks_per_tile;
            for (const Linear& linear : linears) {
                const auto [tiles, groups, tasks] = split(linear);
                if (task < tasks) {
                    const int64_t group = task * groups;
                    const int64_t end = std::min(group + groups, groups_of(linear.rows));
                    return kernel.multiply({linear, rounding, group, end, token, count});
                }
                task -= tasks;
            }
        }
    };
    const int64_t tokens = linears[0].tokens;
    if (tokens == 0) return;
    const Rounding rounding{linears[0].x, tokens, linears[0].columns, scratch};
    Context context{kernel_of(kKernels, set), rounding, linears, 0};
    size_t bytes = 0;
    for (const Linear& linear : linears) {
        context.tasks_per_tile += split(linear).tasks_per_tile;
        bytes += static_cast<size_t>(groups_of(linear.rows)) * group_bytes(linear.type, linear.columns);
    }
    const int64_t roundings = (tokens + kRoundTokens - 1) / kRoundTokens;
    const ParallelFor run = bytes * static_cast<size_t>(tokens) < kAlone ? in_order : parallel_for;
    (roundings == 1 ? in_order : run)(
        roundings,
        [](const void* opaque, int64_t tile) {
            const auto& whole = *static_cast<const Context*>(opaque);
            whole.kernel.round(whole.rounding, tile);
        },
        &context);
    run((tokens + kTileTokens - 1) / kTileTokens * context.tasks_per_tile,
        [](const void* opaque, int64_t task) { static_cast<const Context*>(opaque)->run(task); }, &context);
}

void read_row(BlockType type, int64_t columns, const std::byte* weight, int64_t row, float* out) {
    const std::byte* group = weight + static_cast<size_t>(row / kGroupRows) * group_bytes(type, columns);
    kRowReaders[static_cast<size_t>(type)](columns, group, static_cast<int>(row % kGroupRows), out);
}

}  // namespace llama_runner
