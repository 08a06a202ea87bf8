#include "linear/experts.h"

#include <algorithm>
#include <utility>

namespace llama_runner {

namespace {

constexpr int64_t kMostRows = 128;  // of x that are gathered at once; more rows would only read a matrix less often

int64_t rows_at_once(const ExpertLinear& linear) { return std::min(linear.tokens, kMostRows); }

/// The product of an expert and `count` rows of x.
Linear product_of(const ExpertLinear& linear, int64_t count) {
    return {linear.type, count, linear.columns, linear.rows, nullptr, nullptr, nullptr, nullptr};
}

/// Where the parts of the scratch memory begin.
struct Scratch {
    int64_t* ends;   // [E]: where the products of each expert end in `order`
    int64_t* order;  // [L * k]: numbers of products, sorted by expert
    float* x;        // gathered rows of x, and their results
    float* out;
    std::byte* rounded;

    Scratch(const ExpertLinear& linear, std::byte* memory)
        : ends(reinterpret_cast<int64_t*>(memory)),
          order(ends + linear.experts),
          x(reinterpret_cast<float*>(order + linear.products())),
          out(x + gathered(linear) * linear.columns),
          rounded(reinterpret_cast<std::byte*>(out + gathered(linear) * linear.rows)) {}

    /// Returns how many rows are gathered at most. A single one is used where it stands.
    static int64_t gathered(const ExpertLinear& linear) { return rows_at_once(linear) > 1 ? rows_at_once(linear) : 0; }
};

void sort_by_expert(const ExpertLinear& linear, const Scratch& scratch) {
    std::fill_n(scratch.ends, linear.experts, int64_t{0});
    for (int64_t i = 0; i < linear.products(); ++i) ++scratch.ends[linear.chosen[i]];
    int64_t start = 0;
    for (int64_t e = 0; e < linear.experts; ++e) start += std::exchange(scratch.ends[e], start);
    for (int64_t i = 0; i < linear.products(); ++i) scratch.order[scratch.ends[linear.chosen[i]]++] = i;
}

/// The products of one expert, or a part of them.
struct Batch {
    const ExpertLinear& linear;
    const Scratch& scratch;
    const int64_t* order;

    const float* x(int64_t i) const {
        return linear.x + (linear.shared ? order[i] / linear.choices : order[i]) * linear.columns;
    }
    float* out(int64_t i) const { return linear.out + order[i] * linear.rows; }
};

void gather(const void* opaque, int64_t i) {
    const Batch& batch = *static_cast<const Batch*>(opaque);
    const int64_t columns = batch.linear.columns;
    std::copy_n(batch.x(i), columns, batch.scratch.x + i * columns);
}

void scatter(const void* opaque, int64_t i) {
    const Batch& batch = *static_cast<const Batch*>(opaque);
    const int64_t rows = batch.linear.rows;
    std::copy_n(batch.scratch.out + i * rows, rows, batch.out(i));
}

}  // namespace

size_t scratch_bytes(const ExpertLinear& linear) {
    const auto numbers = static_cast<size_t>(linear.experts + linear.products());
    const auto gathered = static_cast<size_t>(Scratch::gathered(linear) * (linear.columns + linear.rows));
    return numbers * sizeof(int64_t) + gathered * sizeof(float) +
           scratch_bytes(product_of(linear, rows_at_once(linear)));
}

void multiply(const ExpertLinear& linear, std::byte* memory, ParallelFor parallel_for, IntegerSet set) {
    const Scratch scratch(linear, memory);
    sort_by_expert(linear, scratch);
    for (int64_t e = 0, at = 0; e < linear.experts; ++e) {
        for (int64_t count = 0; at < scratch.ends[e]; at += count) {
            count = std::min(scratch.ends[e] - at, rows_at_once(linear));
            const Batch batch{linear, scratch, scratch.order + at};
            Linear product = product_of(linear, count);
            product.weight = linear.weights[e];
            product.x = count == 1 ? batch.x(0) : scratch.x;
            product.out = count == 1 ? batch.out(0) : scratch.out;
            if (count > 1) parallel_for(count, gather, &batch);
            multiply(product, scratch.rounded, parallel_for, set);
            if (count > 1) parallel_for(count, scatter, &batch);
        }
    }
}

}  // namespace llama_runner
