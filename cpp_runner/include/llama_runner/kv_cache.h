#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "llama_runner/metadata.h"
#include "llama_runner/result.h"

namespace llama_runner {

/// The keys and values of one session for `capacity` positions, allocated once.
///
/// Position p is stored in slot p % slots of a buffer. A block with sliding-window attention has fewer slots than
/// `capacity`, so its buffer is a ring of the latest rows.
///
/// A step has three parts: `plan` checks that the new rows fit, the graph reads the buffers in place, and `commit`
/// writes the rows that the graph returned. The graph ignores rows from `position` on.
class KVCache {
  public:
    /// One of the graph's inputs: k_cache.0 ... v_cache.n, [heads, slots, row_bytes], 64-byte aligned, owned by the
    /// cache. attention.h defines the form of a row.
    struct Buffer {
        std::string name;
        std::byte* data;
        int64_t heads;
        int64_t slots;
        size_t row_bytes;
        Dtype dtype;

        /// Number of elements in a row.
        int64_t width() const { return static_cast<int64_t>(row_bytes / size_of(dtype)); }
    };

    /// Allocates the buffers that `method` takes, all zero. Fails if one has no or too many slots, or if memory is
    /// short.
    static Result<KVCache> create(const MethodSpec& method, int64_t capacity);

    /// The buffers; none if the method takes no cache.
    std::span<const Buffer> buffers() const { return buffers_; }

    /// Maximum number of positions in a text.
    int64_t capacity() const { return capacity_; }

    /// Number of positions filled so far.
    int64_t position() const { return state_.position; }

    /// Returns the bytes of the rows of a text of `position` tokens, which a step reads.
    size_t filled_bytes(int64_t position) const;

    /// Returns the position at which `length` new rows would start; fails if they do not fit.
    Result<int64_t> plan(int64_t length) const;

    /// Appends the first `length` of `rows_length` rows; the other rows are padding.
    ///
    /// `rows[i]` belongs to `buffers()[i]`: [heads, rows_length, row_bytes].
    Result<void> commit(std::span<const void* const> rows, int64_t rows_length, int64_t length);

    /// The state of the cache beside its buffers.
    struct State {
        int64_t position = 0;
        /// The earliest position that the rings still hold.
        int64_t first = 0;
    };

    /// The part of a buffer that a text may have written: the first `head_bytes` of each head.
    struct Filled {
        std::byte* data;
        int64_t heads;
        size_t stride;
        size_t head_bytes;

        std::span<std::byte> of(int64_t head) const { return {data + static_cast<size_t>(head) * stride, head_bytes}; }
    };

    State state() const { return state_; }

    /// Returns the filled part of each buffer.
    std::vector<Filled> filled() const;

    /// Sets the state of another cache, and returns the parts of the buffers that the caller must fill.
    std::vector<Filled> restore(State state);

    /// Returns the maximum number of positions after the first `keep` that `slide` can remove. It is less than 1 if the
    /// window would then reach back to the first positions, which a ring no longer holds.
    int64_t room(int64_t keep) const;

    /// Removes `count` positions, at most `room(keep)`, after the first `keep`, and moves the later rows forward into
    /// their place. `moved` is called with each row in its new place, to adapt it to its new position.
    void slide(int64_t keep, int64_t count, const std::function<void(const Buffer&, std::span<std::byte>)>& moved);

    /// Removes everything from `position` on; fails if that is outside [0, position()], or if a ring no longer holds
    /// the window before it.
    Result<void> rewind(int64_t position);

  private:
    explicit KVCache(int64_t capacity) : capacity_(capacity), ring_(capacity) {}

    struct Free {
        void operator()(void* memory) const { std::free(memory); }
    };

    Result<void> add(const TensorSpec& spec);

    std::vector<Buffer> buffers_;
    std::vector<std::unique_ptr<void, Free>> memory_;
    int64_t capacity_;
    State state_;
    /// Number of slots of the shortest buffer.
    int64_t ring_;
};

}  // namespace llama_runner
