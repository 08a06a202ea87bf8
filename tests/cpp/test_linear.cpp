#include <executorch/runtime/core/memory_allocator.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/platform/runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <string>

#include "kernel_call.h"
#include "linear/linear.h"

namespace et = executorch::runtime;

namespace llama_runner {
namespace {

constexpr size_t kTypes = kBlockForms.size();

/// A linear layer with random weights of a storage type, on random numbers.
struct Product {
    Linear linear{};
    std::vector<float> x, bias, out;
    std::vector<std::byte> weight, scratch;

    Product(BlockType type, int64_t tokens, int64_t columns, int64_t rows, bool with_bias = false) {
        std::mt19937 engine(static_cast<uint32_t>(tokens + columns + rows));
        std::normal_distribution<float> normal;
        x.resize(static_cast<size_t>(tokens * columns));
        bias.resize(static_cast<size_t>(rows));
        out.resize(static_cast<size_t>(tokens * rows), NAN);
        for (float& number : x) number = normal(engine);
        for (float& number : bias) number = normal(engine);
        std::fill_n(x.begin(), kBlockColumns, 0.0f);  // makes the scale of one block zero
        weight.resize(static_cast<size_t>(groups_of(rows)) * group_bytes(type, columns));
        for (std::byte& byte : weight) byte = std::byte(engine());
        put_heads(type, engine);
        linear = {type, tokens, columns, rows, x.data(), weight.data(), with_bias ? bias.data() : nullptr, out.data()};
        scratch.resize(scratch_bytes(linear));
    }
    Product(const Product&) = delete;

    /// Replaces scales that would be infinite or NaN.
    void put_heads(BlockType type, std::mt19937& engine) {
        constexpr size_t kHalves[] = {1, 2, 0, 2, 1};
        const size_t head = static_cast<size_t>(form_of(type).head);
        for (size_t at = 0; at < weight.size(); at += block_bytes(type) * kGroupRows) {
            for (size_t i = 0; i < kHalves[head] * kGroupRows; ++i) {
                const auto half = static_cast<uint16_t>(engine() & 0xbfff);  // less than 2
                std::memcpy(weight.data() + at + 2 * i, &half, sizeof half);
            }
            if (form_of(type).head != BlockHead::kExponent) continue;
            for (size_t i = 0; i < kGroupRows; ++i) weight[at + i] = std::byte(engine() % 140);
        }
    }

