#include <gtest/gtest.h>

#include <cstring>

#include "llama_runner/kv_cache.h"

namespace llama_runner {
namespace {

constexpr int64_t kCapacity = 10;

MethodSpec two_heads() {
    return {"prefill",
            4,
            4,
            1,
            {{"v_cache.0", {2, kCapacity, 3}, Dtype::kFloat32},
             {"tokens", {1, 4}, Dtype::kInt64},
             {"k_cache.0", {2, kCapacity, 3}, Dtype::kFloat32}},
            {}};
}

TEST(KVCache, PlansCommitsAndRewinds) {
    auto cache = KVCache::create(two_heads(), kCapacity);
    ASSERT_TRUE(cache);
    EXPECT_EQ(cache->capacity(), kCapacity);
    EXPECT_EQ(cache->filled_bytes(kCapacity), 2U * 2 * kCapacity * 3 * sizeof(float));
    for (const auto& buffer : cache->buffers()) EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data) % 64, 0U);
    std::vector<float> rows(2 * 4 * 3);
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<float>(i + 1);
    const std::vector<const void*> pointers = {rows.data(), rows.data()};
    ASSERT_TRUE(cache->commit(pointers, 4, 2));
    ASSERT_TRUE(cache->commit(pointers, 4, 1));
    const auto* keys = reinterpret_cast<const float*>(cache->buffers()[0].data);
    const std::vector<float> first(keys, keys + 12);
    EXPECT_EQ(first, (std::vector<float>{1, 2, 3, 4, 5, 6, 1, 2, 3, 0, 0, 0}));
    EXPECT_EQ(keys[kCapacity * 3], 13);
    EXPECT_EQ(cache->position(), 3);
    EXPECT_EQ(
        cache->plan(8).error().message,
        "8 tokens do not fit after the 3 in the cache, which holds 10; shorten the prompt or export with a larger "
        "--max-seq-len");
    EXPECT_FALSE(cache->plan(0));
    EXPECT_EQ(*cache->plan(7), 3);
    EXPECT_EQ(cache->rewind(4).error().message, "cannot rewind to position 4: the cache holds positions 0 to 3");
    EXPECT_TRUE(cache->rewind(1));
    EXPECT_EQ(cache->position(), 1);
}

/// Returns a cache for one block with full attention and one with a window of three positions.
KVCache ringed() {
    const MethodSpec spec{
        "decode", 1, 1, 1, {{"k_cache.0", {1, 9, 1}, Dtype::kFloat32}, {"k_cache.1", {1, 3, 1}, Dtype::kFloat32}}, {}};
    auto cache = KVCache::create(spec, 9);
    EXPECT_TRUE(cache);
    return *std::move(cache);
}

/// Appends `length` rows, each of which contains its position.
void append(KVCache& cache, int64_t length) {
    std::vector<float> rows(static_cast<size_t>(length) + 1, -1);  // and one row of padding
    for (int64_t i = 0; i < length; ++i) rows[static_cast<size_t>(i)] = static_cast<float>(cache.position() + i);
    const std::vector<const void*> pointers = {rows.data(), rows.data()};
    ASSERT_TRUE(cache.commit(pointers, length + 1, length));
}

std::vector<float> values(const KVCache::Buffer& buffer) {
    const auto* data = reinterpret_cast<const float*>(buffer.data);
    return {data, data + buffer.slots};
}

TEST(KVCache, RingsHoldTheLatestRows) {
    KVCache cache = ringed();
    append(cache, 2);
    EXPECT_EQ(values(cache.buffers()[1]), (std::vector<float>{0, 1, 0}));
    append(cache, 2);
    EXPECT_EQ(values(cache.buffers()[1]), (std::vector<float>{3, 1, 2}));
    append(cache, 5);
    EXPECT_EQ(values(cache.buffers()[1]), (std::vector<float>{6, 7, 8}));
    EXPECT_EQ(values(cache.buffers()[0]), (std::vector<float>{0, 1, 2, 3, 4, 5, 6, 7, 8}));
    EXPECT_EQ(cache.filled_bytes(cache.capacity()), 12 * sizeof(float));
}

TEST(KVCache, RingsRewindAsFarAsTheyHold) {
    KVCache cache = ringed();
    append(cache, 3);
    EXPECT_TRUE(cache.rewind(1));
    append(cache, 4);
    EXPECT_EQ(cache.rewind(3).error().message,
              "cannot rewind to position 3: the model sees 3 positions at a time, and their cache has been "
              "overwritten; rewind to 4 or later, or to 0");
    EXPECT_TRUE(cache.rewind(4));
    EXPECT_FALSE(cache.rewind(3)) << "what was written over stays lost";
    append(cache, 1);
    EXPECT_TRUE(cache.rewind(4));
    EXPECT_TRUE(cache.rewind(0));
    append(cache, 2);
    EXPECT_TRUE(cache.rewind(1));
}

TEST(KVCache, SlidesWhatIsBehindThePositionsTakenOut) {
    KVCache cache = ringed();
    std::vector<float> rows(9);
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<float>(i);
    const std::vector<const void*> pointers(2, rows.data());
    ASSERT_TRUE(cache.commit(pointers, 9, 9));
    EXPECT_EQ(cache.room(2), 5) << "the ring must not see the first two";
    int64_t moved = 0;
    cache.slide(2, 4, [&](const KVCache::Buffer& buffer, std::span<std::byte> row) {
        ++moved;
        float value = 0;
        std::memcpy(&value, row.data(), sizeof value);
        if (buffer.name == "k_cache.0") value += 100;
        std::memcpy(row.data(), &value, sizeof value);
    });
    EXPECT_EQ(moved, 3 + 3);
    EXPECT_EQ(cache.position(), 5);
    const auto* whole = reinterpret_cast<const float*>(cache.buffers()[0].data);
    EXPECT_EQ(std::vector<float>(whole, whole + 5), (std::vector<float>{0, 1, 106, 107, 108}));
    const auto* ring = reinterpret_cast<const float*>(cache.buffers()[1].data);
    EXPECT_EQ(std::vector<float>(ring, ring + 3), (std::vector<float>{7, 8, 6})) << "positions 3, 4 and 2";
    EXPECT_TRUE(cache.rewind(4));
    EXPECT_FALSE(cache.rewind(3)) << "the ring no longer holds what is seen from there";
}

TEST(KVCache, RefusesShapesItDoesNotKnow) {
    for (const std::vector<int64_t>& shape :
         std::vector<std::vector<int64_t>>{{1, 10, 1}, {1, 0, 1}, {kLength, 3, kLength}, {1, 3}}) {
        EXPECT_FALSE(KVCache::create({"decode", 1, 1, 1, {{"k_cache.0", shape, Dtype::kFloat32}}, {}}, 9));
    }
}

}  // namespace
}  // namespace llama_runner
