#pragma once

#include <cstdint>
#include <vector>

#include "llama_runner/metadata.h"

/// What is worked out before the graph: rotary tables and masks.
namespace llama_runner {

/// Added to a hidden score. Finite, so that no row can turn into NaN, and far below any real score.
inline constexpr float kHidden = -1e9F;

/// Writes the rows of cos and sin for `length` tokens that start at `position`: [length, tables.width] each.
///
/// Rows past the table belong to padding, whose results nobody reads; they repeat the last one.
void rope_slices(const RopeTables& tables, int64_t position, int64_t length, float* cos, float* sin);

/// The mask of `length` new tokens that start at `position`: [length, capacity + length] float32, added to the scores.
///
/// The first `capacity` columns are the cache's slots, of which those before `position` hold something; the last
/// `length` are the new rows themselves, each of which sees the ones up to itself.
class CausalMask {
  public:
    /// Allocates for lengths up to `max_length`; nothing is allocated later.
    CausalMask(int64_t max_length, int64_t capacity);

    /// The mask for this place. Only what changed since the last call is written. Requires 1 <= length <= max_length
    /// and 0 <= position <= capacity.
    const float* at(int64_t position, int64_t length);

  private:
    void lay_out(int64_t length);

    int64_t capacity_;
    int64_t position_ = 0;
    int64_t length_ = 0;
    std::vector<float> values_;
};

}  // namespace llama_runner