    void multiply(ParallelFor parallel_for, IntegerSet set = integer_sets().back()) {
        llama_runner::multiply(linear, scratch.data(), parallel_for, set);
    }
};

/// Whether numbers are equal bit for bit, or neither is a number.
bool alike(const std::vector<float>& a, const std::vector<float>& b) {
    return std::ranges::equal(a, b, [](float one, float other) {
        return std::memcmp(&one, &other, sizeof one) == 0 || (std::isnan(one) && std::isnan(other));
    });
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

class LinearOn : public ::testing::TestWithParam<IntegerSet> {};

TEST_P(LinearOn, IsTheSameOnEveryCpu) {
    for (size_t type = 0; type < kTypes; ++type) {
        for (const auto& [tokens, blocks, rows] : {std::array<int64_t, 3>{1, 1, 1},
                                                   {1, 8, 16},
                                                   {2, 3, 33},
                                                   {3, 1, 15},
                                                   {5, 2, 100},
                                                   {8, 1, 64},
                                                   {13, 4, 17},
                                                   {31, 1, 20},
                                                   {64, 2, 16},
                                                   {70, 3, 47},
                                                   {129, 1, 300}}) {
            const int64_t columns = blocks * block_columns(BlockType(type));
            Product portable(BlockType(type), tokens, columns, rows, rows % 2 == 0);
            Product product(BlockType(type), tokens, columns, rows, rows % 2 == 0);
            portable.multiply(in_order, IntegerSet::kPortable);
            product.multiply(in_order, GetParam());
            EXPECT_TRUE(same(portable.out, product.out))
                << kBlockForms[type].name << " L " << tokens << " K " << columns << " N " << rows;
        }
    }
}

TEST_P(LinearOn, IsTheSameForEachRowAlone) {
    for (size_t type = 0; type < kTypes; ++type) {
        Product all(BlockType(type), 23, 512, 40, true);
        all.multiply(in_order, GetParam());
        for (int64_t t = 0; t < 23; ++t) {
            Product one(BlockType(type), 23, 512, 40, true);
            one.linear.tokens = 1;
            one.linear.x += t * 512;
            one.multiply(in_order, GetParam());
            EXPECT_EQ(std::memcmp(one.out.data(), all.out.data() + t * 40, 40 * sizeof(float)), 0)
                << kBlockForms[type].name << " row " << t;
        }
    }
}

TEST_P(LinearOn, IsTheSameOnEveryNumberOfThreads) {
    for (const int64_t tokens : {1, 7, 150}) {
        Product one(BlockType::kQ4_K, tokens, 256, 3000, true);
        Product three(BlockType::kQ4_K, tokens, 256, 3000, true);
        one.multiply(in_order, GetParam());
        three.multiply(on_three_threads, GetParam());
        EXPECT_TRUE(same(one.out, three.out)) << tokens;
    }
}

TEST_P(LinearOn, ComputesSeveralAsItDoesEach) {
    for (const int64_t tokens : {1, 3, 70}) {
        Product alone[] = {{BlockType::kQ4_K, tokens, 512, 300, true},
                           {BlockType::kQ6_K, tokens, 512, 20},
                           {BlockType::kQ8_0, tokens, 512, 1}};
        Product together[] = {{BlockType::kQ4_K, tokens, 512, 300, true},
                              {BlockType::kQ6_K, tokens, 512, 20},
                              {BlockType::kQ8_0, tokens, 512, 1}};
        std::vector<Linear> linears;
        for (size_t i = 0; i < 3; ++i) {
            alone[i].linear.x = together[i].linear.x = alone[0].x.data();
            alone[i].multiply(in_order, GetParam());
            linears.push_back(together[i].linear);
        }
        multiply(linears, together[0].scratch.data(), on_three_threads, GetParam());
        for (size_t i = 0; i < 3; ++i) EXPECT_TRUE(same(alone[i].out, together[i].out)) << tokens << ", matrix " << i;
    }
}

TEST_P(LinearOn, TakesTheLargestNumbersExactly) {
    Product product(BlockType::kQ8_0, 1, 64, 16);
    for (size_t i = 0; i < product.x.size(); ++i) product.x[i] = i % 3 == 0 ? 127.0f : -127.0f;
    float expected = 0;
    for (size_t b = 0; b < 2; ++b) {
        std::byte* block = product.weight.data() + b * block_bytes(BlockType::kQ8_0) * kGroupRows;
        for (size_t i = 0; i < kGroupRows; ++i) {
            const uint16_t one = 0x3c00;
            std::memcpy(block + 2 * i, &one, sizeof one);
        }
        std::memset(block + 2 * kGroupRows, b == 0 ? -128 : 127, code_bytes(8));
        for (size_t i = b * 32; i < b * 32 + 32; ++i) expected += (b == 0 ? -128.0f : 127.0f) * product.x[i];
    }
    product.multiply(in_order, GetParam());
    for (const float y : product.out) EXPECT_EQ(y, expected);
}

TEST_P(LinearOn, TakesAnyBytes) {
    std::mt19937 engine(1);
    for (int round = 0; round < 300; ++round) {
        const auto type = BlockType(engine() % kTypes);
        const int64_t tokens = 1 + engine() % 20, rows = 1 + engine() % 50;
        const int64_t columns = block_columns(type) * static_cast<int64_t>(1 + engine() % 3);
        Product portable(type, tokens, columns, rows);
        Product product(type, tokens, columns, rows);
        for (std::byte& byte : product.weight) byte = std::byte(engine());
        if (round % 3 == 0) product.x[engine() % product.x.size()] = round % 2 == 0 ? INFINITY : 3e38f;
        portable.weight = product.weight;
        portable.x = product.x;
        portable.multiply(in_order, IntegerSet::kPortable);
        product.multiply(on_three_threads, GetParam());
        EXPECT_TRUE(alike(portable.out, product.out)) << kBlockForms[size_t(type)].name << " round " << round;
        std::vector<float> row(static_cast<size_t>(columns));
        for (int64_t r = 0; r < rows; ++r) read_row(type, columns, product.weight.data(), r, row.data());
    }
}

TEST_P(LinearOn, PassesOnWhatIsNotANumber) {
    Product product(BlockType::kQ4_0, 2, 96, 20);
    product.x[50] = NAN;
    product.multiply(in_order, GetParam());
    for (size_t i = 0; i < 40; ++i) EXPECT_EQ(std::isnan(product.out[i]), i < 20) << i;
    product.x[50] = INFINITY;
    product.multiply(in_order, GetParam());
    EXPECT_FALSE(std::isfinite(product.out[0]));
}

std::string name_of(const ::testing::TestParamInfo<IntegerSet>& set) {
    constexpr const char* kNames[] = {"Portable", "Neon", "NeonDot", "NeonI8mm", "Avx2", "Avx512Vnni", "AmxInt8"};
    return kNames[static_cast<size_t>(set.param)];
}

INSTANTIATE_TEST_SUITE_P(Cpu, LinearOn, ::testing::ValuesIn(integer_sets().begin(), integer_sets().end()), name_of);

/// Returns the share of idle time of all threads, if a task's time is proportional to its number of groups, and threads
/// take tasks as in over_threads().
double idle(std::span<const Linear> linears, size_t threads) {
    std::vector<int64_t> tasks;
    for (int64_t tile = 0; tile < split(linears[0]).token_tiles; ++tile) {
        for (const Linear& linear : linears) {
            for (int64_t left = groups_of(linear.rows); left > 0; left -= split(linear).groups_per_task) {
                tasks.push_back(std::min(left, split(linear).groups_per_task));
            }
        }
    }
    std::vector<size_t> next, end;
    for (size_t t = 0; t < threads; ++t) {
        next.push_back(t * tasks.size() / threads);
        end.push_back((t + 1) * tasks.size() / threads);
    }
    std::vector<int64_t> work(threads);
    for (size_t done = 0; done < tasks.size(); ++done) {
        const auto thread = static_cast<size_t>(std::ranges::min_element(work) - work.begin());
        size_t part = thread;
        while (next[part] == end[part]) part = (part + 1) % threads;
        work[thread] += tasks[next[part]++];
    }
    const auto total = static_cast<double>(std::accumulate(work.begin(), work.end(), int64_t{0}));
    return 1 - total / static_cast<double>(static_cast<int64_t>(threads) * *std::ranges::max_element(work));
}

TEST(Linear, KeepsThreadsBusy) {
    using Rows = std::vector<int64_t>;
    for (const auto& [columns, matrices] : {std::pair<int64_t, Rows>{2048, {8192}},
                                            {8192, {2048}},
                                            {2048, {2048}},
                                            {2048, {512}},
                                            {2048, {128256}},
                                            {2048, {2048, 512, 512}},
                                            {2048, {8192, 8192}}}) {
        for (const size_t threads : {2, 3, 4, 8, 16}) {
            for (const int64_t tokens : {1, 8, 128, 512}) {
                std::vector<Linear> linears;
                for (const int64_t rows : matrices) {
                    linears.push_back({BlockType::kQ4_0, tokens, columns, rows, nullptr, nullptr, nullptr, nullptr});
                }
                EXPECT_LT(idle(linears, threads), 0.05) << matrices.size() << " matrices of " << matrices[0]
                                                        << " rows, " << threads << " threads, " << tokens << " tokens";
            }
        }
    }
}

TEST(Linear, KnowsTheFormats) {
    EXPECT_EQ(block_type_of("Q6_K"), BlockType::kQ6_K);
    EXPECT_EQ(block_type_of("Q9_K"), std::nullopt);
    const size_t bytes[] = {34, 18, 20, 22, 24, 144, 176, 210, 18, 17, 25, 33};
    for (size_t type = 0; type < kTypes; ++type) EXPECT_EQ(block_bytes(BlockType(type)), bytes[type]);
}

/// Calls the operator with a product's arguments, of which one may be replaced.
et::Error call(Product& product, size_t replaced = SIZE_MAX, et::EValue with = {}, int32_t room = 0) {
    et::runtime_init();
    using executorch::aten::ScalarType;
    const Linear& linear = product.linear;
    const auto n = [](int64_t size) { return static_cast<int32_t>(size); };
    const Owned x(ScalarType::Float, {1, n(linear.tokens), n(linear.columns)}, product.x.data());
    const auto bytes = static_cast<int32_t>(group_bytes(linear.type, linear.columns));
    const Owned weight(ScalarType::Byte, {n(groups_of(linear.rows)), bytes}, product.weight.data());
    const Owned bias(ScalarType::Float, {n(linear.rows)}, product.bias.data());
    const Owned out(ScalarType::Float, {1, n(linear.tokens) + room, n(linear.rows)}, product.out.data());
    executorch::aten::ArrayRef<char> kind(form_of(linear.type).name.data(), form_of(linear.type).name.size());
    const bool with_bias = linear.bias != nullptr;
    et::EValue values[] = {x.value,           weight.value, with_bias ? bias.value : et::EValue(),
                           et::EValue(&kind), linear.rows,  out.value};
    if (replaced < std::size(values)) values[replaced] = with;
    std::vector<et::EValue*> pointers;
    for (et::EValue& value : values) pointers.push_back(&value);
    const auto op = et::get_op_function_from_registry("llama_pte::linear.out");
    if (!op.ok()) return op.error();
    std::vector<uint8_t> memory(scratch_bytes(linear) + 64);
    et::MemoryAllocator temporary(static_cast<uint32_t>(memory.size()), memory.data());
    et::KernelRuntimeContext context(nullptr, &temporary);
    (*op)(context, {pointers.data(), pointers.size()});
    return context.failure_state();
}

TEST(LinearOperator, IsRegisteredAndMatches) {
    for (size_t type = 0; type < kTypes; ++type) {
        for (const int64_t tokens : {1, 40, 200}) {
            Product direct(BlockType(type), tokens, 512, 100, tokens > 1);
            Product called(BlockType(type), tokens, 512, 100, tokens > 1);
            direct.multiply(in_order);
            ASSERT_EQ(call(called), et::Error::Ok);
            EXPECT_TRUE(same(direct.out, called.out));
        }
    }
}

TEST(LinearOperator, ShrinksItsResult) {
    Product product(BlockType::kQ4_0, 5, 64, 30);
    product.out.resize(2 * product.out.size());
    EXPECT_EQ(call(product, SIZE_MAX, {}, 5), et::Error::Ok);
    EXPECT_EQ(call(product, SIZE_MAX, {}, -1), et::Error::InvalidArgument) << "no room";
}

TEST(LinearOperator, RefusesImpossibleArguments) {
    using executorch::aten::ScalarType;
    Product product(BlockType::kQ4_0, 3, 64, 30, true);
    std::vector<int64_t> memory(1 << 12);
    const auto refuses = [&](size_t argument, const et::EValue& with) {
        EXPECT_EQ(call(product, argument, with), et::Error::InvalidArgument) << "argument " << argument;
    };
    for (const size_t argument : {0, 1, 2, 5}) {
        refuses(argument, int64_t{3});
        refuses(argument, Owned(ScalarType::Int, {1, 3, 64}, memory.data()).value);
        refuses(argument, Owned(ScalarType::Float, {7}, memory.data()).value);
    }
    refuses(0, Owned(ScalarType::Float, {1, 3, 96}, memory.data()).value);
    refuses(0, Owned(ScalarType::Float, {1, 3, 48}, memory.data()).value);
    refuses(1, Owned(ScalarType::Byte, {1, 576}, memory.data()).value);
    refuses(1, Owned(ScalarType::Byte, {2, 575}, memory.data()).value);
    refuses(3, int64_t{1});
    for (const std::string_view kind : {"Q9_0", "Q8_0", ""}) {
        executorch::aten::ArrayRef<char> text(kind.data(), kind.size());
        refuses(3, et::EValue(&text));
    }
    refuses(4, 1.0);
    for (const int64_t rows : {int64_t{0}, int64_t{-1}, int64_t{33}, INT64_MAX}) refuses(4, rows);
}

TEST(LinearOperator, ComputesOrRefusesAnySizes) {
    using executorch::aten::ScalarType;
    std::mt19937 engine(1);
    std::vector<int64_t> memory(1 << 14);
    for (int round = 0; round < 1000; ++round) {
        const auto type = BlockType(engine() % kTypes);
        const auto tokens = static_cast<int32_t>(1 + engine() % 5);
        Product product(type, tokens, block_columns(type), 1 + engine() % 50);
        const auto bytes = static_cast<int32_t>(product.weight.size());
        const auto off = static_cast<int32_t>(engine() % 5) - 2;
        const auto columns = static_cast<int32_t>(product.linear.columns);
        EXPECT_EQ(call(product, 1, Owned(ScalarType::Byte, {bytes + off}, memory.data()).value) == et::Error::Ok,
                  off == 0);
        EXPECT_EQ(call(product, 0, Owned(ScalarType::Float, {1, tokens, columns + off}, memory.data()).value) ==
                      et::Error::Ok,
                  off == 0);
        const auto rows = static_cast<int64_t>(engine() % 64);
        EXPECT_EQ(call(product, 4, rows) == et::Error::Ok,
                  rows <= product.linear.rows && rows > 0 && groups_of(rows) == groups_of(product.linear.rows));
    }
}

}  // namespace
}  // namespace llama_runner
