#include "llama_runner/position_inputs.h"

#include <algorithm>
#include <array>

namespace llama_runner {

void rope_slices(const RopeTables& tables, int64_t position, int64_t length, float* cos, float* sin) {
    for (int64_t i = 0; i < length; ++i) {
        const int64_t row = std::min(position + i, tables.rows() - 1) * tables.width;
        std::copy_n(tables.cos.data() + row, tables.width, cos + i * tables.width);
        std::copy_n(tables.sin.data() + row, tables.width, sin + i * tables.width);
    }
}

Angles earlier(const RopeTables& tables, int64_t distance) {
    Angles angles;
    for (int64_t i = 0; i < tables.width; ++i) {
        const auto from = static_cast<size_t>(distance * tables.width + i);
        const float factor = tables.cos[static_cast<size_t>(i)];  // because cos(0) is 1
        angles.cos.push_back(tables.cos[from] / factor);
        angles.sin.push_back(-tables.sin[from] / factor);
    }
    return angles;
}

CausalMask::CausalMask(int64_t max_length, int64_t capacity, int64_t window, std::span<const float> slopes)
    : heads_(std::max(std::ssize(slopes), std::ptrdiff_t{1})),
      max_length_(max_length),
      capacity_(capacity),
      plain_(window == 0 && slopes.empty()),
      values_(static_cast<size_t>(heads_ * max_length * (capacity + max_length))) {
    for (int64_t head = 0; head < heads_; ++head) {
        const float slope = slopes.empty() ? 0.0F : slopes[static_cast<size_t>(head)];
        for (int64_t distance = capacity + max_length - 1; distance >= 0; --distance) {
            const bool visible = window == 0 || distance < window;
            lines_.push_back(visible ? 0.0F - slope * static_cast<float>(distance) : kHidden);
        }
    }
    lay_out(max_length);
}

void CausalMask::move(int64_t position, int64_t length) {
    if (length != length_) lay_out(length);
    if (position == position_ || capacity_ == 0) return;
    const auto [from, to] = std::minmax(position_, position);
    const int64_t newer = position < capacity_ ? position : position % capacity_;  // slots with the latest rows
    for (int64_t i = 0; i < heads_ * length; ++i) {
        float* const values = values_.data() + i * (capacity_ + length);
        // Row r sees the cache's rows at distances capacity + r ... 1 + r, a part of its head's line.
        const float* const ordered = line(i / length) + max_length_ - 1 - i % length;
        if (plain_) {
            std::fill_n(values + from, to - from, position == to ? 0.0F : kHidden);
            continue;
        }
        std::copy_n(ordered + capacity_ - newer, newer, values);
        if (position < capacity_) {
            std::fill_n(values + newer, capacity_ - newer, kHidden);
        } else {
            std::copy_n(ordered, capacity_ - newer, values + newer);
        }
    }
    position_ = position;
}

void CausalMask::lay_out(int64_t length) {
    for (int64_t i = 0; i < heads_ * length; ++i) {
        float* const values = values_.data() + i * (capacity_ + length);
        const int64_t row = i % length;
        std::fill_n(values, capacity_ + length, kHidden);
        std::copy_n(line(i / length) + capacity_ + max_length_ - 1 - row, row + 1, values + capacity_);
    }
    position_ = 0;
    length_ = length;
}

Result<const void*> PositionInputs::add(const TensorSpec& spec) {
    const Metadata& metadata = *metadata_;
    const auto is = [&](std::array<int64_t, 3> sizes) { return spec.is(sizes, max_length_, Dtype::kFloat32); };
    const Error wrong{"the shape of the input " + spec.name + " is not what this runner knows; update it"};
    if (spec.name == "start") {
        if (!spec.is(std::array{int64_t{1}}, max_length_, Dtype::kInt64)) return wrong;
        return static_cast<const void*>(start_.get());
    }
    if (spec.name == "positions") {
        if (!spec.is(std::array{int64_t{1}, max_length_}, max_length_, Dtype::kInt64)) return wrong;
        positions_.resize(static_cast<size_t>(max_length_));
        write(0, max_length_);
        return static_cast<const void*>(positions_.data());
    }
    if (spec.name == "cos" || spec.name == "sin") {
        if (!is({1, max_length_, metadata.rope.width})) return wrong;
        cos_.resize(static_cast<size_t>(max_length_ * metadata.rope.width));
        sin_.resize(cos_.size());
        write(0, max_length_);
        return static_cast<const void*>(spec.name == "cos" ? cos_.data() : sin_.data());
    }
    if (spec.name == "mask" || spec.name == "local_mask") {
        const int64_t window = spec.name == "mask" ? 0 : metadata.sliding_window;
        const int64_t most = cached_ ? metadata.max_seq_len : 0;
        const int64_t least = window == 0 ? most : std::min(window, most);  // all positions that a token sees
        const int64_t capacity = spec.shape.size() == 3 ? spec.shape[2] - max_length_ : -1;
        const int64_t heads = std::max(std::ssize(metadata.alibi_slopes), std::ptrdiff_t{1});
        if (capacity < least || capacity > most || !is({heads, max_length_, spec.shape[2]})) return wrong;
        return static_cast<const void*>(
            masks_.emplace_back(max_length_, capacity, window, metadata.alibi_slopes).values());
    }
    return static_cast<const void*>(nullptr);
}

void PositionInputs::move(int64_t position, int64_t length) {
    if (position != position_ || length > length_) write(position, length);
    for (CausalMask& mask : masks_) mask.move(position, length);
}

void PositionInputs::write(int64_t position, int64_t length) {
    *start_ = position;
    for (int64_t i = 0; i < std::min(length, std::ssize(positions_)); ++i) {
        positions_[static_cast<size_t>(i)] = std::min(position + i, metadata_->max_seq_len - 1);
    }
    if (!cos_.empty()) rope_slices(metadata_->rope, position, length, cos_.data(), sin_.data());
    position_ = position;
    length_ = length;
}

}  // namespace llama_runner
