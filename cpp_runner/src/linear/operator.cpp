// ExecuTorch operators on matrices in blocks: llama_pte::linear.out calls multiply() of linear.h,
// llama_pte::block_rows.out looks rows up:
//
//   linear(Tensor x, Tensor weight, Tensor? bias, str kind, int rows, *, Tensor(a!) out) -> Tensor(a!)
//   block_rows(Tensor weight, Tensor tokens, str kind, int columns, *, Tensor(a!) out) -> Tensor(a!)
//
// A matrix is a flat tensor of bytes, see blocks.h. Linking this file registers both.

#include <executorch/runtime/kernel/kernel_includes.h>

#include "attention/operators.h"
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
constexpr size_t kStackBytes = size_t{1} << 16;  // of rounded rows, more than a step of decoding has

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

/// Reads the sizes from the arguments; returns false if they do not match.
bool measure(et::Span<et::EValue*> args, Linear& linear) {
    const Tensor& x = args[kX]->toTensor();
    const Tensor& weight = args[kWeight]->toTensor();
    const std::optional<BlockType> type = type_of(*args[kKind]);
    if (!type) return false;
    linear.type = *type;
    linear.columns = x.size(x.dim() - 1);
    linear.rows = args[kRows]->toInt();
    if (linear.columns < 1 || linear.columns % block_columns(linear.type) != 0) return false;
    if (linear.rows < 1 || linear.rows > kMostSize || linear.columns > kMostSize) return false;
    linear.tokens = x.numel() / linear.columns;
    if (args[kBias]->isTensor()) {
        const Tensor& bias = args[kBias]->toTensor();
        if (bias.scalar_type() != ScalarType::Float || bias.dim() != 1 || bias.size(0) != linear.rows) return false;
        linear.bias = bias.const_data_ptr<float>();
    }
    return weight.nbytes() == static_cast<size_t>(groups_of(linear.rows)) * group_bytes(linear.type, linear.columns);
}

/// Gives the result the first dimensions of another tensor, and a last one of `size`.
bool resize(Tensor out, const Tensor& like, int64_t size) {
    SizesType shape[kMostDimensions];
    const auto dims = static_cast<size_t>(out.dim());
    for (size_t i = 0; i + 1 < dims; ++i) shape[i] = static_cast<SizesType>(like.size(static_cast<ptrdiff_t>(i)));
    shape[dims - 1] = static_cast<SizesType>(size);
    return et::resize_tensor(out, {shape, dims}) == et::Error::Ok && et::tensor_is_contiguous(out);
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
    linear.weight = static_cast<const std::byte*>(args[kWeight]->toTensor().const_data_ptr());
    linear.out = out.mutable_data_ptr<float>();
    const size_t bytes = scratch_bytes(linear);
    if (bytes <= kStackBytes) {
        alignas(64) std::byte scratch[kStackBytes];
        return multiply(linear, scratch, over_threads);
    }
    const et::Result<void*> scratch = ctx.allocate_temp(bytes, 64);
    ET_KERNEL_CHECK_MSG(ctx, scratch.ok(), MemoryAllocationFailed, , "%s: no memory for %zu bytes", kName, bytes);
    multiply(linear, static_cast<std::byte*>(*scratch), over_threads);
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
[[maybe_unused]] const et::Error rows_registered = register_once(kRowsName, block_rows_out);

}  // namespace

}  // namespace llama_runner
