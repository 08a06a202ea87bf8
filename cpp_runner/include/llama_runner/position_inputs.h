#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "llama_runner/metadata.h"
#include "llama_runner/result.h"

/// What is worked out before the graph: all that depends on the position.
namespace llama_runner {

/// Added to a hidden score. Finite, so that no row can turn into NaN, and far below any real score.
inline constexpr float kHidden = -1e9F;

/// Writes the rows of cos and sin for `length` tokens that start at `position`: [length, tables.width] each.
///
/// Rows past the table belong to padding, whose results nobody reads; they repeat the last one.
void rope_slices(const RopeTables& tables, int64_t position, int64_t length, float* cos, float* sin);

/// Of one position: [tables.width] each.
struct Angles {
    std::vector<float> cos;
    std::vector<float> sin;
};

/// What turns keys to `distance` positions earlier: angles grow in proportion to the position. Tables may be multiplied
/// by a factor, which keys already have.
Angles earlier(const RopeTables& tables, int64_t distance);

/// The mask of `length` new tokens that start at `position`: [heads, length, capacity + length] float32, added to the
/// scores.
///
/// The first `capacity` columns are the cache's slots, position p in slot p % capacity; the last `length` are the new
/// rows themselves, each of which sees the ones up to itself.
class CausalMask {
  public:
    /// Allocates for lengths up to `max_length`, and lays it out for that and position 0; nothing is allocated later.
    ///
    /// `window` is how many positions a token sees, itself included; 0 for all. `slopes` are what each head takes off
    /// for every position of distance (ALiBi, https://arxiv.org/abs/2108.12409, section 3); empty for one mask for all
    /// heads, which takes off nothing.
    CausalMask(int64_t max_length, int64_t capacity, int64_t window = 0, std::span<const float> slopes = {});

    /// Makes it the mask for this place. Of a plain one only what changed is written. Requires
    /// 1 <= length <= max_length, and that the cache holds all that the first new token sees.
    void move(int64_t position, int64_t length);

    /// [heads, length, capacity + length]; always in the same place.
    const float* values() const { return values_.data(); }

  private:
    void lay_out(int64_t length);

    /// A head's biases, of distances capacity + max_length - 1 ... 0.
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
/// positions [1, L]: their ids, for models that learned an embedding of them; cos, sin [1, L, P]: rotary angles; start
/// [1]: the first one's position, where attention is fused; otherwise mask [1 or H, L, C + L] for blocks that see
/// everything, and local_mask for those that see a window. C, which its spec says, is the slots of the caches that go
/// with it: max_seq_len; at least the window where there is one; 0 without caches.
class PositionInputs {
  public:
    /// `metadata` must outlive it.
    PositionInputs(const Metadata& metadata, int64_t max_length, bool cached)
        : metadata_(&metadata), max_length_(max_length), cached_(cached) {}

    /// Allocates an input for position 0 and returns its place, which stays; null if it is none of these by name.
    /// Fails where its shape is another.
    Result<const void*> add(const TensorSpec& spec);

    /// Makes them those of `length` tokens that start at `position`; rows behind these are any.
    void move(int64_t position, int64_t length);

  private:
    void write(int64_t position, int64_t length);

    const Metadata* metadata_;
    int64_t max_length_;
    bool cached_;
    int64_t position_ = 0;
    int64_t length_ = 0;
    /// On the heap, so that it stays where it is when this is moved.
    std::unique_ptr<int64_t> start_ = std::make_unique<int64_t>(0);
    std::vector<int64_t> positions_;
    std::vector<float> cos_;
    std::vector<float> sin_;
    std::vector<CausalMask> masks_;
};

}  // namespace llama_runner
