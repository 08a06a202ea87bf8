#pragma once

#include "linear/linear.h"

namespace llama_runner {

/// Products with the matrices of the experts chosen for each token: out[t][i] is the product of expert chosen[t][i] and
/// a row of x. Every result is bitwise that of multiply() in linear.h, and of the experts' matrices only those are read
/// that are chosen for at least one token.
struct ExpertLinear {
    BlockType type;
    int64_t tokens;                   // L
    int64_t choices;                  // k, experts chosen for each token
    int64_t experts;                  // E
    int64_t columns;                  // K, a multiple of block_columns(type)
    int64_t rows;                     // N, of each matrix
    bool shared;                      // whether the k products of a token have the same row of x
    const float* x;                   // [L, K] if shared, otherwise [L, k, K]
    const std::byte* const* weights;  // [E], each as in Linear
    const int64_t* chosen;            // [L, k], each from 0 to E - 1
    float* out;                       // [L, k, N]

    int64_t products() const { return tokens * choices; }
};

/// Returns the number of bytes that multiply() needs.
size_t scratch_bytes(const ExpertLinear& linear);

/// Computes the products, those of one expert together. `scratch` is aligned to 8 bytes.
void multiply(const ExpertLinear& linear, std::byte* scratch, ParallelFor parallel_for,
              IntegerSet set = integer_sets().back());

}  // namespace llama_runner
