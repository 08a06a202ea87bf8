#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <thread>

#include "llama_runner/program.h"
#include "llama_runner/session.h"
#include "tiny_session.h"

namespace llama_runner {
namespace {

using testing::expect_close;
using testing::logits_after;
using testing::session_of;
using testing::tiny;

constexpr int64_t kCapacity = 10;
constexpr int64_t kVocab = 16;

MethodSpec method(const std::string& name, int64_t min_length, int64_t max_length) {
    const int64_t length = min_length == max_length ? max_length : kLength;
    const int64_t width = kCapacity + max_length;
    return {name,
            min_length,
            max_length,
            1,
            {{"v_cache.0", {2, kCapacity, 3}, Dtype::kFloat32},
             {"tokens", {1, length}, Dtype::kInt64},
             {"mask", {1, length, width}, Dtype::kFloat32},
             {"cos", {1, length, 2}, Dtype::kFloat32},
             {"select", {1, 1, length}, Dtype::kFloat32},
             {"k_cache.0", {2, kCapacity, 3}, Dtype::kFloat32}},
            {{"k_rows.0", {2, length, 3}, Dtype::kFloat32},
             {"logits", {1, 1, kVocab}, Dtype::kFloat32},
             {"v_rows.0", {2, length, 3}, Dtype::kFloat32}}};
}

/// Returns a method without caches.
MethodSpec uncached() {
    return {"forward",
            kCapacity,
            kCapacity,
            1,
            {{"select", {1, 1, kCapacity}, Dtype::kFloat32},
             {"tokens", {1, kCapacity}, Dtype::kInt64},
             {"mask", {1, kCapacity, kCapacity}, Dtype::kFloat32}},
            {{"logits", {1, 1, kVocab}, Dtype::kFloat32}, {"hidden", {1, kCapacity, 2}, Dtype::kFloat32}}};
}

/// A substitute for a program. Keys and hidden states are the tokens; the logits contain the selected token, its
/// position (from the rotary angles) and the number of positions it attends to.
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

    Result<std::span<const void* const>> step(size_t number, StepSize size,
                                              std::span<const void* const> inputs) override {
        const int64_t length = size.length;
        const MethodSpec& spec = metadata_.methods[number];
        calls.push_back(spec.name);
        if (fails) return Error{"it failed"};
        const auto input = [&](const char* name) {
            const auto found = std::ranges::find(spec.inputs, name, &TensorSpec::name);
            return found == spec.inputs.end() ? nullptr : inputs[static_cast<size_t>(found - spec.inputs.begin())];
        };
        const auto* tokens = static_cast<const int64_t*>(input("tokens"));
        const auto* mask = static_cast<const float*>(input("mask"));
        const auto* cos = static_cast<const float*>(input("cos"));
        const auto* select = static_cast<const float*>(input("select"));
        const int64_t columns = (spec.name == "forward" ? 0 : kCapacity) + length;
        text.assign(tokens, tokens + length);
        logits_.assign(kVocab, 0);
        rows_.assign(static_cast<size_t>(2 * length * 3), 0);
        hidden_.assign(static_cast<size_t>(length * 2), 0);
        for (int64_t i = 0; i < length; ++i) {
            hidden_[static_cast<size_t>(i * 2)] = static_cast<float>(tokens[i]);
            for (int head = 0; head < 2; ++head) {
                rows_[static_cast<size_t>((head * length + i) * 3)] = static_cast<float>(tokens[i] + 100 * head);
            }
            if (select[i] != 1) continue;
            logits_[0] = static_cast<float>(tokens[i]);
            logits_[1] = cos != nullptr ? cos[i * 2] / 2 : static_cast<float>(i);
            logits_[2] = static_cast<float>(std::count(mask + i * columns, mask + (i + 1) * columns, 0.0F));
        }
        outputs_.clear();
        for (const TensorSpec& output : spec.outputs) {
            const bool is_rows = output.name != "logits" && output.name != "hidden";
            outputs_.push_back(is_rows ? rows_.data() : output.name == "logits" ? logits_.data() : hidden_.data());
        }
        return std::span<const void* const>(outputs_);
    }

    std::vector<std::string> calls;
    std::vector<int64_t> text;
    bool fails = false;
    Metadata metadata_{};

