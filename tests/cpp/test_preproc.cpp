#include <gtest/gtest.h>

#include <algorithm>

#include "llama_runner/position_inputs.h"

namespace llama_runner {
namespace {

/// Returns the expected mask of one row: the bias of every cached position and every new row.
std::vector<float> expected_row(int64_t position, int64_t length, int64_t row, int64_t capacity, int64_t window,
                                float slope) {
    std::vector<float> values(static_cast<size_t>(capacity + length), kHidden);
    for (int64_t seen = std::max<int64_t>(0, window == 0 ? 0 : position + row - window + 1); seen <= position + row;
         ++seen) {
        const int64_t column = seen < position ? seen % capacity : capacity + seen - position;
        values[static_cast<size_t>(column)] = -slope * static_cast<float>(position + row - seen);
    }
    return values;
}

void expect_mask(const CausalMask& mask, int64_t position, int64_t length, int64_t capacity, int64_t window,
                 const std::vector<float>& slopes) {
    const float* values = mask.values();
    for (const float slope : slopes) {
        for (int64_t row = 0; row < length; ++row, values += capacity + length) {
            EXPECT_EQ(std::vector<float>(values, values + capacity + length),
                      expected_row(position, length, row, capacity, window, slope))
                << "row " << row << " at position " << position;
        }
    }
}

TEST(CausalMask, IsRightWhereverItMoves) {
    CausalMask mask(3, 6);
    expect_mask(mask, 0, 3, 6, 0, {0});
    for (const auto& [position, length] : std::vector<std::pair<int64_t, int64_t>>{
             {0, 3}, {2, 3}, {5, 3}, {1, 3}, {6, 3}, {0, 1}, {1, 1}, {6, 1}, {3, 2}}) {
        mask.move(position, length);
        expect_mask(mask, position, length, 6, 0, {0});
    }
}

TEST(CausalMask, SeesARingsLatestRows) {
    for (const int64_t window : {1, 2, 4, 5}) {  // smaller than the chunk of 4, equal to it, and larger
        CausalMask mask(4, window, window);
        for (const auto& [position, length] : std::vector<std::pair<int64_t, int64_t>>{
                 {0, 4}, {4, 4}, {8, 4}, {12, 1}, {13, 1}, {14, 4}, {18, 2}, {17, 2}, {1, 4}, {0, 1}, {33, 1}}) {
            mask.move(position, length);
            expect_mask(mask, position, length, window, window, {0});
        }
    }
}

TEST(CausalMask, TakesOffForDistance) {
    const std::vector<float> slopes = {0.5F, 0.125F, 0.3F};
    CausalMask mask(2, 8, 0, slopes);
    CausalMask local(2, 3, 3, slopes);
    for (const auto& [position, length] :
         std::vector<std::pair<int64_t, int64_t>>{{0, 2}, {2, 2}, {4, 1}, {5, 1}, {7, 1}, {3, 2}}) {
        mask.move(position, length);
        expect_mask(mask, position, length, 8, 0, slopes);
        local.move(position, length);
        expect_mask(local, position, length, 3, 3, slopes);
    }
}

TEST(RopeSlices, RepeatTheLastRow) {
    const RopeTables tables{2, {0, 1, 10, 11, 20, 21}, {0, -1, -10, -11, -20, -21}};
    std::vector<float> cos(6);
    std::vector<float> sin(6);
    rope_slices(tables, 1, 3, cos.data(), sin.data());
    EXPECT_EQ(cos, (std::vector<float>{10, 11, 20, 21, 20, 21}));
    EXPECT_EQ(sin, (std::vector<float>{-10, -11, -20, -21, -20, -21}));
}

TEST(PositionInputs, AreThoseOfEachPlace) {
    Metadata metadata{};
    metadata.max_seq_len = 10;
    metadata.rope.width = 2;
    for (int i = 0; i < 20; ++i) metadata.rope.cos.push_back(static_cast<float>(i));
    metadata.rope.sin = metadata.rope.cos;
    metadata.sliding_window = 4;
    metadata.alibi_slopes = {0.5F, 0.25F};
    PositionInputs inputs(metadata, 3, true);
    const auto ids = inputs.add({"positions", {1, 3}, Dtype::kInt64});
    const auto mask = inputs.add({"mask", {2, 3, 13}, Dtype::kFloat32});
    const auto local = inputs.add({"local_mask", {2, kLength, 7}, Dtype::kFloat32});
    const auto sin = inputs.add({"sin", {1, 3, 2}, Dtype::kFloat32});
    ASSERT_TRUE(ids && mask && local && sin);
    inputs.move(8, 3);
    const auto* found = static_cast<const int64_t*>(*ids);
    EXPECT_EQ(std::vector<int64_t>(found, found + 3), (std::vector<int64_t>{8, 9, 9}));
    EXPECT_EQ(static_cast<const float*>(*sin)[0], 16);
    EXPECT_EQ(static_cast<const float*>(*mask)[7], -0.5F);
    EXPECT_EQ(static_cast<const float*>(*mask)[8], kHidden);
    EXPECT_EQ(static_cast<const float*>(*local)[3], -0.5F);
    EXPECT_EQ(static_cast<const float*>(*local)[0], kHidden);

    EXPECT_EQ(*inputs.add({"weather", {1}, Dtype::kFloat32}), nullptr);
    EXPECT_FALSE(inputs.add({"mask", {1, 3, 13}, Dtype::kFloat32})) << "the heads differ";
    EXPECT_FALSE(inputs.add({"mask", {2, 3, 12}, Dtype::kFloat32})) << "the cache has no room for the whole text";
    EXPECT_FALSE(inputs.add({"mask", {2, 3, kLength}, Dtype::kFloat32}));
    EXPECT_FALSE(inputs.add({"mask", {2, 3}, Dtype::kFloat32}));
    EXPECT_FALSE(inputs.add({"local_mask", {2, 3, 6}, Dtype::kFloat32})) << "the cache does not hold the window";
    EXPECT_TRUE(inputs.add({"local_mask", {2, 3, 8}, Dtype::kFloat32})) << "a row more than the window";
    EXPECT_FALSE(inputs.add({"positions", {1, 3}, Dtype::kFloat32}));
    EXPECT_FALSE(inputs.add({"cos", {1, 3, 4}, Dtype::kFloat32}));
}

}  // namespace
}  // namespace llama_runner
