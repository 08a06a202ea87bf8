#include "llama_runner/preproc.h"

#include <algorithm>

namespace llama_runner {

void rope_slices(const RopeTables& tables, int64_t position, int64_t length, float* cos, float* sin) {
    for (int64_t i = 0; i < length; ++i) {
        const int64_t row = std::min(position + i, tables.rows() - 1) * tables.width;
        std::copy_n(tables.cos.data() + row, tables.width, cos + i * tables.width);
        std::copy_n(tables.sin.data() + row, tables.width, sin + i * tables.width);
    }
}

CausalMask::CausalMask(int64_t max_length, int64_t capacity)
    : capacity_(capacity), values_(static_cast<size_t>(max_length * (capacity + max_length))) {}

const float* CausalMask::at(int64_t position, int64_t length) {
    if (length != length_) lay_out(length);
    const auto [from, to] = std::minmax(position_, position);
    const float value = position > position_ ? 0.0F : kHidden;
    for (int64_t row = 0; row < length; ++row) {
        std::fill_n(values_.data() + row * (capacity_ + length) + from, to - from, value);
    }
    position_ = position;
    return values_.data();
}

void CausalMask::lay_out(int64_t length) {
    const int64_t width = capacity_ + length;
    for (int64_t row = 0; row < length; ++row) {
        float* const values = values_.data() + row * width;
        std::fill_n(values, width, kHidden);
        std::fill_n(values + capacity_, row + 1, 0.0F);
    }
    position_ = 0;
    length_ = length;
}

}  // namespace llama_runner