  private:
    std::vector<float> logits_;
    std::vector<float> rows_;
    std::vector<float> hidden_;
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
    EXPECT_EQ(session->decode(16).error().message, "token 16 is not in the vocabulary; give ids from 0 to 15");
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

TEST(Session, KeepsTheHiddenStatesOfTheLatestStep) {
    FakeSteps steps;
    for (MethodSpec& spec : steps.metadata_.methods) {
        spec.outputs.push_back({"hidden", {1, spec.max_length, 2}, Dtype::kFloat32});
    }
    auto session = Session::create(steps);
    ASSERT_TRUE(session) << session.error().message;
    EXPECT_EQ(session->hidden_width(), 2);
    EXPECT_TRUE(session->hidden().empty());
    const std::vector<int64_t> prompt = {1, 2, 3, 4, 5};
    ASSERT_TRUE(session->prefill(prompt));
    const auto hidden = session->hidden();
    EXPECT_EQ(std::vector<float>(hidden.begin(), hidden.end()), (std::vector<float>{1, 0, 2, 0, 3, 0, 4, 0, 5, 0}));
    ASSERT_TRUE(session->prefill({prompt.data(), 2}));
    EXPECT_EQ(session->hidden().size(), 4U);
    steps.fails = true;
    EXPECT_FALSE(session->decode(1));
    EXPECT_TRUE(session->hidden().empty());

    steps.metadata_.methods[1].outputs.pop_back();
    EXPECT_FALSE(Session::create(steps)) << "one method returns them and the other does not";
    FakeSteps without;
    EXPECT_EQ(Session::create(without)->hidden_width(), 0);
}

TEST(Session, HandsInTheWholeTextWhereNothingIsCached) {
    FakeSteps steps;
    steps.metadata_.methods = {uncached()};
    auto session = Session::create(steps);
    ASSERT_TRUE(session) << session.error().message;
    const std::vector<int64_t> prompt = {1, 2, 3};
    ASSERT_TRUE(session->prefill(prompt));
    ASSERT_TRUE(session->decode(9));
    EXPECT_EQ(session->position(), 4);
    const auto expect_text = [&](const std::vector<int64_t>& text, const std::vector<float>& hidden) {
        EXPECT_EQ(steps.text, text);
        EXPECT_EQ(std::vector<float>(session->hidden().begin(), session->hidden().end()), hidden);
    };
    expect_text({1, 2, 3, 9, 0, 0, 0, 0, 0, 0}, {9, 0});
    ASSERT_TRUE(session->rewind(1));
    const auto logits = session->prefill({prompt.data() + 1, 1});
    ASSERT_TRUE(logits);
    EXPECT_EQ(std::vector<float>(logits->begin(), logits->begin() + 3), (std::vector<float>{2, 1, 2}));
    expect_text({1, 2, 0, 0, 0, 0, 0, 0, 0, 0}, {2, 0});
    steps.metadata_.methods[0].max_length = 4;
    EXPECT_FALSE(Session::create(steps)) << "it would not hold a text";
}

/// Runs the body in several threads, each with its own session of one program.
void run_in_threads(Steps& steps, const std::function<void(Session&, int64_t)>& body) {
    std::vector<std::thread> threads;
    for (int64_t number = 0; number < 3; ++number) {
        threads.emplace_back([&steps, &body, number] {
            auto session = Session::create(steps);
            ASSERT_TRUE(session) << session.error().message;
            body(*session, number);
        });
    }
    for (std::thread& thread : threads) thread.join();
}

TEST(Threads, SessionsOfOneProgramTakeTurns) {
    FakeSteps steps;
    run_in_threads(steps, [](Session& session, int64_t number) {
        for (int64_t i = 0; i < 200; ++i) {
            if (session.position() == session.capacity()) session.reset();
            const int64_t token = (7 * number + i) % kVocab;
            const auto logits = session.decode(token);
            ASSERT_TRUE(logits);
            ASSERT_EQ((*logits)[0], static_cast<float>(token));
            ASSERT_EQ((*logits)[2], static_cast<float>(session.position()));
        }
    });
}

TEST(Threads, EachSessionIsWhatItWouldBeAlone) {
    REQUIRE_TINY(path);
    auto program = Program::open(path, {.threads = 1});  // a sanitizer would not see the program's own threads
    ASSERT_TRUE(program);
    const std::vector<int64_t> text = {1, 5, 9, 13, 17, 21};
    std::vector<std::vector<float>> alone;
    for (size_t number = 0; number < 3; ++number) {
        alone.push_back(logits_after(**program, {text.begin() + static_cast<std::ptrdiff_t>(number), text.end()}));
    }
    run_in_threads(**program, [&](Session& session, int64_t number) {
        for (int i = 0; i < 5; ++i) {
            session.reset();
            const auto of = std::span(text).subspan(static_cast<size_t>(number));
            ASSERT_TRUE(session.prefill(of.first(of.size() - 2)));
            const auto proposed = session.propose(of.last(2).first(1));
            ASSERT_TRUE(proposed);
            ASSERT_TRUE(session.accept(1));
            expect_close(*session.decode(of.back()), alone[static_cast<size_t>(number)]);
        }
    });
}

TEST(Session, ForkedRestartedAndRewoundIsAsIfItWereFresh) {
    REQUIRE_TINY(path);
    const auto program = tiny(path);
    Session session = session_of(*program, {1, 5, 9, 13, 17});
    auto fork = session.fork();
    ASSERT_TRUE(fork);
    ASSERT_TRUE(session.decode(21));
    expect_close(*fork->decode(33), logits_after(*program, {1, 5, 9, 13, 17, 33}));
    expect_close(*session.decode(3), logits_after(*program, {1, 5, 9, 13, 17, 21, 3}));
    expect_close(*session.restart(std::vector<int64_t>{1, 5, 8}), logits_after(*program, {1, 5, 8}));
    EXPECT_EQ(std::vector<int64_t>(session.tokens().begin(), session.tokens().end()), (std::vector<int64_t>{1, 5, 8}));
    ASSERT_TRUE(session.rewind(1));
    expect_close(*session.decode(40), logits_after(*program, {1, 40}));
    EXPECT_FALSE(session.restart({}));
}

TEST(Session, GivesSeveralRowsOfLogits) {
    REQUIRE_TINY(path);
    const auto program = tiny(path);
    const auto vocab = static_cast<size_t>(program->metadata().vocab_size);
    for (const int64_t rows : {1, 3, 8, 19}) {  // within one step, and over several steps
        Session session = session_of(*program, {1, 2});
        std::vector<int64_t> text = {1, 2};
        std::vector<int64_t> more;
        for (int64_t i = 0; i < 19; ++i) more.push_back(7 * i + 3);
        const auto logits = session.extend(more, rows);
        ASSERT_TRUE(logits);
        ASSERT_EQ(logits->size(), static_cast<size_t>(rows) * vocab);
        for (int64_t i = 0; i < std::ssize(more); ++i) {
            text.push_back(more[static_cast<size_t>(i)]);
            const int64_t row = i - (std::ssize(more) - rows);
            if (row >= 0)
                expect_close(logits->subspan(static_cast<size_t>(row) * vocab, vocab), logits_after(*program, text));
        }
    }
    Session session = session_of(*program, {});
    EXPECT_FALSE(session.extend(std::vector<int64_t>{1}, 2));
}

TEST(Session, WhatWasProposedCountsAsFarAsItIsAccepted) {
    REQUIRE_TINY(path);
    const auto program = tiny(path);
    const auto vocab = static_cast<size_t>(program->metadata().vocab_size);
    Session session = session_of(*program, {1, 5, 9});
    const auto logits = session.propose(std::vector<int64_t>{13, 17, 21});
    ASSERT_TRUE(logits);
    expect_close(logits->subspan(vocab, vocab), logits_after(*program, {1, 5, 9, 13, 17}));
    ASSERT_TRUE(session.accept(1));
    EXPECT_EQ(session.position(), 4);
    expect_close(*session.decode(40), logits_after(*program, {1, 5, 9, 13, 40}));
}

TEST(Session, SlidesAndGoesOn) {
    REQUIRE_TINY(path);
    const auto program = tiny(path);
    Session session = session_of(*program, {});
    for (int64_t i = 0; i < 3 * session.capacity(); ++i) {
        if (session.position() == session.capacity()) {
            const std::vector<int64_t> before(session.tokens().begin(), session.tokens().end());
            const auto count = session.slide();
            ASSERT_TRUE(count);
            EXPECT_EQ(session.position(), session.capacity() - *count);
            EXPECT_EQ(session.tokens()[kSinks], before[static_cast<size_t>(kSinks + *count)]);
        }
        ASSERT_TRUE(session.decode(1 + i * i % 700));
    }
    Session empty = session_of(*program, {1, 2, 3, 4});
    EXPECT_FALSE(empty.slide());
}

}  // namespace
}  // namespace llama_runner
