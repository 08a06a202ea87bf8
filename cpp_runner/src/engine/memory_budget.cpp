#include "engine/memory_budget.h"

#include <algorithm>
#include <numeric>

namespace llama_runner {

namespace {

std::string megabytes(int64_t bytes) { return std::to_string((std::max<int64_t>(bytes, 0) + 500'000) / 1'000'000); }

}  // namespace

Result<std::vector<bool>> choose_resident(std::span<const int64_t> sizes, int64_t room) {
    std::vector<size_t> order(sizes.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin() + 1, order.end(), [&](size_t a, size_t b) { return sizes[a] > sizes[b]; });
    std::vector<bool> found(sizes.size());
    int64_t taken = 0;
    const auto largest_other = [&](size_t except) {
        int64_t largest = 0;
        for (size_t i = 0; i < sizes.size(); ++i) {
            if (i != except && !found[i]) largest = std::max(largest, sizes[i]);
        }
        return largest;
    };
    for (const size_t number : order) {
        if (taken + sizes[number] + largest_other(number) <= room) {
            found[number] = true;
            taken += sizes[number];
        }
    }
    if (taken + largest_other(sizes.size()) > room) {
        const auto largest = std::ranges::max_element(sizes);
        return Error{"--memory-budget leaves " + megabytes(room) + " MB for weights, but shard " +
                     std::to_string(largest - sizes.begin() + 1) + " of " + std::to_string(sizes.size()) + " needs " +
                     megabytes(*largest) + " MB; give " + megabytes(*largest - room) +
                     " MB more, or export with more --shards"};
    }
    return found;
}

}  // namespace llama_runner
