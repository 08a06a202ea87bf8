#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "llama_runner/metadata.h"
#include "llama_runner/result.h"

/// The inputs of the graph that depend on the position.
namespace llama_runner {

/// The number added to the score of a masked position: far below any real score, but finite, so that no row becomes
/// NaN.
inline constexpr float kHidden = -1e9F;

/// Writes the rows of cos and sin for `length` tokens that start at `position`: [length, tables.width] each.
///
/// Rows past the table belong to padding, whose results are ignored; they repeat the last row.
void rope_slices(const RopeTables& tables, int64_t position, int64_t length, float* cos, float* sin);

/// The cosines and sines of one position, [tables.width] each.
struct Angles {
    std::vector<float> cos;
    std::vector<float> sin;
};

/// Returns the angles that rotate keys to `distance` positions earlier, which is possible because angles grow in
/// proportion to the position. A factor by which tables are multiplied is divided out, because keys already have it.
Angles earlier(const RopeTables& tables, int64_t distance);

/// The mask of `length` new tokens that start at `position`: [heads, length, capacity + length] float32, added to the
/// scores.
///
/// The first `capacity` columns are the cache's slots, position p in slot p % capacity; the last `length` are the new
/// rows themselves, each of which sees the ones up to itself.
class CausalMask {
  public:
    /// Allocates for lengths up to `max_length`, and writes the mask of that length at position 0; later calls allocate
    /// nothing.
    ///
    /// `window` is the number of positions that a token sees, itself included; 0 for all. `slopes` are the numbers that
    /// each head subtracts for every position of distance (ALiBi, https://arxiv.org/abs/2108.12409, section 3); if it
    /// is empty, there is one mask for all heads, without subtraction.
    CausalMask(int64_t max_length, int64_t capacity, int64_t window = 0, std::span<const float> slopes = {});

    /// Makes this the mask of `length` tokens at `position`. A mask without window and slopes is only changed where
    /// necessary. Requires 1 <= length <= max_length, and that the cache holds all positions that the first new token
    /// sees.
    void move(int64_t position, int64_t length);

    /// The mask, [heads, length, capacity + length]; its address never changes.
    const float* values() const { return values_.data(); }

  private:
    void lay_out(int64_t length);

    /// A head's biases for the distances capacity + max_length - 1 ... 0.
    const float* line(int64_t head) const { return lines_.data() + head * (capacity_ + max_length_); }

    int64_t heads_;
    int64_t max_length_;
    int64_t capacity_;
    bool plain_;
    int64_t position_ = 0;
    int64_t length_ = 0;
    std::vector<float> lines_;
    std::vector<float> values_;
};

/// All inputs of one method that depend on the position, allocated once and moved from step to step.
///
/// positions [1, L]: position ids, for models with learned position embeddings; cos, sin [1, L, P]: rotary angles;
/// start [1]: the position of the first token, if attention is fused; otherwise mask [1 or H, L, C + L] for blocks that
/// see everything, and local_mask for blocks that see a window. C, which the spec sets, is the number of slots of the
/// corresponding caches: max_seq_len; for a window at least the window; 0 without caches.
class PositionInputs {
  public:
    /// Starts without inputs. `metadata` must outlive it.
    PositionInputs(const Metadata& metadata, int64_t max_length, bool cached)
        : metadata_(&metadata), max_length_(max_length), cached_(cached) {}

    /// Allocates an input for position 0 and returns its address, which never changes; null if its name is none of
    /// these. Fails if its shape is wrong.
    Result<const void*> add(const TensorSpec& spec);

    /// Writes the inputs for `length` tokens that start at `position`; later rows are unspecified.
    void move(int64_t position, int64_t length);

  private:
    void write(int64_t position, int64_t length);

    const Metadata* metadata_;
    int64_t max_length_;
    bool cached_;
    int64_t position_ = 0;
    int64_t length_ = 0;
    /// On the heap, so that its address stays the same when this object is moved.
    std::unique_ptr<int64_t> start_ = std::make_unique<int64_t>(0);
    std::vector<int64_t> positions_;
    std::vector<float> cos_;
    std::vector<float> sin_;
    std::vector<CausalMask> masks_;
};

}  // namespace llama_runner
