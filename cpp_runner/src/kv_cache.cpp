#include "llama_runner/kv_cache.h"

#include <cstring>

namespace llama_runner {

namespace {

constexpr size_t kAlignment = 64;

}  // namespace

Result<KVCache> KVCache::create(const MethodSpec& method) {
    KVCache cache;
    for (const TensorSpec& spec : method.inputs) {
        if (!spec.name.starts_with("k_cache.") && !spec.name.starts_with("v_cache.")) continue;
        if (auto added = cache.add(spec); !added) return added.error();
    }
    if (cache.buffers_.empty()) return Error{"method " + method.name + " takes no cache; export the file again"};
    return cache;
}

Result<void> KVCache::add(const TensorSpec& spec) {
    if (spec.shape.size() != 3 || spec.elements(kLength) < 1 || (capacity_ != 0 && spec.shape[1] != capacity_)) {
        return Error{"the shape of " + spec.name + " is not [heads, positions, width]; export the file again"};
    }
    capacity_ = spec.shape[1];
    // calloc leaves fresh pages untouched until they are used, which aligned allocation and memset would not.
    const size_t bytes = static_cast<size_t>(spec.elements(1)) * size_of(spec.dtype);
    std::unique_ptr<void, Free> memory(std::calloc(bytes + kAlignment, 1));
    if (!memory) {
        return Error{"there is no memory for " + std::to_string(bytes >> 20) + " MB of " + spec.name +
                     "; export with a smaller --max-seq-len"};
    }
    void* start = memory.get();
    size_t space = bytes + kAlignment;
    std::align(kAlignment, bytes, start, space);
    buffers_.push_back({spec.name, static_cast<std::byte*>(start), spec.shape[0],
                        static_cast<size_t>(spec.shape[2]) * size_of(spec.dtype)});
    memory_.push_back(std::move(memory));
    return {};
}

size_t KVCache::nbytes() const {
    size_t total = 0;
    for (const Buffer& buffer : buffers_) total += static_cast<size_t>(buffer.heads * capacity_) * buffer.row_bytes;
    return total;
}

Result<int64_t> KVCache::plan(int64_t length) const {
    if (length < 1 || length > capacity_ - position_) {
        return Error{std::to_string(length) + " tokens do not fit behind the " + std::to_string(position_) +
                     " in the cache, which holds " + std::to_string(capacity_) +
                     "; shorten the prompt or export with a larger --max-seq-len"};
    }
    return position_;
}

Result<void> KVCache::commit(std::span<const void* const> rows, int64_t rows_length, int64_t length) {
    const auto start = plan(length);
    if (!start) return start.error();
    for (size_t i = 0; i < buffers_.size(); ++i) {
        const auto& [name, data, heads, row_bytes] = buffers_[i];
        const auto* source = static_cast<const std::byte*>(rows[i]);
        for (int64_t head = 0; head < heads; ++head) {
            std::memcpy(data + static_cast<size_t>(head * capacity_ + *start) * row_bytes,
                        source + static_cast<size_t>(head * rows_length) * row_bytes,
                        static_cast<size_t>(length) * row_bytes);
        }
    }
    position_ += length;
    return {};
}

Result<void> KVCache::rewind(int64_t position) {
    if (position < 0 || position > position_) {
        return Error{"cannot rewind to position " + std::to_string(position) + ": the cache holds positions 0 to " +
                     std::to_string(position_)};
    }
    position_ = position;
    return {};
}

}  // namespace llama_runner
