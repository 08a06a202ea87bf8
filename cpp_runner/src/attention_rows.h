// Rows in and out of the caches' form. No include guard: see attention_kernel.h.

namespace llama_runner::LLAMA_RUNNER_SET {
namespace {

struct Rows {
    const std::byte* data;
    size_t stride;

    const std::byte* operator[](int i) const { return data + static_cast<size_t>(i) * stride; }
};

// The forms of a row. What a float16 or int8 row needs is converted in registers, an int8 row's scale left to the
// scores and weights.

struct Float32 {
    static constexpr RowForm kForm = RowForm::kFloat32;
    static constexpr size_t kBytes = 4;
};

struct Float16 {
    static constexpr RowForm kForm = RowForm::kFloat16;
    static constexpr size_t kBytes = 2;
};

struct Int8 {
    static constexpr RowForm kForm = RowForm::kInt8;
    static constexpr size_t kBytes = 1;
};

INLINE Floats load(Float32, const std::byte* from) {
    Floats x;
    __builtin_memcpy(&x, from, sizeof x);
    return x;
}

// Masked where no mask is needed: without one, GCC's headers draw warnings of uninitialized values.
#if defined(LLAMA_RUNNER_AVX512)

INLINE Floats load(Float16, const std::byte* from) {
    return (Floats)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)from));
}

INLINE Floats load(Int8, const std::byte* from) {
    return (Floats)_mm512_maskz_cvtepi32_ps(0xffff,
                                            _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128((const __m128i*)from)));
}

INLINE Halves to_halves(Floats x) {
    return (Halves)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
}

#elif defined(LLAMA_RUNNER_AVX2)

INLINE Floats load(Float16, const std::byte* from) {
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
}

INLINE Floats load(Int8, const std::byte* from) {
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
}

INLINE Halves to_halves(Floats x) { return (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }

#else

INLINE Floats load(Int8, const std::byte* from) {
    Codes codes;
    __builtin_memcpy(&codes, from, sizeof codes);
#if defined(LLAMA_RUNNER_NEON)
    const int8x8_t low = vcreate_s8(__builtin_bit_cast(uint32_t, codes));
    return (Floats)vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(low))));
#else
    return __builtin_convertvector(__builtin_convertvector(codes, Ints), Floats);
#endif
}

#if defined(LLAMA_RUNNER_NEON)

INLINE Floats load(Float16, const std::byte* from) {
    float16x4_t x;
    __builtin_memcpy(&x, from, sizeof x);
    return (Floats)vcvt_f32_f16(x);
}

INLINE Halves to_halves(Floats x) { return (Halves)vcvt_f16_f32((float32x4_t)x); }

#else

// After Fabian Giesen, https://gist.github.com/rygorous/2156668 and https://gist.github.com/rygorous/2144712.

INLINE Floats load(Float16, const std::byte* from) {
    Halves halves;
    __builtin_memcpy(&halves, from, sizeof halves);
    const Words bits = __builtin_convertvector(halves, Words);
    const Words moved = (bits & 0x7fffU) << 13;
    const Words exponent = moved & 0x0f800000U;
    const Words tiny = (Words)((Floats)(moved + (113U << 23)) - (Floats)(Words{} + (113U << 23)));
    const Words size = exponent == 0x0f800000U ? moved + (224U << 23) : (exponent == 0U ? tiny : moved + (112U << 23));
    return (Floats)(size | ((bits & 0x8000U) << 16));
}

INLINE Halves to_halves(Floats x) {
    const Words sign = (Words)x & 0x80000000U;
    const Words bits = (Words)x ^ sign;
    const Words magic = Words{} + (126U << 23);  // 0.5, whose last bit is the smallest float16
    const Words tiny = (Words)((Floats)bits + (Floats)magic) - magic;
    const Words normal = (bits - (112U << 23) + 0xfffU + ((bits >> 13) & 1U)) >> 13;
    const Words beyond = bits > 0x7f800000U ? Words{} + 0x7e00U : Words{} + 0x7c00U;
    const Words size = bits >= (143U << 23) ? beyond : (bits < (113U << 23) ? tiny : normal);
    return __builtin_convertvector(size | (sign >> 16), Halves);
}

#endif
#endif

template <class T>
INLINE void rotate_pair(T a, T b, T cos, T sin, T& turned_a, T& turned_b) {
    turned_a = rounded(a * cos) - rounded(b * sin);
    turned_b = rounded(b * cos) + rounded(a * sin);
}

/// Copies a head's row of x, with so many pairs rotated, and pads it with zeros to whole vectors.
void rotate(const Attention& attention, int64_t token, int pairs, const float* x, float* y) {
    const auto head_dim = static_cast<int>(attention.head_dim);
    const float* cos = attention.cos + token * pairs;
    const float* sin = attention.sin + token * pairs;
    int i = 0;
    for (; i + kLanes <= pairs; i += kLanes) {
        Floats a, b;
        rotate_pair(load(x + i), load(x + i + pairs), load(cos + i), load(sin + i), a, b);
        store(y + i, a);
        store(y + i + pairs, b);
    }
    for (; i < pairs; ++i) rotate_pair(x[i], x[i + pairs], cos[i], sin[i], y[i], y[i + pairs]);
    for (i = 2 * pairs; i < head_dim; ++i) y[i] = x[i];
    for (; i % kLanes != 0; ++i) y[i] = 0;
}

