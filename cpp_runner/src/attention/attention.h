#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace llama_runner {

/// The form in which a cache stores a row of head_dim numbers.
enum class RowForm : uint8_t {
    kFloat32,
    kFloat16,
    kInt8,  // codes, then the row's float32 scale, unaligned
};

constexpr int64_t kMostHeadDim = 256;

size_t row_bytes(RowForm form, int64_t head_dim);

/// One step of causal attention: L new tokens of each of B sequences attend to the cached tokens and to themselves.
///
/// Position p of a sequence is in slot p % slots of its caches, so a cache with fewer slots than the text is a ring.
/// The caches are only read: the caller appends k_rows and v_rows, which have the caches' form. The new tokens attend
/// to each other in that form, too, so that results do not depend on how a prompt is split into steps.
struct Attention {
    int64_t batch;       // B
    int64_t heads;       // H, a multiple of kv_heads
    int64_t kv_heads;    // K
    int64_t head_dim;    // Dh, up to kMostHeadDim
    int64_t length;      // L
    int64_t slots;       // T
    int64_t rope_pairs;  // P: element i is rotated with element i + P; 0: no rotation
    int64_t window;      // number of positions a token sees, itself included; 0: all
    float scale;
    float softcap;  // 0: none
    RowForm form;
    const float* q;            // [B, L, H * Dh]
    const float* k;            // [B, L, K * Dh]
    const float* v;            // [B, L, K * Dh]
    const float* cos;          // [B, L, P], or null: no rotation
    const float* sin;          // [B, L, P]
    const float* slopes;       // ALiBi, [H], or null
    const std::byte* k_cache;  // [B * K, T] rows
    const std::byte* v_cache;  // [B * K, T] rows
    const int64_t* position;   // [B]: number of tokens of each sequence before this step
    float* out;                // [B, L, H * Dh]
    std::byte* k_rows;         // [B * K, L] rows
    std::byte* v_rows;         // [B * K, L] rows
};

/// Runs task(context, i) for each i below count, in any order, on any thread, and returns when all are done.
using ParallelFor = void (*)(int64_t count, void (*task)(const void* context, int64_t index), const void* context);

enum class InstructionSet : uint8_t { kPortable, kNeon, kAvx2, kAvx512 };

/// Returns the instruction sets that both this CPU and this build support; the fastest is last.
std::span<const InstructionSet> instruction_sets();

/// Computes a step. The last bits of the results depend on the instruction set, but not on the number of threads. The
/// new rows are bitwise equal on every CPU. Needs about 600 KB of stack and no heap.
void attend(const Attention& attention, ParallelFor parallel_for, InstructionSet set = instruction_sets().back());

/// Rotates a row in a cache's form, in place, by the angles of P pairs.
void turn(RowForm form, std::span<const float> cos, std::span<const float> sin, std::span<std::byte> row);

}  // namespace llama_runner
