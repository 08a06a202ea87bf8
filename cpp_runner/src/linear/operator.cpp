// ExecuTorch operators on matrices in blocks: llama_pte::linear.out calls multiply() of linear.h,
// llama_pte::expert_linear.out that of experts.h, and llama_pte::block_rows.out looks rows up:
//
//   linear(Tensor x, Tensor weight, Tensor? bias, str kind, int rows, *, Tensor(a!) out) -> Tensor(a!)
//   expert_linear(Tensor x, Tensor[] weights, Tensor chosen, str kind, int rows, *, Tensor(a!) out) -> Tensor(a!)
//   block_rows(Tensor weight, Tensor tokens, str kind, int columns, *, Tensor(a!) out) -> Tensor(a!)
//
// A matrix is a flat tensor of bytes, see blocks.h. linear2.out and linear3.out multiply x by two and by three
// matrices: the arguments of each follow those of the one before, and each has a result. Linking this file registers
// all five.

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

constexpr const char* kNames[] = {"llama_pte::linear.out", "llama_pte::linear2.out", "llama_pte::linear3.out"};
constexpr ptrdiff_t kMostDimensions = 8;
constexpr int64_t kMostSize = int64_t{1} << 31;  // of a dimension, so that products cannot overflow
constexpr size_t kStackBytes = size_t{1} << 16;  // of scratch memory, more than a step of decoding needs
constexpr size_t kMostExperts = 1024;            // as in model/config.py

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

/// Reads a product from the arguments, without its result; returns false if the sizes do not match.
template <size_t N>
bool measure(const Arguments<N>& args, size_t matrix, Linear& linear) {
    const Tensor& x = args.x().toTensor();
    const Tensor& weight = args.of(matrix, kWeight).toTensor();
    if (!measure_matrix(x, args.of(matrix, kKind), args.of(matrix, kRows).toInt(), linear)) return false;
    linear.tokens = x.numel() / linear.columns;
    linear.x = x.const_data_ptr<float>();
    linear.weight = bytes_of(weight);
    if (const et::EValue& value = args.of(matrix, kBias); value.isTensor()) {
        const Tensor& bias = value.toTensor();
        if (bias.dim() != 1 || bias.size(0) != linear.rows) return false;
        linear.bias = bias.const_data_ptr<float>();
    }
    return holds(weight, linear);
}

/// Gives the result the first dimensions of another tensor, and a last one of `size`.
bool resize(Tensor out, const Tensor& like, int64_t size) {
    SizesType shape[kMostDimensions];
    const auto dims = static_cast<size_t>(out.dim());
    for (size_t i = 0; i + 1 < dims; ++i) shape[i] = static_cast<SizesType>(like.size(static_cast<ptrdiff_t>(i)));
    shape[dims - 1] = static_cast<SizesType>(size);
    return et::resize_tensor(out, {shape, dims}) == et::Error::Ok && et::tensor_is_contiguous(out);
}

/// Calls multiply() with scratch memory of so many bytes.
template <class Product>
void run(et::KernelRuntimeContext& ctx, const char* name, size_t bytes, const Product& product) {
    if (bytes <= kStackBytes) {
        alignas(64) std::byte scratch[kStackBytes];
        return multiply(product, scratch, over_threads);
    }
    const et::Result<void*> scratch = ctx.allocate_temp(bytes, 64);
    ET_KERNEL_CHECK_MSG(ctx, scratch.ok(), MemoryAllocationFailed, , "%s: no memory for %zu bytes", name, bytes);
    multiply(product, static_cast<std::byte*>(*scratch), over_threads);
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
    run(ctx, name, scratch_bytes(linears[0]), std::span<const Linear>(linears));
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
    if (!is_plain(*args[kExpertX], ScalarType::Float) || !is_plain(*args[kExpertChosen], ScalarType::Long) ||
        !is_plain(*args[kExpertOut], ScalarType::Float)) {
        return false;
    }
    const Tensor& x = args[kExpertX]->toTensor();
    const Tensor& chosen = args[kExpertChosen]->toTensor();
    const Tensor& out = args[kExpertOut]->toTensor();
    return args[kExpertKind]->isString() && args[kExpertRows]->isInt() && chosen.dim() >= 1 &&
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
    run(ctx, kExpertsName, scratch_bytes(linear), linear);
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
        read_row(*type, columns, bytes_of(weight), ids[i], out.mutable_data_ptr<float>() + i * columns);
    }
}

[[maybe_unused]] const et::Error registered[] = {
    register_once(kNames[0], linear_out<1>),
    register_once(kNames[1], linear_out<2>),
    register_once(kNames[2], linear_out<3>),
};
[[maybe_unused]] const et::Error experts_registered = register_once(kExpertsName, expert_linear_out);
[[maybe_unused]] const et::Error rows_registered = register_once(kRowsName, block_rows_out);

}  // namespace

}  // namespace llama_runner
