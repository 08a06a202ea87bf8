// llama_pte::attention.out, an ExecuTorch operator that calls attend() of attention.h:
//
//   attention(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor? slopes, Tensor k_cache, Tensor v_cache,
//             Tensor start, float scale, float softcap, int window, *,
//             Tensor(a!) out, Tensor(b!) k_rows, Tensor(c!) v_rows) -> (Tensor(a!), Tensor(b!), Tensor(c!))
//
// Linking this file registers it.

#include <executorch/runtime/kernel/kernel_includes.h>

#include <cmath>
#include <initializer_list>

#include "attention/attention.h"
#include "attention/operators.h"

namespace et = executorch::runtime;

namespace llama_runner {

namespace {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::Tensor;

constexpr const char* kName = "llama_pte::attention.out";
constexpr int64_t kMostPosition = int64_t{1} << 40;  // so that sums of positions cannot overflow

enum Argument : size_t {
    kQ,
    kK,
    kV,
    kCos,
    kSin,
    kSlopes,
    kKCache,
    kVCache,
    kStart,
    kScale,
    kSoftcap,
    kWindow,
    kOut,
    kKRows,
    kVRows,
    kArguments,
};

bool is(const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> shape) {
    if (tensor.scalar_type() != dtype || tensor.dim() != static_cast<ptrdiff_t>(shape.size())) return false;
    if (!et::tensor_is_contiguous(tensor)) return false;
    ptrdiff_t i = 0;
    for (const int64_t size : shape) {
        if (tensor.size(i++) != size) return false;
    }
    return true;
}

/// Checks the types of all arguments, and the ranks of those from which sizes are taken.
bool well_typed(et::Span<et::EValue*> args) {
    if (args.size() < kArguments) return false;
    for (const size_t i : {kQ, kK, kV, kKCache, kVCache, kStart, kOut, kKRows, kVRows}) {
        if (!args[i]->isTensor()) return false;
    }
    for (const size_t i : {kCos, kSin, kSlopes}) {
        if (!args[i]->isTensor() && !args[i]->isNone()) return false;
    }
    for (const size_t i : {kQ, kK, kKCache, kOut, kKRows, kVRows}) {
        if (args[i]->toTensor().dim() != 3) return false;
    }
    if (args[kCos]->isTensor() && args[kCos]->toTensor().dim() != 3) return false;
    return args[kScale]->isDouble() && args[kSoftcap]->isDouble() && args[kWindow]->isInt();
}

bool form_of(ScalarType dtype, RowForm& form) {
    switch (dtype) {
        case ScalarType::Float:
            form = RowForm::kFloat32;
            return true;
        case ScalarType::Half:
            form = RowForm::kFloat16;
            return true;
        case ScalarType::Char:
            form = RowForm::kInt8;
            return true;
        default:
            return false;
    }
}

/// Reads the sizes from the tensors; returns false if they are invalid.
bool measure(et::Span<et::EValue*> args, Attention& a) {
    const Tensor& q = args[kQ]->toTensor();
    const Tensor& cache = args[kKCache]->toTensor();
    if (!form_of(cache.scalar_type(), a.form)) return false;
    a.batch = q.size(0);
    a.length = q.size(1);
    a.slots = cache.size(1);
    a.head_dim = cache.size(2) - (a.form == RowForm::kInt8 ? static_cast<int64_t>(sizeof(float)) : 0);
    if (a.head_dim < 1 || a.head_dim > kMostHeadDim) return false;
    a.heads = q.size(2) / a.head_dim;
    a.kv_heads = args[kK]->toTensor().size(2) / a.head_dim;
    if (a.kv_heads < 1 || a.heads < 1 || a.heads % a.kv_heads != 0) return false;
    a.rope_pairs = args[kCos]->isTensor() ? args[kCos]->toTensor().size(2) : 0;
    a.scale = static_cast<float>(args[kScale]->toDouble());
    a.softcap = static_cast<float>(args[kSoftcap]->toDouble());
    a.window = args[kWindow]->toInt();
    return 2 * a.rope_pairs <= a.head_dim && std::isfinite(a.scale) && a.softcap >= 0 && std::isfinite(a.softcap) &&
           a.window >= 0 && a.window <= kMostPosition && args[kCos]->isTensor() == args[kSin]->isTensor();
}

bool well_shaped(et::Span<et::EValue*> args, const Attention& a) {
    const auto tensor = [&](Argument i) -> const Tensor& { return args[i]->toTensor(); };
    const ScalarType form = tensor(kKCache).scalar_type();
    const int64_t width = tensor(kKCache).size(2);
    for (const Argument i : {kK, kV}) {
        if (!is(tensor(i), ScalarType::Float, {a.batch, a.length, a.kv_heads * a.head_dim})) return false;
    }
    for (const Argument i : {kKCache, kVCache}) {
        if (!is(tensor(i), form, {a.batch * a.kv_heads, a.slots, width})) return false;
    }
    for (const Argument i : {kCos, kSin}) {
        if (!args[i]->isNone() && !is(tensor(i), ScalarType::Float, {a.batch, a.length, a.rope_pairs})) return false;
    }
    return is(tensor(kQ), ScalarType::Float, {a.batch, a.length, a.heads * a.head_dim}) &&
           (args[kSlopes]->isNone() || is(tensor(kSlopes), ScalarType::Float, {a.heads})) &&
           is(tensor(kStart), ScalarType::Long, {a.batch}) && tensor(kOut).scalar_type() == ScalarType::Float &&
           tensor(kKRows).scalar_type() == form && tensor(kVRows).scalar_type() == form;
}

bool resize(Tensor tensor, int64_t rows, int64_t length, int64_t width) {
    const SizesType shape[] = {static_cast<SizesType>(rows), static_cast<SizesType>(length),
                               static_cast<SizesType>(width)};
    return et::resize_tensor(tensor, {shape, 3}) == et::Error::Ok && et::tensor_is_contiguous(tensor);
}

void attention_out(et::KernelRuntimeContext& ctx, et::Span<et::EValue*> args) {
    ET_KERNEL_CHECK_MSG(ctx, well_typed(args), InvalidArgument, , "%s: the types are not those of its schema", kName);
    Attention a{};
    ET_KERNEL_CHECK_MSG(ctx, measure(args, a), InvalidArgument, , "%s: invalid sizes or numbers", kName);
    ET_KERNEL_CHECK_MSG(ctx, well_shaped(args, a), InvalidArgument, , "%s: shapes or dtypes do not match", kName);
    const Tensor& out = args[kOut]->toTensor();
    const Tensor& k_rows = args[kKRows]->toTensor();
    const Tensor& v_rows = args[kVRows]->toTensor();
    const int64_t width = args[kKCache]->toTensor().size(2);
    ET_KERNEL_CHECK_MSG(ctx,
                        resize(out, a.batch, a.length, a.heads * a.head_dim) &&
                            resize(k_rows, a.batch * a.kv_heads, a.length, width) &&
                            resize(v_rows, a.batch * a.kv_heads, a.length, width),
                        InvalidArgument, , "%s: the results do not fit", kName);
    a.position = args[kStart]->toTensor().const_data_ptr<int64_t>();
    for (int64_t b = 0; b < a.batch; ++b) {
        ET_KERNEL_CHECK_MSG(ctx, a.position[b] >= 0 && a.position[b] <= kMostPosition, InvalidArgument, ,
                            "%s: invalid position", kName);
    }
    const auto floats = [&](Argument i) {
        return args[i]->isTensor() ? args[i]->toTensor().const_data_ptr<float>() : nullptr;
    };
    a.q = floats(kQ);
    a.k = floats(kK);
    a.v = floats(kV);
    a.cos = floats(kCos);
    a.sin = floats(kSin);
    a.slopes = floats(kSlopes);
    a.k_cache = static_cast<const std::byte*>(args[kKCache]->toTensor().const_data_ptr());
    a.v_cache = static_cast<const std::byte*>(args[kVCache]->toTensor().const_data_ptr());
    a.out = out.mutable_data_ptr<float>();
    a.k_rows = static_cast<std::byte*>(k_rows.mutable_data_ptr());
    a.v_rows = static_cast<std::byte*>(v_rows.mutable_data_ptr());
    attend(a, over_threads);
}

[[maybe_unused]] const et::Error registered = register_once(kName, attention_out);

}  // namespace

}  // namespace llama_runner
