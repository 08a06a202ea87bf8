#pragma once

#include <cstdint>
#include <optional>
#include <queue>
#include <vector>

namespace llama_runner {

/// A part of a word that may be merged further.
struct Symbol {
    uint32_t id;
    uint32_t start;
    uint32_t length;
};

/// The result of merging two neighbours; the lowest rank is merged first.
struct Merge {
    uint32_t rank;
    uint32_t id;
};

/// Merges neighbours, the lowest rank first and the leftmost of equals, until no more can be merged: O(n log n).
///
/// `lookup(left, right)` returns the merge of two neighbours, or nothing.
template <typename Lookup>
void merge_symbols(std::vector<Symbol>& symbols, const Lookup& lookup) {
    struct Candidate {
        Merge merge;
        uint32_t left;

        bool operator<(const Candidate& other) const {
            return merge.rank != other.merge.rank ? merge.rank > other.merge.rank : left > other.left;
        }
    };
    constexpr uint32_t kNone = UINT32_MAX;
    const auto count = static_cast<uint32_t>(symbols.size());
    std::vector<uint32_t> previous(count);
    std::vector<uint32_t> next(count);
    std::priority_queue<Candidate> queue;
    const auto propose = [&](uint32_t left, uint32_t right) {
        if (left == kNone || right == kNone) return;
        if (const std::optional<Merge> merge = lookup(symbols[left], symbols[right])) queue.push({*merge, left});
    };
    for (uint32_t i = 0; i < count; ++i) {
        previous[i] = i > 0 ? i - 1 : kNone;
        next[i] = i + 1 < count ? i + 1 : kNone;
        propose(i, next[i]);
    }
    while (!queue.empty()) {
        const auto [merge, left] = queue.top();
        queue.pop();
        const uint32_t right = next[left];
        if (symbols[left].length == 0 || right == kNone) continue;
        const std::optional<Merge> current = lookup(symbols[left], symbols[right]);
        if (!current || current->id != merge.id) continue;  // a neighbour has changed since

        symbols[left].id = merge.id;
        symbols[left].length += symbols[right].length;
        symbols[right].length = 0;
        next[left] = next[right];
        if (next[left] != kNone) previous[next[left]] = left;
        propose(previous[left], left);
        propose(left, next[left]);
    }
    std::erase_if(symbols, [](const Symbol& symbol) { return symbol.length == 0; });
}

}  // namespace llama_runner
