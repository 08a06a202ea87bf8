#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/platform/runtime.h>
#include <gtest/gtest.h>

#include <atomic>

#include "attention/operators.h"
#include "attention_step.h"
#include "kernel_call.h"

namespace et = executorch::runtime;

namespace llama_runner {
namespace {

std::vector<Shape> shapes() {
    std::vector<Shape> all = {
        {8, 2, 64, 1, 64, {0}, 32},                    // the first token
        {32, 8, 64, 1, 1100, {1000}, 32},              // Llama 3.2
        {4, 1, 128, 1, 3072, {3000}, 64},              // one KV head, its keys read in chunks
        {4, 4, 64, 1, 3072, {3000, 17}, 32},           // sequences of different lengths
        {3, 1, 256, 5, 2000, {1999}, 128},             //
        {8, 8, 80, 7, 300, {250}, 16},                 // partly rotated
        {6, 2, 96, 70, 128, {58}, 48},                 //
        {16, 2, 64, 20, 512, {77, 400}, 32},           //
        {71, 1, 64, 3, 100, {50}, 32},                 // as many query heads as Falcon
        {4, 2, 64, 1, 128, {1000}, 32, 128},           // a ring
        {4, 2, 64, 40, 32, {1001, 5}, 32, 20},         // a ring shorter than the step
        {2, 1, 64, 70, 700, {690}, 0, 9},              //
        {8, 4, 32, 33, 900, {800}, 0, 0, 0, true},     // MPT
        {8, 4, 64, 1, 1500, {1400}, 0, 300, 0, true},  //
        {8, 4, 256, 9, 700, {600}, 128, 512, 50},      // Gemma 2
        {2, 2, 64, 65, 64, {0}, 32, 0, 0.5f},          //
        {1, 1, 1, 1, 4, {3}},                          //
    };
    std::mt19937 engine(7);
    const auto below = [&](int64_t n) { return static_cast<int64_t>(engine() % static_cast<uint32_t>(n)); };
    for (int i = 0; i < 40; ++i) {
        Shape shape{1, 1 + below(3), 1 + below(i % 8 == 0 ? 256 : 70), 1 + below(i % 3 == 0 ? 70 : 6), 0, {}};
        shape.heads = shape.kv_heads * (1 + below(9));
        for (int64_t b = below(2); b >= 0; --b) shape.position.push_back(below(i % 5 == 0 ? 3000 : 300));
        shape.rope_pairs = below(shape.head_dim / 2 + 1);
        shape.slots = *std::ranges::max_element(shape.position) + 1;
        if (below(3) == 0) {
            shape.window = 1 + below(100);
            shape.slots = shape.window + below(20);
        }
        shape.softcap = below(4) == 0 ? 5.0f : 0.0f;
        shape.alibi = below(4) == 0;
        all.push_back(shape);
    }
    return all;
}

class AttentionOn : public ::testing::TestWithParam<InstructionSet> {};

TEST_P(AttentionOn, MatchesFloat64) {
    for (const RowForm form : {RowForm::kFloat32, RowForm::kFloat16, RowForm::kInt8}) {
        for (const Shape& shape : shapes()) {
            SCOPED_TRACE(::testing::PrintToString(shape) + " form " + std::to_string(static_cast<int>(form)));
            AttentionStep step(shape, form);
            attend(step.a, in_order, GetParam());
            std::vector<std::byte> keys, values;
            step.expected_rows(keys, values);
            EXPECT_EQ(step.k_rows, keys);
            EXPECT_EQ(step.v_rows, values);
            EXPECT_LT(step.error(), 2e-6);
        }
    }
}

TEST_P(AttentionOn, IsTheSameOnEveryNumberOfThreads) {
    for (const Shape& shape : shapes()) {
        AttentionStep one(shape, RowForm::kFloat32);
        AttentionStep three(shape, RowForm::kFloat32);
        attend(one.a, in_order, GetParam());
        attend(three.a, on_three_threads, GetParam());
        EXPECT_EQ(std::memcmp(one.out.data(), three.out.data(), one.out.size() * sizeof(float)), 0)
            << ::testing::PrintToString(shape);
        EXPECT_EQ(one.k_rows, three.k_rows);
    }
}

TEST_P(AttentionOn, ConvertsEveryKindOfNumber) {
    for (const RowForm form : {RowForm::kFloat16, RowForm::kInt8}) {
        AttentionStep step({1, 1, 251, 64, 0, {0}}, form);
        std::mt19937 engine(5);
        for (size_t i = 0; i < step.k.size(); ++i) {  // from below the smallest float16 to above the largest
            const float size =
                std::ldexp(1.0f + static_cast<float>(engine() % 4096) / 4096, static_cast<int>(i % 43) - 26);
            step.k[i] = engine() % 2 == 0 ? size : -size;
        }
        std::fill_n(step.v.begin(), 251, 0.0f);
        attend(step.a, in_order, GetParam());
        std::vector<std::byte> keys, values;
        step.expected_rows(keys, values);
        EXPECT_EQ(step.k_rows, keys);
        EXPECT_EQ(step.v_rows, values);
    }
}

TEST_P(AttentionOn, SurvivesWhatIsNotANumber) {
    for (const RowForm form : {RowForm::kFloat32, RowForm::kFloat16, RowForm::kInt8}) {
        AttentionStep step({4, 2, 64, 12, 64, {40}, 32}, form);
        step.q[5] = NAN;
        step.k[77] = INFINITY;
        step.v[8] = -INFINITY;
        attend(step.a, in_order, GetParam());
        EXPECT_TRUE(std::isnan(step.out[0]));
    }
}

std::string name_of(const ::testing::TestParamInfo<InstructionSet>& set) {
    constexpr const char* kNames[] = {"Portable", "Neon", "Avx2", "Avx512"};
    return kNames[static_cast<size_t>(set.param)];
}

INSTANTIATE_TEST_SUITE_P(Cpu, AttentionOn, ::testing::ValuesIn(instruction_sets().begin(), instruction_sets().end()),
                         name_of);

/// Calls the operator with a step's arguments, of which one may be replaced.
et::Error call(AttentionStep& step, size_t replaced = SIZE_MAX, et::EValue with = {}, int32_t room = 0) {
    et::runtime_init();
    using executorch::aten::ScalarType;
    const Attention& a = step.a;
    const auto n = [](int64_t x) { return static_cast<int32_t>(x); };
    const std::vector<int32_t> q = {n(a.batch), n(a.length), n(a.heads * a.head_dim)};
    const std::vector<int32_t> kv = {n(a.batch), n(a.length), n(a.kv_heads * a.head_dim)};
    const std::vector<int32_t> pairs = {n(a.batch), n(a.length), n(a.rope_pairs)};
    const ScalarType types[] = {ScalarType::Float, ScalarType::Half, ScalarType::Char};
    const ScalarType form = types[static_cast<size_t>(a.form)];
    const int32_t width = n(a.head_dim) + (a.form == RowForm::kInt8 ? 4 : 0);
    const std::vector<int32_t> cache = {n(a.batch * a.kv_heads), n(a.slots), width};
    const std::vector<int32_t> rows = {n(a.batch * a.kv_heads), n(a.length) + room, width};
    const std::vector<int32_t> out = {n(a.batch), n(a.length) + room, n(a.heads * a.head_dim)};
    Owned tensors[] = {
        {ScalarType::Float, q, step.q.data()},
        {ScalarType::Float, kv, step.k.data()},
        {ScalarType::Float, kv, step.v.data()},
        {ScalarType::Float, pairs, step.cos.data()},
        {ScalarType::Float, pairs, step.sin.data()},
        {ScalarType::Float, {n(a.heads)}, step.slopes.data()},
        {form, cache, step.k_cache.data()},
        {form, cache, step.v_cache.data()},
        {ScalarType::Long, {n(a.batch)}, step.position.data()},
        {ScalarType::Float, out, step.out.data()},
        {form, rows, step.k_rows.data()},
        {form, rows, step.v_rows.data()},
    };
    std::vector<et::EValue> values;
    for (const Owned& tensor : tensors) values.push_back(tensor.value);
    const et::EValue numbers[] = {static_cast<double>(a.scale), static_cast<double>(a.softcap), a.window};
    values.insert(values.begin() + 9, std::begin(numbers), std::end(numbers));
    if (a.cos == nullptr) values[3] = values[4] = et::EValue();
    if (a.slopes == nullptr) values[5] = et::EValue();
    if (replaced < values.size()) values[replaced] = with;
    std::vector<et::EValue*> pointers;
    for (et::EValue& value : values) pointers.push_back(&value);
    const auto op = et::get_op_function_from_registry("llama_pte::attention.out");
    if (!op.ok()) return op.error();
    et::KernelRuntimeContext context;
    (*op)(context, {pointers.data(), pointers.size()});
    if (context.failure_state() == et::Error::Ok) {
        EXPECT_EQ(values[12].toTensor().size(1), a.length);
        EXPECT_EQ(values[14].toTensor().size(1), a.length);
    }
    return context.failure_state();
}

TEST(AttentionOperator, IsRegisteredAndMatches) {
    for (const RowForm form : {RowForm::kFloat32, RowForm::kFloat16, RowForm::kInt8}) {
        for (const Shape& shape : {Shape{8, 2, 64, 3, 64, {20, 3}, 32}, Shape{4, 1, 80, 1, 3000, {2999}, 0, 0, 0, true},
                                   Shape{32, 8, 64, 70, 200, {130}, 32, 128, 30}}) {
            AttentionStep direct(shape, form);
            AttentionStep called(shape, form);
            attend(direct.a, in_order);
            ASSERT_EQ(call(called), et::Error::Ok);
            EXPECT_EQ(direct.out, called.out);
            EXPECT_EQ(direct.k_rows, called.k_rows);
            EXPECT_EQ(direct.v_rows, called.v_rows);
        }
    }
}

TEST(AttentionOperator, ShrinksItsResults) {
    const Shape shape{4, 2, 32, 5, 16, {9}, 16};
    AttentionStep step(shape, RowForm::kFloat32);
    step.out.resize(2 * step.out.size());
    step.k_rows.resize(2 * step.k_rows.size());
    step.v_rows.resize(2 * step.v_rows.size());
    EXPECT_EQ(call(step, SIZE_MAX, {}, 5), et::Error::Ok);
    EXPECT_EQ(call(step, SIZE_MAX, {}, -1), et::Error::InvalidArgument) << "no room";
}

TEST(AttentionOperator, RefusesImpossibleArguments) {
    using executorch::aten::ScalarType;
    const Shape shape{4, 2, 32, 3, 16, {9}, 16};
    AttentionStep step(shape, RowForm::kFloat32);
    std::vector<int64_t> memory(1 << 12);
    const auto refuses = [&](size_t argument, const et::EValue& with) {
        EXPECT_EQ(call(step, argument, with), et::Error::InvalidArgument) << "argument " << argument;
    };
    const int32_t wrong[][3] = {{1, 3, 127}, {1, 3, 65}, {1, 2, 64}, {1, 3, 0}, {1, 3, 15}, {5, 16, 32}, {2, 15, 32}};
    for (size_t argument = 0; argument < 15; ++argument) {
        if (argument >= 9 && argument <= 11) continue;
        refuses(argument, int64_t{3});
        refuses(argument, Owned(ScalarType::Int, {1, 3, 64}, memory.data()).value);
        if (argument >= 12) continue;
        refuses(argument, Owned(ScalarType::Float, {7}, memory.data()).value);
        for (const auto& [i, j, k] : wrong) {
            const Owned tensor(ScalarType::Float, {i, j, k}, memory.data());
            refuses(argument, tensor.value);
        }
    }
    for (const size_t argument : {3, 4}) refuses(argument, et::EValue());  // a cosine without its sine
    refuses(9, int64_t{1});
    refuses(9, std::nan(""));
    refuses(10, -1.0);
    refuses(11, int64_t{-1});
    refuses(11, 1.0);
    step.position[0] = -1;
    EXPECT_EQ(call(step), et::Error::InvalidArgument);
    step.position[0] = INT64_MAX;
    EXPECT_EQ(call(step), et::Error::InvalidArgument);
    AttentionStep wide({1, 1, 257, 1, 4, {0}}, RowForm::kFloat32);
    EXPECT_EQ(call(wide), et::Error::InvalidArgument);
}

TEST(OverThreads, RunsEachTaskOnce) {
    for (const int64_t count : {0, 1, 2, 3, 7, 100, 5000}) {
        std::vector<std::atomic<int>> runs(static_cast<size_t>(count));
        const auto run = [](const void* context, int64_t i) {
            ++static_cast<std::atomic<int>*>(const_cast<void*>(context))[i];
        };
        over_threads(count, run, runs.data());
        for (const std::atomic<int>& each : runs) ASSERT_EQ(each, 1) << count;
    }
}

}  // namespace
}  // namespace llama_runner
