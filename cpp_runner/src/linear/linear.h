#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "attention/attention.h"
#include "linear/blocks.h"

namespace llama_runner {

/// A matrix in blocks, multiplied by the rows of x: out[t][n] = sum over columns of weight[n][c] * x[t][c] + bias[n].
///
/// Each 32 numbers of a row of x are rounded to codes of 8 bits: their scale is that of the largest, divided by 127,
/// and a code is the number divided by the scale, to the nearest integer, halves to even. Then, in the order of the
/// blocks,
///
///     sum = sum + (float(dot(code of x, code of weight)) * d + m * float(sum of codes of x)) * scale of x
///
/// where every operation is rounded to float32, dot is that of integers, and m is only in formats that have it. A block
/// of Q6_K has two scales, so that float(dot) * d is a sum of two such products. Therefore results are bitwise equal on
/// every CPU, for any number of threads, and for any number of rows of x.
struct Linear {
    BlockType type;
    int64_t tokens;           // L, rows of x
    int64_t columns;          // K, a multiple of block_columns(type)
    int64_t rows;             // N, of the matrix
    const float* x;           // [L, K]
    const std::byte* weight;  // groups_of(N) * group_bytes(type, K) bytes, see blocks.h
    const float* bias;        // [N], or null
    float* out;               // [L, N]
};

/// Ways to multiply bytes. A CPU that has one has all that stand before it for the same architecture.
enum class IntegerSet : uint8_t { kPortable, kNeon, kNeonDot, kNeonI8mm, kAvx2, kAvx512Vnni, kAmxInt8 };

/// Returns the instruction sets that both this CPU and this build support; the fastest is last.
std::span<const IntegerSet> integer_sets();

/// Returns the number of bytes that multiply() needs for the rounded rows of x.
size_t scratch_bytes(const Linear& linear);

/// Computes products of the same x, whose types may differ. It is rounded once, and threads meet once for all of them.
/// Needs about 10 KB of stack and no heap.
void multiply(std::span<const Linear> linears, std::byte* scratch, ParallelFor parallel_for,
              IntegerSet set = integer_sets().back());

/// Computes a product.
inline void multiply(const Linear& linear, std::byte* scratch, ParallelFor parallel_for,
                     IntegerSet set = integer_sets().back()) {
    multiply(std::span(&linear, 1), scratch, parallel_for, set);
}

/// Reads row `row` of a matrix with K columns: K numbers, each d * code, and then + m in formats that have it.
void read_row(BlockType type, int64_t columns, const std::byte* weight, int64_t row, float* out);

/// How multiply() splits a product into tasks.
struct Split {
    int64_t token_tiles;      // each of up to kTileTokens rows of x
    int64_t groups_per_task;  // groups of rows of the matrix
    int64_t tasks_per_tile;
};

Split split(const Linear& linear);

}  // namespace llama_runner
