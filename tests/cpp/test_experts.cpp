#include <executorch/runtime/core/memory_allocator.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/platform/runtime.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string_view>

#include "kernel_call.h"
#include "linear/experts.h"

namespace et = executorch::runtime;

namespace llama_runner {
namespace {

/// Products with random matrices in Q4_0, each in pages of its own.
struct Experts {
    ExpertLinear linear{};
    std::vector<float> x, out;
    std::vector<int64_t> chosen;
    std::vector<std::byte*> pages;
    std::vector<std::byte> scratch;
    size_t bytes;

    Experts(int64_t tokens, int64_t choices, int64_t experts, int64_t columns, int64_t rows, bool shared)
        : bytes(static_cast<size_t>(groups_of(rows)) * group_bytes(BlockType::kQ4_0, columns)) {
        std::mt19937 engine(static_cast<uint32_t>(tokens + columns + rows));
        std::normal_distribution<float> normal;
        x.resize(static_cast<size_t>(tokens * (shared ? 1 : choices) * columns));
        out.resize(static_cast<size_t>(tokens * choices * rows), NAN);
        for (float& number : x) number = normal(engine);
        for (int64_t i = 0; i < tokens * choices; ++i) chosen.push_back(engine() % experts);
        for (int64_t i = 0; i < experts; ++i) pages.push_back(random_matrix(engine));
        linear = {BlockType::kQ4_0, tokens,   choices,      experts,       columns,   rows,
                  shared,           x.data(), pages.data(), chosen.data(), out.data()};
        scratch.resize(scratch_bytes(linear));
    }
    Experts(const Experts&) = delete;
    ~Experts() {
        for (std::byte* page : pages) munmap(page, bytes);
    }

    std::byte* random_matrix(std::mt19937& engine) const {
        void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        EXPECT_NE(memory, MAP_FAILED);
        auto* matrix = static_cast<std::byte*>(memory);
        for (size_t i = 0; i < bytes; ++i) matrix[i] = std::byte(engine());
        for (size_t at = 0; at < bytes; at += block_bytes(BlockType::kQ4_0) * kGroupRows) {
            for (size_t i = 0; i < kGroupRows; ++i) matrix[at + 2 * i + 1] &= std::byte{0xbf};  // below 2
        }
        return matrix;
    }

    /// What linear.h computes for one product alone.
    std::vector<float> alone(int64_t product) const {
        const int64_t row = linear.shared ? product / linear.choices : product;
        std::vector<float> found(static_cast<size_t>(linear.rows));
        const Linear one{linear.type,
                         1,
                         linear.columns,
                         linear.rows,
                         linear.x + row * linear.columns,
                         linear.weights[linear.chosen[product]],
                         nullptr,
                         found.data()};
        std::vector<std::byte> memory(scratch_bytes(one));
        llama_runner::multiply(one, memory.data(), in_order);
        return found;
    }

