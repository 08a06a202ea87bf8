#include <gtest/gtest.h>

#include <cmath>

#include "llama_runner/kv_cache.h"
#include "llama_runner/preproc.h"
#include "llama_runner/session.h"

namespace llama_runner {
namespace {

constexpr int64_t kCapacity = 10;
constexpr int64_t kVocab = 16;

MethodSpec method(const std::string& name, int64_t min_length, int64_t max_length) {
    const int64_t length = min_length == max_length ? max_length : kLength;
    const int64_t width = kCapacity + max_length;
    return {name,
            min_length,
            max_length,
            {{"v_cache.0", {2, kCapacity, 3}, Dtype::kFloat32},
             {"tokens", {1, length}, Dtype::kInt64},
             {"mask", {1, length, width}, Dtype::kFloat32},
             {"cos", {1, length, 2}, Dtype::kFloat32},
             {"select", {1, length}, Dtype::kFloat32},
             {"k_cache.0", {2, kCapacity, 3}, Dtype::kFloat32}},
            {{"k_rows.0", {2, length, 3}, Dtype::kFloat32},
             {"logits", {1, kVocab}, Dtype::kFloat32},
             {"v_rows.0", {2, length, 3}, Dtype::kFloat32}}};
}

/// Stands in for a program: keys are the tokens, logits name the position and the token that were selected.
class FakeSteps final : public Steps {
  public:
    FakeSteps() {
        metadata_.max_seq_len = kCapacity;
        metadata_.vocab_size = kVocab;
        metadata_.methods = {method("prefill", 4, 4), method("decode", 1, 1)};
        metadata_.rope = {2, {}, {}};
        for (int i = 0; i < 2 * kCapacity; ++i) metadata_.rope.cos.push_back(static_cast<float>(i));
        metadata_.rope.sin = metadata_.rope.cos;
    }

    const Metadata& metadata() const override { return metadata_; }

    Result<std::span<const void* const>> step(size_t number, int64_t length,
                                              std::span<const void* const> inputs) override {
        calls.push_back(metadata_.methods[number].name);
        if (fails) return Error{"it failed"};
        const auto* tokens = static_cast<const int64_t*>(inputs[1]);
        const auto* mask = static_cast<const float*>(inputs[2]);
        const auto* cos = static_cast<const float*>(inputs[3]);
        const auto* select = static_cast<const float*>(inputs[4]);
        logits_.assign(kVocab, 0);
        rows_.assign(static_cast<size_t>(2 * length * 3), 0);
        for (int64_t i = 0; i < length; ++i) {
            for (int head = 0; head < 2; ++head) {
                rows_[static_cast<size_t>((head * length + i) * 3)] = static_cast<float>(tokens[i] + 100 * head);
            }
            if (select[i] != 1) continue;
            logits_[0] = static_cast<float>(tokens[i]);
            logits_[1] = cos[i * 2] / 2;
            for (int64_t c = 0; c < kCapacity + length; ++c) logits_[2] += mask[i * (kCapacity + length) + c] == 0;
        }
        outputs_ = {rows_.data(), logits_.data(), rows_.data()};
        return std::span<const void* const>(outputs_);
    }

    std::vector<std::string> calls;
    bool fails = false;
    Metadata metadata_{};

