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

/// One session's keys and values for `capacity` positions, allocated once; its bookkeeping is integers.
///
/// A position p lies in slot p % slots of a buffer. One with fewer slots than `capacity`, of a block that sees only a
/// window, is thereby a ring of the latest rows.
///
/// A step is planned, run and committed: `plan` answers whether the new rows fit, the graph reads the buffers in place,
/// and `commit` writes the rows that it returned. Rows past `position` weigh nothing: the graph does not look at them.
class KVCache {
  public:
    /// One of the graph's inputs: k_cache.0 ... v_cache.n, [heads, slots, row_bytes], 64-byte aligned, owned by the
    /// cache. What a row looks like is known to the operator that reads it, see attention.h.
    struct Buffer {
        std::string name;
        std::byte* data;
        int64_t heads;
        int64_t slots;
        size_t row_bytes;
        Dtype dtype;

        /// Elements of a row.
        int64_t width() const { return static_cast<int64_t>(row_bytes / size_of(dtype)); }
    };

    /// Allocates the buffers that `method` takes, all zero. Fails where one has no or too many slots or memory is
    /// short.
    static Result<KVCache> create(const MethodSpec& method, int64_t capacity);

    /// None where the method takes no cache.
    std::span<const Buffer> buffers() const { return buffers_; }

    /// Positions that a text may have.
    int64_t capacity() const { return capacity_; }

    /// Positions filled so far.
    int64_t position() const { return state_.position; }

    /// Bytes of the rows of a text of `position` tokens: what a step reads there.
    size_t filled_bytes(int64_t position) const;

    /// The position at which `length` new rows would start; fails if they do not fit.
    Result<int64_t> plan(int64_t length) const;

    /// Appends the first `length` of `rows_length` rows; what follows them is padding.
    ///
    /// `rows[i]` belongs to `buffers()[i]`: [heads, rows_length, row_bytes].
    Result<void> commit(std::span<const void* const> rows, int64_t rows_length, int64_t length);

    /// What says, with the buffers, what is cached.
    struct State {
        int64_t position = 0;
        /// The earliest position that a ring still holds.
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

    /// Of each buffer.
    std::vector<Filled> filled() const;

    /// Takes another cache's state over, and returns what it fills, which is to be written.
    std::vector<Filled> restore(State state);

    /// How many positions behind the first `keep` can be taken out by `slide`; fewer than 1 where a ring, which no
    /// longer holds the first, would see them then.
    int64_t room(int64_t keep) const;

    /// Takes out `count` positions, at most `room(keep)`, behind the first `keep`: what follows them moves to earlier
    /// ones. `moved` is given each row in its new place.
    void slide(int64_t keep, int64_t count, const std::function<void(const Buffer&, std::span<std::byte>)>& moved);

    /// Forgets everything from `position` on; fails if it is outside [0, position()], or a ring no longer holds what is
    /// seen from there.
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
    /// Slots of the shortest buffer.
    int64_t ring_;
};

}  // namespace llama_runner
