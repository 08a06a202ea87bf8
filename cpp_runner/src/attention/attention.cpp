#include "attention/attention.h"

#include <algorithm>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "attention/sets.h"

namespace llama_runner {

namespace {

constexpr int kTileRows = 64;  // query rows for each block of keys
constexpr int kTileKeys = 64;  // keys in a block

// A step with few query rows splits the keys instead: into at most about as many tasks as the largest CPUs have cores,
// into chunks long enough to be worth a thread, and into no more partial results than fit on the stack.
constexpr int64_t kMostTasks = 32;
constexpr int64_t kShortestChunk = 512;
constexpr int64_t kPartialFloats = 1 << 16;

/// A step split into tasks: (sequence and KV head, block of query rows) or (sequence and KV head, chunk of keys). The
/// split depends only on the sizes of the step, not on the number of threads.
struct Work {
    const Attention& attention;
    int64_t blocks;  // number of blocks of query rows
    int64_t chunks;  // number of chunks of keys
    float* partial;  // if chunks > 1: [B * K, chunks, G * L] rows of maximum, sum and Dh unscaled results

    int64_t group() const { return attention.heads / attention.kv_heads; }
    int64_t rows() const { return group() * attention.length; }  // number of query rows of a KV head
    int64_t token(int64_t sequence_head, int64_t row) const {    // index over all sequences
        return sequence_head / attention.kv_heads * attention.length + row / group();
    }
    int64_t head(int64_t sequence_head, int64_t row) const {
        return sequence_head % attention.kv_heads * group() + row % group();
    }
    int64_t tasks() const { return attention.batch * attention.kv_heads * blocks * chunks; }
    float* partial_row(int64_t sequence_head, int64_t chunk, int64_t row) const {
        return partial + ((sequence_head * chunks + chunk) * rows() + row) * (attention.head_dim + 2);
    }
};

/// The functions for one instruction set.
struct Kernel {
    InstructionSet set;
    void (*append)(const Attention& attention, int64_t token);
    void (*attend)(const Work& work, int64_t task);
    void (*merge)(const Work& work, int64_t sequence_head);
    void (*turn)(const Attention& attention, std::byte* row);
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
#define LLAMA_RUNNER_REGISTERS 16
#include "attention/kernel.inc"
#ifdef LLAMA_RUNNER_IS_SMALL
#pragma GCC pop_options
#endif

#if defined(__aarch64__)
#define LLAMA_RUNNER_SET kNeon
#define LLAMA_RUNNER_NEON
#define LLAMA_RUNNER_LANES 4
#define LLAMA_RUNNER_REGISTERS 32
#include "attention/kernel.inc"
#undef LLAMA_RUNNER_NEON
#endif

#if defined(__x86_64__)
LLAMA_RUNNER_BEGIN("avx,avx2,fma,f16c")
#define LLAMA_RUNNER_SET kAvx2
#define LLAMA_RUNNER_AVX2
#define LLAMA_RUNNER_LANES 8
#define LLAMA_RUNNER_REGISTERS 16
#include "attention/kernel.inc"
#undef LLAMA_RUNNER_AVX2
LLAMA_RUNNER_END

LLAMA_RUNNER_BEGIN("avx,avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define LLAMA_RUNNER_SET kAvx512
#define LLAMA_RUNNER_AVX512
#define LLAMA_RUNNER_LANES 16
#define LLAMA_RUNNER_REGISTERS 32
#include "attention/kernel.inc"
#undef LLAMA_RUNNER_AVX512
LLAMA_RUNNER_END
#endif

namespace llama_runner {

namespace {

constexpr Kernel kKernels[] = {
    kPortable::kKernel,
#if defined(__aarch64__)
    kNeon::kKernel,
#elif defined(__x86_64__)
    kAvx2::kKernel,
    kAvx512::kKernel,
#endif
};

bool supports([[maybe_unused]] InstructionSet set) {
#if defined(__x86_64__)
    if (set == InstructionSet::kAvx2) return has_avx2();
    if (set == InstructionSet::kAvx512) return has_avx512();
#endif
    return true;
}

/// Returns the number of chunks into which a step of one block of query rows splits the keys.
int64_t chunks_of(const Attention& attention, int64_t rows) {
    const int64_t sequence_heads = attention.batch * attention.kv_heads;
    int64_t keys = 0;
    for (int64_t b = 0; b < attention.batch; ++b) {
        keys = std::max(keys, std::min(attention.position[b], attention.slots) + attention.length);
    }
    if (attention.window > 0) keys = std::min(keys, attention.window + attention.length);
    const int64_t fit = kPartialFloats / (sequence_heads * rows * (attention.head_dim + 2));
    return std::max(int64_t{1}, std::min({keys / kShortestChunk, kMostTasks / sequence_heads, fit}));
}

}  // namespace

size_t row_bytes(RowForm form, int64_t head_dim) {
    const auto count = static_cast<size_t>(head_dim);
    switch (form) {
        case RowForm::kFloat32:
            return count * sizeof(float);
        case RowForm::kFloat16:
            return count * sizeof(uint16_t);
        case RowForm::kInt8:
            break;
    }
    return count + sizeof(float);
}

/// Returns the number of elements in a row of `bytes` bytes.
static int64_t head_dim_of(RowForm form, size_t bytes) {
    const auto count = static_cast<int64_t>(bytes);
    if (form == RowForm::kInt8) return count - static_cast<int64_t>(sizeof(float));
    return count / static_cast<int64_t>(form == RowForm::kFloat16 ? sizeof(uint16_t) : sizeof(float));
}

std::span<const InstructionSet> instruction_sets() {
    static const SupportedSets found(kKernels, supports);
    return found.sets();
}

void attend(const Attention& attention, ParallelFor parallel_for, InstructionSet set) {
    struct Context {
        const Kernel& kernel;
        const Work& work;
    };
    if (attention.batch == 0 || attention.length == 0) return;
    alignas(64) float partial[kPartialFloats];
    Work work{attention, 0, 1, partial};
    work.blocks = (work.rows() + kTileRows - 1) / kTileRows;
    if (work.blocks == 1) work.chunks = chunks_of(attention, work.rows());
    const Context context{kernel_of(kKernels, set), work};

    // For a few rows, waking a second thread would take longer than converting them.
    const int64_t tokens = attention.batch * attention.length;
    if (tokens * attention.kv_heads * attention.head_dim <= 1 << 14) {
        for (int64_t token = 0; token < tokens; ++token) context.kernel.append(attention, token);
    } else {
        parallel_for(
            tokens,
            [](const void* opaque, int64_t token) {
                const auto& [kernel, whole] = *static_cast<const Context*>(opaque);
                kernel.append(whole.attention, token);
            },
            &context);
    }
    parallel_for(
        work.tasks(),
        [](const void* opaque, int64_t task) {
            const auto& [kernel, whole] = *static_cast<const Context*>(opaque);
            kernel.attend(whole, task);
        },
        &context);
    if (work.chunks > 1) {
        for (int64_t i = 0; i < attention.batch * attention.kv_heads; ++i) context.kernel.merge(work, i);
    }
}

void turn(RowForm form, std::span<const float> cos, std::span<const float> sin, std::span<std::byte> row) {
    Attention attention{};
    attention.form = form;
    attention.head_dim = head_dim_of(form, row.size());
    attention.rope_pairs = static_cast<int64_t>(cos.size());
    attention.cos = cos.data();
    attention.sin = sin.data();
    kernel_of(kKernels, instruction_sets().back()).turn(attention, row.data());
}

}  // namespace llama_runner
