#include "llama_runner/speculative.h"

#include <algorithm>

namespace llama_runner {

std::span<const int64_t> Lookup::guess(std::span<const int64_t> text, int64_t count) const {
    for (int64_t length = std::min(longest_, std::ssize(text) - 1); length > 0; --length) {
        const auto wanted = text.last(static_cast<size_t>(length));
        for (int64_t start = std::ssize(text) - length - 1; start >= 0; --start) {
            if (!std::ranges::equal(text.subspan(static_cast<size_t>(start), wanted.size()), wanted)) continue;
            const auto behind = text.subspan(static_cast<size_t>(start + length));
            return behind.first(static_cast<size_t>(std::min(count, std::ssize(behind))));
        }
    }
    return {};
}

}  // namespace llama_runner
