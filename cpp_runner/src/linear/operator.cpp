// ExecuTorch operators on matrices in blocks: llama_pte::linear.out calls multiply() of linear.h,
// llama_pte::block_rows.out looks rows up:
//
//   linear(Tensor x, Tensor weight, Tensor? bias, str kind, int rows, *, Tensor(a!) out) -> Tensor(a!)
//   block_rows(Tensor weight, Tensor tokens, str kind, int columns, *, Tensor(a!) out) -> Tensor(a!)
//
// A matrix is a flat tensor of bytes, see blocks.h. linear2.out and linear3.out multiply x by two and by three
// matrices: the arguments of each follow those of the one before, and each has a result. Linking this file registers
// all four.

#include <executorch/runtime/kernel/kernel_includes.h>

#include "attention/operators.h"
#include "linear/linear.h"

namespace et = executorch::runtime;

namespace llama_runner {

namespace {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::Tensor;

constexpr const char* kNames[] = {"llama_pte::linear.out", "llama_pte::linear2.out", "llama_pte::linear3.out"};
constexpr ptrdiff_t kMostDimensions = 8;
constexpr int64_t kMostSize = int64_t{1} << 31;  // of a dimension, so that products cannot overflow
constexpr size_t kStackBytes = size_t{1} << 16;  // of rounded rows, more than a step of decoding has

enum Argument : size_t { kWeight, kBias, kKind, kRows, kArguments };

/// The arguments of linear with N matrices: x, then kArguments of each matrix, then the results.
template <size_t N>
struct Arguments {
    et::Span<et::EValue*> all;

    static constexpr size_t kCount = 1 + N * (kArguments + 1);
    const et::EValue& x() const { return *all[0]; }
    const et::EValue& of(size_t matrix, Argument argument) const { return *all[1 + matrix * kArguments + argument]; }
    const et::EValue& out(size_t matrix) const { return *all[1 + N * kArguments + matrix]; }
};

bool is_plain(const et::EValue& value, ScalarType dtype) {
    return value.isTensor() && value.toTensor().scalar_type() == dtype && et::tensor_is_contiguous(value.toTensor());
}

/// Checks the types of all arguments, and the ranks of those from which sizes are taken.
template <size_t N>
bool well_typed(const Arguments<N>& args) {
    if (args.all.size() < args.kCount || !is_plain(args.x(), ScalarType::Float)) return false;
    const ptrdiff_t dims = args.x().toTensor().dim();
    if (dims < 1 || dims > kMostDimensions) return false;
    for (size_t i = 0; i < N; ++i) {
        const et::EValue& bias = args.of(i, kBias);
        if (!is_plain(args.of(i, kWeight), ScalarType::Byte) || !(bias.isNone() || is_plain(bias, ScalarType::Float)) ||
            !args.of(i, kKind).isString() || !args.of(i, kRows).isInt() || !is_plain(args.out(i), ScalarType::Float) ||
            args.out(i).toTensor().dim() != dims) {
            return false;
        }
    }
    return true;
}

std::optional<BlockType> type_of(const et::EValue& kind) {
    const auto name = kind.toString();
    return block_type_of({name.data(), name.size()});
}

/// Reads a product from the arguments, without its result; returns false if the sizes do not match.
template <size_t N>
bool measure(const Arguments<N>& args, size_t matrix, Linear& linear) {
    const Tensor& x = args.x().toTensor();
    const Tensor& weight = args.of(matrix, kWeight).toTensor();
    const std::optional<BlockType> type = type_of(args.of(matrix, kKind));
    if (!type) return false;
    linear.type = *type;
    linear.columns = x.size(x.dim() - 1);
    linear.rows = args.of(matrix, kRows).toInt();
    if (linear.columns < 1 || linear.columns % block_columns(linear.type) != 0) return false;
    if (linear.rows < 1 || linear.rows > kMostSize || linear.columns > kMostSize) return false;
    linear.tokens = x.numel() / linear.columns;
    linear.x = x.const_data_ptr<float>();
    linear.weight = static_cast<const std::byte*>(weight.const_data_ptr());
    if (const et::EValue& value = args.of(matrix, kBias); value.isTensor()) {
        const Tensor& bias = value.toTensor();
        if (bias.dim() != 1 || bias.size(0) != linear.rows) return false;
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

template <size_t N>
void linear_out(et::KernelRuntimeContext& ctx, et::Span<et::EValue*> all) {
    const char* name = kNames[N - 1];
    const Arguments<N> args{all};
    ET_KERNEL_CHECK_MSG(ctx, well_typed(args), InvalidArgument, , "%s: the types are not those of its schema", name);
    Linear linears[N]{};
    for (size_t i = 0; i < N; ++i) {
        ET_KERNEL_CHECK_MSG(ctx, measure(args, i, linears[i]), InvalidArgument, ,
                            "%s: unknown format, or sizes do not match", name);
        const Tensor& out = args.out(i).toTensor();
        ET_KERNEL_CHECK_MSG(ctx, resize(out, args.x().toTensor(), linears[i].rows), InvalidArgument, ,
                            "%s: the result does not fit", name);
        linears[i].out = out.mutable_data_ptr<float>();
    }
    const size_t bytes = scratch_bytes(linears[0]);
    if (bytes <= kStackBytes) {
        alignas(64) std::byte scratch[kStackBytes];
        return multiply(linears, scratch, over_threads);
    }
    const et::Result<void*> scratch = ctx.allocate_temp(bytes, 64);
    ET_KERNEL_CHECK_MSG(ctx, scratch.ok(), MemoryAllocationFailed, , "%s: no memory for %zu bytes", name, bytes);
    multiply(linears, static_cast<std::byte*>(*scratch), over_threads);
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

[[maybe_unused]] const et::Error registered[] = {
    register_once(kNames[0], linear_out<1>),
    register_once(kNames[1], linear_out<2>),
    register_once(kNames[2], linear_out<3>),
};
[[maybe_unused]] const et::Error rows_registered = register_once(kRowsName, block_rows_out);

}  // namespace

}  // namespace llama_runner
