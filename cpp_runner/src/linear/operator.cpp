// ExecuTorch operators on matrices in blocks: llama_pte::linear.out calls multiply() of linear.h,
// llama_pte::expert_linear.out that of experts.h, and llama_pte::block_rows.out looks rows up:
//
//   linear(Tensor x, Tensor weight, Tensor? bias, str kind, int rows, *, Tensor(a!) out) -> Tensor(a!)
//   expert_linear(Tensor x, Tensor[] weights, Tensor chosen, str kind, int rows, *, Tensor(a!) out) -> Tensor(a!)
//   block_rows(Tensor weight, Tensor tokens, str kind, int columns, *, Tensor(a!) out) -> Tensor(a!)
//
// A matrix is a flat tensor of bytes, see blocks.h. Linking this file registers all.

#include <executorch/runtime/kernel/kernel_includes.h>

#include <algorithm>

#include "attention/operators.h"
#include "linear/experts.h"
#include "linear/linear.h"

namespace et = executorch::runtime;

namespace llama_runner {

namespace {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::Tensor;

constexpr const char* kName = "llama_pte::linear.out";
constexpr ptrdiff_t kMostDimensions = 8;
constexpr int64_t kMostSize = int64_t{1} << 31;  // of a dimension, so that products cannot overflow
constexpr size_t kStackBytes = size_t{1} << 16;  // of scratch memory, more than a step of decoding needs
constexpr size_t kMostExperts = 1024;            // as in model/config.py

enum Argument : size_t { kX, kWeight, kBias, kKind, kRows, kOut, kArguments };

/// Checks the types of all arguments, and the ranks of those from which sizes are taken.
bool well_typed(et::Span<et::EValue*> args) {
    if (args.size() < kArguments) return false;
    for (const size_t i : {kX, kWeight, kOut}) {
        if (!args[i]->isTensor() || !et::tensor_is_contiguous(args[i]->toTensor())) return false;
    }
    const Tensor& x = args[kX]->toTensor();
    const Tensor& out = args[kOut]->toTensor();
    return (args[kBias]->isTensor() || args[kBias]->isNone()) && args[kKind]->isString() && args[kRows]->isInt() &&
           x.scalar_type() == ScalarType::Float && x.dim() >= 1 && x.dim() <= kMostDimensions &&
           args[kWeight]->toTensor().scalar_type() == ScalarType::Byte && out.scalar_type() == ScalarType::Float &&
           out.dim() == x.dim();
}

std::optional<BlockType> type_of(const et::EValue& kind) {
    const auto name = kind.toString();
    return block_type_of({name.data(), name.size()});
}

/// Reads the type and size of a matrix that is multiplied by the rows of x; returns false if they are impossible. `To`
/// is Linear or ExpertLinear.
template <class To>
bool measure_matrix(const Tensor& x, const et::EValue& kind, int64_t rows, To& linear) {
    const std::optional<BlockType> type = type_of(kind);
    if (!type) return false;
    linear.type = *type;
    linear.columns = x.size(x.dim() - 1);
    linear.rows = rows;
    return linear.columns >= 1 && linear.columns <= kMostSize && linear.columns % block_columns(*type) == 0 &&
           linear.rows >= 1 && linear.rows <= kMostSize;
}

/// Returns whether a tensor has the bytes of a matrix.
template <class From>
bool holds(const Tensor& weight, const From& linear) {
    return weight.scalar_type() == ScalarType::Byte && et::tensor_is_contiguous(weight) &&
           weight.nbytes() == static_cast<size_t>(groups_of(linear.rows)) * group_bytes(linear.type, linear.columns);
}

const std::byte* bytes_of(const Tensor& weight) { return static_cast<const std::byte*>(weight.const_data_ptr()); }

/// Reads the sizes from the arguments; returns false if they do not match.
bool measure(et::Span<et::EValue*> args, Linear& linear) {
    const Tensor& x = args[kX]->toTensor();
    if (!measure_matrix(x, *args[kKind], args[kRows]->toInt(), linear)) return false;
    linear.tokens = x.numel() / linear.columns;
    if (args[kBias]->isTensor()) {
        const Tensor& bias = args[kBias]->toTensor();
        if (bias.scalar_type() != ScalarType::Float || bias.dim() != 1 || bias.size(0) != linear.rows) return false;
        linear.bias = bias.const_data_ptr<float>();
    }
    return holds(args[kWeight]->toTensor(), linear);
}

/// Gives the result the first dimensions of another tensor, and a last one of `size`.
bool resize(Tensor out, const Tensor& like, int64_t size) {
    SizesType shape[kMostDimensions];
    const auto dims = static_cast<size_t>(out.dim());
    for (size_t i = 0; i + 1 < dims; ++i) shape[i] = static_cast<SizesType>(like.size(static_cast<ptrdiff_t>(i)));
    shape[dims - 1] = static_cast<SizesType>(size);
    return et::resize_tensor(out, {shape, dims}) == et::Error::Ok && et::tensor_is_contiguous(out);
}

/// Calls multiply() with scratch memory.
template <class Product>
void run(et::KernelRuntimeContext& ctx, const char* name, const Product& product) {
    const size_t bytes = scratch_bytes(product);
    if (bytes <= kStackBytes) {
        alignas(64) std::byte scratch[kStackBytes];
        return multiply(product, scratch, over_threads);
    }
    const et::Result<void*> scratch = ctx.allocate_temp(bytes, 64);
    ET_KERNEL_CHECK_MSG(ctx, scratch.ok(), MemoryAllocationFailed, , "%s: no memory for %zu bytes", name, bytes);
    multiply(product, static_cast<std::byte*>(*scratch), over_threads);
}

void linear_out(et::KernelRuntimeContext& ctx, et::Span<et::EValue*> args) {
    ET_KERNEL_CHECK_MSG(ctx, well_typed(args), InvalidArgument, , "%s: the types are not those of its schema", kName);
    Linear linear{};
    ET_KERNEL_CHECK_MSG(ctx, measure(args, linear), InvalidArgument, , "%s: unknown format, or sizes do not match",
                        kName);
    const Tensor& x = args[kX]->toTensor();
    const Tensor& out = args[kOut]->toTensor();
    ET_KERNEL_CHECK_MSG(ctx, resize(out, x, linear.rows), InvalidArgument, , "%s: the result does not fit", kName);
    linear.x = x.const_data_ptr<float>();
    linear.weight = bytes_of(args[kWeight]->toTensor());
    linear.out = out.mutable_data_ptr<float>();
    run(ctx, kName, linear);
}

constexpr const char* kExpertsName = "llama_pte::expert_linear.out";

enum ExpertArgument : size_t {
    kExpertX,
    kExpertWeights,
    kExpertChosen,
    kExpertKind,
    kExpertRows,
    kExpertOut,
    kExpertArguments
};

/// Checks the types of all arguments but the matrices, and the ranks of those from which sizes are taken.
bool experts_well_typed(et::Span<et::EValue*> args) {
    if (args.size() < kExpertArguments) return false;
    for (const size_t i : {kExpertX, kExpertChosen, kExpertOut}) {
        if (!args[i]->isTensor() || !et::tensor_is_contiguous(args[i]->toTensor())) return false;
    }
    const Tensor& x = args[kExpertX]->toTensor();
    const Tensor& chosen = args[kExpertChosen]->toTensor();
    const Tensor& out = args[kExpertOut]->toTensor();
    return args[kExpertKind]->isString() && args[kExpertRows]->isInt() && x.scalar_type() == ScalarType::Float &&
           chosen.scalar_type() == ScalarType::Long && out.scalar_type() == ScalarType::Float && chosen.dim() >= 1 &&
           (x.dim() == chosen.dim() || x.dim() == chosen.dim() + 1) && out.dim() == chosen.dim() + 1 &&
           out.dim() <= kMostDimensions;
}

/// Reads the sizes from the arguments; returns false if they do not match.
bool measure_experts(et::Span<et::EValue*> args, et::ArrayRef<Tensor> weights, ExpertLinear& linear) {
    const Tensor& x = args[kExpertX]->toTensor();
    const Tensor& chosen = args[kExpertChosen]->toTensor();
    if (!measure_matrix(x, *args[kExpertKind], args[kExpertRows]->toInt(), linear)) return false;
    for (ptrdiff_t i = 0; i < x.dim() - 1; ++i) {
        if (x.size(i) != chosen.size(i)) return false;
    }
    linear.choices = chosen.size(chosen.dim() - 1);
    if (linear.choices < 1 || weights.size() > kMostExperts) return false;
    linear.tokens = chosen.numel() / linear.choices;
    linear.experts = static_cast<int64_t>(weights.size());
    linear.shared = x.dim() == chosen.dim();
    return std::all_of(weights.begin(), weights.end(), [&](const Tensor& weight) { return holds(weight, linear); });
}

void expert_linear_out(et::KernelRuntimeContext& ctx, et::Span<et::EValue*> args) {
    const bool well_typed = experts_well_typed(args);
    ET_KERNEL_CHECK_MSG(ctx, well_typed, InvalidArgument, , "%s: the types are not those of its schema", kExpertsName);
    const auto weights = args[kExpertWeights]->tryToTensorList();
    ExpertLinear linear{};
    const bool matches = weights.ok() && measure_experts(args, *weights, linear);
    ET_KERNEL_CHECK_MSG(ctx, matches, InvalidArgument, , "%s: unknown format, or sizes do not match", kExpertsName);
    const Tensor& chosen = args[kExpertChosen]->toTensor();
    linear.chosen = chosen.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < linear.products(); ++i) {
        const bool exists = linear.chosen[i] >= 0 && linear.chosen[i] < linear.experts;
        ET_KERNEL_CHECK_MSG(ctx, exists, InvalidArgument, , "%s: no expert %lld", kExpertsName,
                            static_cast<long long>(linear.chosen[i]));
    }
    const Tensor& out = args[kExpertOut]->toTensor();
    const bool fits = resize(out, chosen, linear.rows);
    ET_KERNEL_CHECK_MSG(ctx, fits, InvalidArgument, , "%s: the result does not fit", kExpertsName);
    const std::byte* matrices[kMostExperts];
    std::transform(weights->begin(), weights->end(), matrices, bytes_of);
    linear.weights = matrices;
    linear.x = args[kExpertX]->toTensor().const_data_ptr<float>();
    linear.out = out.mutable_data_ptr<float>();
    run(ctx, kExpertsName, linear);
}

constexpr const char* kRowsName = "llama_pte::block_rows.out";

void block_rows_out(et::KernelRuntimeContext& ctx, et::Span<et::EValue*> args) {
    const bool well_typed = args.size() >= 5 && args[0]->isTensor() && args[1]->isTensor() && args[2]->isString() &&
                            args[3]->isInt() && args[4]->isTensor();
    ET_KERNEL_CHECK_MSG(ctx, well_typed, InvalidArgument, , "%s: the types are not those of its schema", kRowsName);
    const Tensor& weight = args[0]->toTensor();
    const Tensor& tokens = args[1]->toTensor();
    const Tensor& out = args[4]->toTensor();
    const std::optional<BlockType> type = type_of(*args[2]);
    const int64_t columns = args[3]->toInt();
    const bool matches = type && columns > 0 && columns <= kMostSize && columns % block_columns(*type) == 0 &&
                         weight.scalar_type() == ScalarType::Byte && tokens.scalar_type() == ScalarType::Long &&
                         out.scalar_type() == ScalarType::Float && tokens.dim() + 1 == out.dim() &&
                         out.dim() <= kMostDimensions && et::tensor_is_contiguous(tokens);
    ET_KERNEL_CHECK_MSG(ctx, matches, InvalidArgument, , "%s: unknown format, or sizes do not match", kRowsName);
    ET_KERNEL_CHECK_MSG(ctx, resize(out, tokens, columns), InvalidArgument, , "%s: the result does not fit", kRowsName);
    const auto rows = static_cast<int64_t>(weight.nbytes() / group_bytes(*type, columns)) * kGroupRows;
    const auto* ids = tokens.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < tokens.numel(); ++i) {
        ET_KERNEL_CHECK_MSG(ctx, ids[i] >= 0 && ids[i] < rows, InvalidArgument, , "%s: no row %lld", kRowsName,
                            static_cast<long long>(ids[i]));
        read_row(*type, columns, static_cast<const std::byte*>(weight.const_data_ptr()), ids[i],
                 out.mutable_data_ptr<float>() + i * columns);
    }
}

[[maybe_unused]] const et::Error registered = register_once(kName, linear_out);
[[maybe_unused]] const et::Error experts_registered = register_once(kExpertsName, expert_linear_out);
[[maybe_unused]] const et::Error rows_registered = register_once(kRowsName, block_rows_out);

}  // namespace

}  // namespace llama_runner