    void expect_right() const {
        for (int64_t i = 0; i < linear.products(); ++i) {
            const std::vector<float> right = alone(i);
            EXPECT_EQ(std::memcmp(out.data() + i * linear.rows, right.data(), right.size() * sizeof(float)), 0) << i;
        }
    }
};

TEST(Experts, MultiplyAsEachAlone) {
    for (const auto& [tokens, choices, experts, columns, rows] : {std::array<int64_t, 5>{1, 1, 1, 32, 1},
                                                                  {1, 2, 8, 64, 33},
                                                                  {1, 5, 2, 32, 16},  // the same expert several times
                                                                  {2, 2, 2, 96, 15},
                                                                  {7, 3, 5, 64, 100},
                                                                  {60, 2, 128, 32, 17},
                                                                  {150, 3, 2, 32, 20}}) {
        for (const bool shared : {true, false}) {
            for (const ParallelFor& threads : {ParallelFor(in_order), ParallelFor(on_three_threads)}) {
                Experts experts_of(tokens, choices, experts, columns, rows, shared);
                multiply(experts_of.linear, experts_of.scratch.data(), threads);
                SCOPED_TRACE(testing::Message() << "L " << tokens << " k " << choices << " E " << experts);
                experts_of.expect_right();
            }
        }
    }
}

TEST(Experts, TakeAllRowsOfOneExpertInParts) {
    Experts experts(300, 2, 3, 32, 20, true);
    std::ranges::fill(experts.chosen, 1);
    multiply(experts.linear, experts.scratch.data(), on_three_threads);
    experts.expect_right();
}

TEST(Experts, AreNotReadUnlessChosen) {
    Experts experts(5, 2, 8, 256, 64, true);
    for (size_t i = 0; i < experts.chosen.size(); ++i) experts.chosen[i] = i % 2 == 0 ? 2 : 7;
    for (size_t e = 0; e < 8; ++e) {
        if (e != 2 && e != 7) ASSERT_EQ(mprotect(experts.pages[e], experts.bytes, PROT_NONE), 0);  // reading it crashes
    }
    multiply(experts.linear, experts.scratch.data(), in_order);
    experts.expect_right();
}

/// The operator, called with the products' arguments, of which one may be replaced.
et::Error call(Experts& experts, size_t replaced = SIZE_MAX, et::EValue with = {}, int32_t short_by = 0) {
    et::runtime_init();
    using executorch::aten::ScalarType;
    using executorch::aten::Tensor;
    const ExpertLinear& linear = experts.linear;
    const auto n = [](int64_t size) { return static_cast<int32_t>(size); };
    std::vector<int32_t> sizes{1, n(linear.tokens), n(linear.choices), n(linear.columns)};
    if (linear.shared) sizes.erase(sizes.begin() + 2);
    const Owned x(ScalarType::Float, sizes, experts.x.data());
    const Owned chosen(ScalarType::Long, {1, n(linear.tokens), n(linear.choices)}, experts.chosen.data());
    const Owned out(ScalarType::Float, {1, n(linear.tokens), n(linear.choices), n(linear.rows)}, experts.out.data());
    std::vector<Owned> owned;
    owned.reserve(experts.pages.size());
    for (std::byte* page : experts.pages)
        owned.emplace_back(ScalarType::Byte, std::vector{n(static_cast<int64_t>(experts.bytes)) - short_by}, page);
    std::vector<et::EValue*> wrapped;
    std::vector<Tensor> unwrapped;
    for (Owned& each : owned) {
        wrapped.push_back(&each.value);
        unwrapped.push_back(each.value.toTensor());
    }
    et::BoxedEvalueList<Tensor> list(wrapped.data(), unwrapped.data(), static_cast<int>(wrapped.size()));
    executorch::aten::ArrayRef<char> kind("Q4_0", 4);
    et::EValue values[] = {x.value, et::EValue(&list), chosen.value, et::EValue(&kind), linear.rows, out.value};
    if (replaced < std::size(values)) values[replaced] = with;
    std::vector<et::EValue*> pointers;
    for (et::EValue& value : values) pointers.push_back(&value);
    const auto op = et::get_op_function_from_registry("llama_pte::expert_linear.out");
    if (!op.ok()) return op.error();
    std::vector<uint8_t> memory(experts.scratch.size() + 64);
    et::MemoryAllocator temporary(static_cast<uint32_t>(memory.size()), memory.data());
    et::KernelRuntimeContext context(nullptr, &temporary);
    (*op)(context, {pointers.data(), pointers.size()});
    return context.failure_state();
}

TEST(ExpertsOperator, IsRegisteredAndMatches) {
    for (const bool shared : {true, false}) {
        for (const int64_t tokens : {1, 9, 130}) {
            Experts experts(tokens, 2, 4, 512, 40, shared);
            ASSERT_EQ(call(experts), et::Error::Ok);
            experts.expect_right();
        }
    }
}

TEST(ExpertsOperator, RefusesExpertsThatDoNotExist) {
    for (const int64_t wrong : {int64_t{-1}, int64_t{4}, INT64_MAX, INT64_MIN}) {
        Experts experts(3, 2, 4, 64, 20, true);
        experts.chosen[3] = wrong;
        EXPECT_EQ(call(experts), et::Error::InvalidArgument) << wrong;
    }
}

TEST(ExpertsOperator, RefusesImpossibleArguments) {
    using executorch::aten::ScalarType;
    Experts experts(3, 2, 4, 64, 20, true);
    std::vector<int64_t> memory(1 << 12);
    const auto refuses = [&](size_t argument, const et::EValue& with) {
        EXPECT_EQ(call(experts, argument, with), et::Error::InvalidArgument) << "argument " << argument;
    };
    for (const size_t argument : {0, 1, 2, 5}) {
        refuses(argument, int64_t{3});
        refuses(argument, Owned(ScalarType::Int, {1, 3, 64}, memory.data()).value);
        refuses(argument, Owned(ScalarType::Float, {7}, memory.data()).value);
    }
    refuses(0, Owned(ScalarType::Float, {1, 3, 96}, memory.data()).value);
    refuses(0, Owned(ScalarType::Float, {1, 3, 48}, memory.data()).value);
    refuses(0, Owned(ScalarType::Float, {1, 4, 64}, memory.data()).value);
    refuses(0, Owned(ScalarType::Float, {1, 3, 3, 64}, memory.data()).value);
    refuses(2, Owned(ScalarType::Long, {3, 2}, memory.data()).value);
    refuses(2, Owned(ScalarType::Long, {1, 3, 0}, memory.data()).value);
    refuses(3, int64_t{1});
    for (const std::string_view kind : {"Q9_0", "Q8_0", ""}) {
        executorch::aten::ArrayRef<char> text(kind.data(), kind.size());
        refuses(3, et::EValue(&text));
    }
    refuses(4, 1.0);
    for (const int64_t rows : {int64_t{0}, int64_t{-1}, int64_t{33}, INT64_MAX}) refuses(4, rows);
    refuses(5, Owned(ScalarType::Float, {1, 3, 2, 19}, memory.data()).value);
    EXPECT_EQ(call(experts, SIZE_MAX, {}, 1), et::Error::InvalidArgument) << "matrices that are too short";
}

}  // namespace
}  // namespace llama_runner