void quantize(const float* x, int head_dim, std::byte* to) {
    Floats most{};
    for (int i = 0; i < head_dim; i += kLanes) most = greater(absolute(load(x + i)), most);
    const float scale = greatest_of(most) / 127.0f;
    for (int i = 0; i < head_dim; i += kLanes) {
        Floats code = round_even(load(x + i) / scale);
        code = code < 127.0f ? code : splat(127.0f);
        code = code > -127.0f ? code : splat(-127.0f);
        if (scale == 0) code = Floats{};
        const Codes codes = __builtin_convertvector(__builtin_convertvector(code, Ints), Codes);
        const int count = head_dim - i < kLanes ? head_dim - i : kLanes;
        __builtin_memcpy(to + i, &codes, static_cast<size_t>(count));
    }
    __builtin_memcpy(to + head_dim, &scale, sizeof scale);
}

/// Writes a row, padded to whole vectors, in the caches' form.
void write_row(RowForm form, const float* x, int head_dim, std::byte* to) {
    if (form == RowForm::kInt8) return quantize(x, head_dim, to);
    for (int i = 0; i < head_dim; i += kLanes) {
        const auto count = static_cast<size_t>(head_dim - i < kLanes ? head_dim - i : kLanes);
        if (form == RowForm::kFloat32) {
            __builtin_memcpy(to + static_cast<size_t>(i) * sizeof(float), x + i, count * sizeof(float));
        } else {
            const Halves halves = to_halves(load(x + i));
            __builtin_memcpy(to + static_cast<size_t>(i) * sizeof(uint16_t), &halves, count * sizeof(uint16_t));
        }
    }
}

/// Writes one token's k_rows and v_rows.
void append(const Attention& attention, int64_t token) {
    alignas(64) float row[kMostHeadDim + kLanes];
    const auto head_dim = static_cast<int>(attention.head_dim);
    const auto stride = static_cast<int64_t>(row_bytes(attention.form, head_dim));
    const int64_t b = token / attention.length;
    for (int64_t h = 0; h < attention.kv_heads; ++h) {
        const int64_t from = (token * attention.kv_heads + h) * head_dim;
        const int64_t to = ((b * attention.kv_heads + h) * attention.length + token % attention.length) * stride;
        rotate(attention, token, static_cast<int>(attention.rope_pairs), attention.k + from, row);
        write_row(attention.form, row, head_dim, attention.k_rows + to);
        rotate(attention, token, 0, attention.v + from, row);
        write_row(attention.form, row, head_dim, attention.v_rows + to);
    }
}

/// Converts rows to floats, padded to whole vectors; the scale of an int8 row stays apart.
template <class T>
Rows gather(Rows rows, int count, int head_dim, float* to) {
    const int whole = head_dim / kLanes * kLanes;
    const int width = (head_dim + kLanes - 1) / kLanes * kLanes;
    for (int j = 0; j < count; ++j) {
        const std::byte* from = rows[j];
        float* row = to + j * width;
        for (int d = 0; d < whole; d += kLanes) store(row + d, load(T(), from + static_cast<size_t>(d) * T::kBytes));
        if (whole == width) continue;
        std::byte rest[kLanes * T::kBytes]{};
        __builtin_memcpy(rest, from + static_cast<size_t>(whole) * T::kBytes,
                         static_cast<size_t>(head_dim - whole) * T::kBytes);
        store(row + whole, load(T(), rest));
    }
    return {reinterpret_cast<const std::byte*>(to), static_cast<size_t>(width) * sizeof(float)};
}

/// See attention.h.
void turn(const Attention& attention, std::byte* row) {
    alignas(64) float given[kMostHeadDim + kLanes];
    alignas(64) float turned[kMostHeadDim + kLanes];
    const auto head_dim = static_cast<int>(attention.head_dim);
    const Rows rows{row, 0};
    float scale = 1;
    switch (attention.form) {
        case RowForm::kFloat32:
            gather<Float32>(rows, 1, head_dim, given);
            break;
        case RowForm::kFloat16:
            gather<Float16>(rows, 1, head_dim, given);
            break;
        case RowForm::kInt8:
            gather<Int8>(rows, 1, head_dim, given);
            __builtin_memcpy(&scale, row + head_dim, sizeof scale);
            break;
    }
    for (int i = 0; i < head_dim; ++i) given[i] *= scale;
    rotate(attention, 0, static_cast<int>(attention.rope_pairs), given, turned);
    write_row(attention.form, turned, head_dim, row);
}

INLINE void gather_scales(Rows rows, int count, int head_dim, float* scales) {
    for (int j = 0; j < count; ++j) __builtin_memcpy(scales + j, rows[j] + head_dim, sizeof(float));
}

/// A decoding step waits for memory: while keys are read their values are fetched, and then the next block's keys.
INLINE void prefetch(const std::byte* from, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

}  // namespace
}  // namespace llama_runner::LLAMA_RUNNER_SET
