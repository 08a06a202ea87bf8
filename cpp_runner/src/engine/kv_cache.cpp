#include "llama_runner/kv_cache.h"

#include <algorithm>
#include <cstring>

namespace llama_runner {

namespace {

constexpr size_t kAlignment = 64;

}  // namespace

Result<KVCache> KVCache::create(const MethodSpec& method, int64_t capacity) {
    KVCache cache(capacity);
    for (const TensorSpec& spec : method.inputs) {
        if (!spec.is_cache()) continue;
        if (auto added = cache.add(spec); !added) return added.error();
    }
    return cache;
}

Result<void> KVCache::add(const TensorSpec& spec) {
    if (spec.shape.size() != 3 || std::ranges::min(spec.shape) < 1 || spec.shape[1] > capacity_) {
        return Error{"the shape of " + spec.name + " is not [heads, slots, width], with " + std::to_string(capacity_) +
                     " slots at most; export the file again"};
    }
    ring_ = std::min(ring_, spec.shape[1]);
    // Unlike aligned allocation and memset, calloc does not touch new pages before they are used.
    const size_t bytes = static_cast<size_t>(spec.elements(1)) * size_of(spec.dtype);
    std::unique_ptr<void, Free> memory(std::calloc(bytes + kAlignment, 1));
    if (!memory) {
        return Error{"there is no memory for " + std::to_string(bytes >> 20) + " MB of " + spec.name +
                     "; export with a smaller --max-seq-len"};
    }
    void* start = memory.get();
    size_t space = bytes + kAlignment;
    std::align(kAlignment, bytes, start, space);
    buffers_.push_back({spec.name, static_cast<std::byte*>(start), spec.shape[0], spec.shape[1],
                        static_cast<size_t>(spec.shape[2]) * size_of(spec.dtype), spec.dtype});
    memory_.push_back(std::move(memory));
    return {};
}

size_t KVCache::filled_bytes(int64_t position) const {
    size_t total = 0;
    for (const Buffer& buffer : buffers_) {
        total += static_cast<size_t>(buffer.heads * std::min(position, buffer.slots)) * buffer.row_bytes;
    }
    return total;
}

Result<int64_t> KVCache::plan(int64_t length) const {
    if (length < 1 || length > capacity_ - state_.position) {
        return Error{std::to_string(length) + " tokens do not fit after the " + std::to_string(state_.position) +
                     " in the cache, which holds " + std::to_string(capacity_) +
                     "; shorten the prompt or export with a larger --max-seq-len"};
    }
    return state_.position;
}

Result<void> KVCache::commit(std::span<const void* const> rows, int64_t rows_length, int64_t length) {
    const auto start = plan(length);
    if (!start) return start.error();
    const int64_t end = *start + length;
    for (size_t i = 0; i < buffers_.size(); ++i) {
        const auto& [name, data, heads, slots, row_bytes, dtype] = buffers_[i];
        const auto* source = static_cast<const std::byte*>(rows[i]);
        for (int64_t position = std::max(*start, end - slots); position < end;) {
            const int64_t slot = position % slots;
            const int64_t count = std::min(end - position, slots - slot);
            for (int64_t head = 0; head < heads; ++head) {
                std::memcpy(data + static_cast<size_t>(head * slots + slot) * row_bytes,
                            source + static_cast<size_t>(head * rows_length + position - *start) * row_bytes,
                            static_cast<size_t>(count) * row_bytes);
            }
            position += count;
        }
    }
    state_.position = end;
    state_.first = std::max(state_.first, end - ring_);
    return {};
}

Result<void> KVCache::rewind(int64_t position) {
    if (position < 0 || position > state_.position) {
        return Error{"cannot rewind to position " + std::to_string(position) + ": the cache holds positions 0 to " +
                     std::to_string(state_.position)};
    }
    if (position == 0) {
        state_.first = 0;
    } else if (state_.first > std::max(position - ring_ + 1, int64_t{0})) {
        return Error{"cannot rewind to position " + std::to_string(position) + ": the model sees " +
                     std::to_string(ring_) + " positions at a time, and their cache has been overwritten; rewind to " +
                     std::to_string(state_.first + ring_ - 1) + " or later, or to 0"};
    }
    state_.position = position;
    return {};
}

std::vector<KVCache::Filled> KVCache::filled() const {
    std::vector<Filled> result;
    for (const Buffer& buffer : buffers_) {
        const bool wrapped = buffer.slots < capacity_ && state_.first > 0;
        const int64_t count = wrapped ? buffer.slots : std::min(state_.position, buffer.slots);
        result.push_back({buffer.data, buffer.heads, static_cast<size_t>(buffer.slots) * buffer.row_bytes,
                          static_cast<size_t>(count) * buffer.row_bytes});
    }
    return result;
}

std::vector<KVCache::Filled> KVCache::restore(State state) {
    state_ = state;
    return filled();
}

int64_t KVCache::room(int64_t keep) const {
    const int64_t seen = ring_ < capacity_ ? ring_ - 1 : 0;
    return state_.position - keep - seen;
}

void KVCache::slide(int64_t keep, int64_t count,
                    const std::function<void(const Buffer&, std::span<std::byte>)>& moved) {
    const int64_t end = state_.position;
    std::vector<std::byte> before;
    for (const Buffer& buffer : buffers_) {
        const size_t head_bytes = static_cast<size_t>(buffer.slots) * buffer.row_bytes;
        for (int64_t head = 0; head < buffer.heads; ++head) {
            std::byte* const data = buffer.data + static_cast<size_t>(head) * head_bytes;
            before.assign(data, data + head_bytes);  // in a ring, a row may overwrite one that moves later
            const auto offset = [&](int64_t position) {
                return static_cast<size_t>(position % buffer.slots) * buffer.row_bytes;
            };
            for (int64_t from = std::max(keep + count, end - buffer.slots); from < end; ++from) {
                const std::span<std::byte> to(data + offset(from - count), buffer.row_bytes);
                std::memcpy(to.data(), before.data() + offset(from), to.size());
                moved(buffer, to);
            }
        }
    }
    if (state_.first > 0) state_.first = std::max(keep + count, end - ring_) - count;
    state_.position -= count;
}

}  // namespace llama_runner
