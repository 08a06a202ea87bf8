#pragma once

#include <executorch/runtime/core/evalue.h>

#include <cstdint>
#include <numeric>
#include <optional>
#include <thread>
#include <vector>

namespace llama_runner {

inline void in_order(int64_t count, void (*task)(const void*, int64_t), const void* context) {
    for (int64_t i = 0; i < count; ++i) task(context, i);
}

inline void on_three_threads(int64_t count, void (*task)(const void*, int64_t), const void* context) {
    std::vector<std::thread> threads;
    for (int64_t first = 0; first < 3; ++first) {
        threads.emplace_back([=] {
            for (int64_t i = count - 1 - first; i >= 0; i -= 3) task(context, i);
        });
    }
    for (std::thread& thread : threads) thread.join();
}

/// A tensor that owns its memory.
class Owned {
  public:
    Owned(executorch::aten::ScalarType dtype, std::vector<int32_t> sizes, void* data)
        : sizes_(std::move(sizes)), order_(sizes_.size()), strides_(sizes_.size(), 1) {
        std::iota(order_.begin(), order_.end(), uint8_t{0});
        for (size_t i = sizes_.size() - 1; i > 0; --i) strides_[i - 1] = strides_[i] * sizes_[i];
        impl_.emplace(dtype, static_cast<ssize_t>(sizes_.size()), sizes_.data(), data, order_.data(), strides_.data(),
                      executorch::aten::TensorShapeDynamism::DYNAMIC_BOUND);
        value = executorch::aten::Tensor(&*impl_);
    }

    executorch::runtime::EValue value;

  private:
    std::vector<int32_t> sizes_;
    std::vector<uint8_t> order_;
    std::vector<int32_t> strides_;
    std::optional<executorch::aten::TensorImpl> impl_;
};

}  // namespace llama_runner
