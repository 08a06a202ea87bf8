// Vectors of LLAMA_RUNNER_LANES floats and what attention needs of them. No include guard: attention_kernel.h includes
// it once for each instruction set. Everything has internal linkage and no lambdas, and the standard library's
// templates are kept out: the linker must not take one compiled for AVX-512 for all of the program.

namespace llama_runner::LLAMA_RUNNER_SET {
namespace {

#define INLINE inline __attribute__((always_inline))
#define UNROLL LLAMA_RUNNER_UNROLL

constexpr int kLanes = LLAMA_RUNNER_LANES;

typedef float Floats __attribute__((vector_size(4 * LLAMA_RUNNER_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LLAMA_RUNNER_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LLAMA_RUNNER_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LLAMA_RUNNER_LANES)));
typedef int8_t Codes __attribute__((vector_size(LLAMA_RUNNER_LANES)));
using Lanes = std::make_integer_sequence<int, kLanes>;

INLINE Floats splat(float x) { return x - Floats{}; }

INLINE Floats load(const float* from) {
    Floats x;
    __builtin_memcpy(&x, from, sizeof x);
    return x;
}

INLINE void store(float* to, Floats x) { __builtin_memcpy(to, &x, sizeof x); }

INLINE Floats greater(Floats a, Floats b) { return a > b ? a : b; }

INLINE Floats absolute(Floats x) { return (Floats)((Words)x & 0x7fffffffU); }

/// Nearest integers, halves to even, for |x| < 2^22.
INLINE Floats round_even(Floats x) { return (x + 12582912.0f) - 12582912.0f; }

/// Keeps a product out of a fused multiply-add: the rows of a cache must not depend on the CPU.
template <class T>
INLINE T rounded(T x) {
    asm("" : "+m"(x));
    return x;
}

// Of two vectors, the lanes whose number lacks the bit STEP, or those whose number has it. The others' places take
// those of b.

template <int STEP, int... I>
INLINE Floats without_bit(Floats a, Floats b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, ((I & STEP) == 0 ? I : kLanes + I - STEP)...);
}

template <int STEP, int... I>
INLINE Floats with_bit(Floats a, Floats b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, ((I & STEP) == 0 ? I + STEP : kLanes + I)...);
}

/// Lane i of x[0] becomes the sum of x[i].
template <int STEP = kLanes / 2>
INLINE void fold_sums(Floats* x) {
    UNROLL
    for (int i = 0; i < STEP; ++i) {
        x[i] = without_bit<STEP>(x[i], x[i + STEP], Lanes()) + with_bit<STEP>(x[i], x[i + STEP], Lanes());
    }
    if constexpr (STEP > 1) fold_sums<STEP / 2>(x);
}

template <int STEP = kLanes / 2>
INLINE void transpose(Floats* x) {
    UNROLL
    for (int i = 0; i < kLanes; ++i) {
        if ((i & STEP) != 0) continue;
        const Floats swapped = without_bit<STEP>(x[i], x[i + STEP], Lanes());
        x[i + STEP] = with_bit<STEP>(x[i], x[i + STEP], Lanes());
        x[i] = swapped;
    }
    if constexpr (STEP > 1) transpose<STEP / 2>(x);
}

template <int STEP = kLanes / 2>
INLINE float sum_of(Floats x) {
    const Floats sum = without_bit<STEP>(x, x, Lanes()) + with_bit<STEP>(x, x, Lanes());
    if constexpr (STEP > 1) {
        return sum_of<STEP / 2>(sum);
    } else {
        return sum[0];
    }
}

template <int STEP = kLanes / 2>
INLINE float greatest_of(Floats x) {
    const Floats most = greater(without_bit<STEP>(x, x, Lanes()), with_bit<STEP>(x, x, Lanes()));
    if constexpr (STEP > 1) {
        return greatest_of<STEP / 2>(most);
    } else {
        return most[0];
    }
}

template <int... I>
INLINE Ints iota(std::integer_sequence<int, I...>) {
    return Ints{I...};
}

/// e^x for x up to 88; 0 below the smallest normal number. The polynomial is that of Cephes' expf.
INLINE Floats exponential(Floats x) {
    const Floats shifted = x * 1.44269504088896341f + 12582912.0f;  // the low bits now hold the exponent
    const Floats n = shifted - 12582912.0f;
    const Floats f = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Floats y = f * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * f + 8.3334519073e-3f;
    y = y * f + 4.1665795894e-2f;
    y = y * f + 1.6666665459e-1f;
    y = y * f + 5.0000001201e-1f;
    y = y * (f * f) + f + 1.0f;
    const auto scale = (Floats)(((Words)shifted << 23) + 0x3f800000U);
    return (Floats)((Ints)(y * scale) & ~(x < -87.0f));  // what is not a number stays so
}

/// tanh, by Cephes' tanhf.
INLINE Floats hyperbolic_tangent(Floats x) {
    const Floats size = absolute(x);
    const Floats z = x * x;
    Floats y = z * -5.70498872745e-3f + 2.06390887954e-2f;
    y = y * z - 5.37397155531e-2f;
    y = y * z + 1.33314422036e-1f;
    y = y * z - 3.33332819422e-1f;
    const Floats small = y * z * x + x;
    const Floats doubled = size + size;
    const Floats large = 1.0f - 2.0f / (exponential(doubled < 40.0f ? doubled : splat(40.0f)) + 1.0f);
    const auto signed_large = (Floats)((Words)large | ((Words)x & 0x80000000U));
    return size < 0.625f ? small : signed_large;
}

}  // namespace
}  // namespace llama_runner::LLAMA_RUNNER_SET