  private:
    std::vector<float> logits_;
    std::vector<float> rows_;
    std::vector<const void*> outputs_;
};

TEST(Session, SplitsAPromptIntoChunks) {
    FakeSteps steps;
    auto session = Session::create(steps);
    ASSERT_TRUE(session) << session.error().message;
    const std::vector<int64_t> prompt = {1, 2, 3, 4, 5};
    const auto logits = session->prefill(prompt);
    ASSERT_TRUE(logits);
    EXPECT_EQ(steps.calls, (std::vector<std::string>{"prefill", "decode"}));
    EXPECT_EQ(std::vector<float>(logits->begin(), logits->begin() + 3), (std::vector<float>{5, 4, 5}));
    EXPECT_EQ(session->position(), 5);

    const std::vector<int64_t> more = {6, 7};
    const auto padded = session->prefill(more);
    ASSERT_TRUE(padded);
    EXPECT_EQ(steps.calls.back(), "prefill");
    EXPECT_EQ(std::vector<float>(padded->begin(), padded->begin() + 3), (std::vector<float>{7, 6, 7}));
    EXPECT_EQ(session->position(), 7);
}

TEST(Session, FillsItsContextAndNoMore) {
    FakeSteps steps;
    auto session = Session::create(steps);
    ASSERT_TRUE(session);
    for (int64_t i = 0; i < kCapacity; ++i) {
        const auto logits = session->decode(i % kVocab);
        ASSERT_TRUE(logits);
        EXPECT_EQ((*logits)[2], static_cast<float>(i + 1));
    }
    const auto full = session->decode(1);
    ASSERT_FALSE(full);
    EXPECT_EQ(full.error().message,
              "the prompt has 1 tokens, but only 0 of 10 positions are free; shorten it or export with a larger "
              "--max-seq-len");
    session->reset();
    EXPECT_EQ(session->position(), 0);
    EXPECT_EQ((*(*session->decode(3)).begin()), 3);
}

TEST(Session, RefusesBadPrompts) {
    FakeSteps steps;
    auto session = Session::create(steps);
    ASSERT_TRUE(session);
    EXPECT_EQ(session->prefill({}).error().message, "the prompt is empty; give at least one token");
    EXPECT_EQ(session->decode(16).error().message, "token 16 is not in the vocabulary; ids run from 0 to 15");
    EXPECT_FALSE(session->decode(-1));
    EXPECT_TRUE(steps.calls.empty());
    steps.fails = true;
    EXPECT_EQ(session->decode(1).error().message, "it failed");
    EXPECT_EQ(session->position(), 0);
}

TEST(Session, RefusesInputsItDoesNotKnow) {
    FakeSteps steps;
    steps.metadata_.methods[0].inputs[3].name = "position";
    const auto session = Session::create(steps);
    ASSERT_FALSE(session);
    EXPECT_EQ(session.error().message, "the file's methods take position, which this runner does not know; update it");
    FakeSteps narrow;
    narrow.metadata_.methods[1].inputs[2].shape.back() = 7;
    EXPECT_FALSE(Session::create(narrow));
    FakeSteps dumb;
    dumb.metadata_.methods[1].outputs.pop_back();
    EXPECT_FALSE(Session::create(dumb));
}

TEST(KVCache, PlansCommitsAndRewinds) {
    auto cache = KVCache::create(method("prefill", 4, 4));
    ASSERT_TRUE(cache);
    EXPECT_EQ(cache->capacity(), kCapacity);
    EXPECT_EQ(cache->nbytes(), 2U * 2 * kCapacity * 3 * sizeof(float));
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
        "8 tokens do not fit behind the 3 in the cache, which holds 10; shorten the prompt or export with a larger "
        "--max-seq-len");
    EXPECT_FALSE(cache->plan(0));
    EXPECT_EQ(*cache->plan(7), 3);
    EXPECT_EQ(cache->rewind(4).error().message, "cannot rewind to position 4: the cache holds positions 0 to 3");
    EXPECT_TRUE(cache->rewind(1));
    EXPECT_EQ(cache->position(), 1);
}

TEST(CausalMask, IsTheSameStepByStepAndAnew) {
    CausalMask moving(3, 6);
    for (const auto& [position, length] : std::vector<std::pair<int64_t, int64_t>>{
             {0, 3}, {2, 3}, {5, 3}, {1, 3}, {6, 3}, {0, 1}, {1, 1}, {6, 1}, {3, 2}}) {
        CausalMask fresh(3, 6);
        const float* found = moving.at(position, length);
        const float* expected = fresh.at(position, length);
        for (int64_t row = 0; row < length; ++row) {
            for (int64_t column = 0; column < 6 + length; ++column) {
                const bool visible = column < 6 ? column < position : column - 6 <= row;
                EXPECT_EQ(found[row * (6 + length) + column], visible ? 0 : kHidden);
                EXPECT_EQ(expected[row * (6 + length) + column], visible ? 0 : kHidden);
            }
        }
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

}  // namespace
}  // namespace llama_runner
