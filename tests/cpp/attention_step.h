#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <ostream>
#include <random>
#include <vector>

#include "attention/attention.h"

namespace llama_runner {

struct Shape {
    int64_t heads, kv_heads, head_dim, length, slots;
    std::vector<int64_t> position;
    int64_t rope_pairs = 0, window = 0;
    float softcap = 0;
    bool alibi = false;
};

inline void PrintTo(const Shape& shape, std::ostream* out) {
    *out << "H " << shape.heads << " K " << shape.kv_heads << " Dh " << shape.head_dim << " L " << shape.length << " T "
         << shape.slots << " at " << shape.position[0] << " of " << shape.position.size() << " P " << shape.rope_pairs
         << " window " << shape.window << " softcap " << shape.softcap << " alibi " << shape.alibi;
}

/// Rounds to the nearest float16, ties to even, by float64 arithmetic.
inline uint16_t float16_bits(float x) {
    const auto sign = static_cast<uint16_t>(std::signbit(x) ? 0x8000 : 0);
    const double size = std::abs(static_cast<double>(x));
    if (size >= 65520) return sign | 0x7c00;
    int exponent = size == 0 ? -14 : std::max(std::ilogb(size), -14);
    double units = std::nearbyint(std::ldexp(size, 10 - exponent));
    if (units == 2048) {
        units = 1024;
        ++exponent;
    }
    const int biased = units < 1024 ? 0 : exponent + 15;
    return static_cast<uint16_t>(sign | (biased << 10) | (static_cast<int>(units) & 0x3ff));
}

inline float float16_value(uint16_t bits) {
    const int biased = bits >> 10 & 0x1f;
    const int mantissa = bits & 0x3ff;
    const float size = biased == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                   : std::ldexp(static_cast<float>(mantissa + 1024), biased - 25);
    return bits >> 15 != 0 ? -size : size;
}

inline void write_row(RowForm form, const float* x, size_t count, std::byte* to) {
    if (form == RowForm::kFloat32) std::memcpy(to, x, count * sizeof(float));
    if (form == RowForm::kFloat16) {
        for (size_t d = 0; d < count; ++d) {
            const uint16_t bits = float16_bits(x[d]);
            std::memcpy(to + 2 * d, &bits, 2);
        }
    }
    if (form != RowForm::kInt8) return;
    float most = 0;
    for (size_t d = 0; d < count; ++d) most = std::max(most, std::abs(x[d]));
    const float scale = most / 127.0f;
    for (size_t d = 0; d < count; ++d) {
        to[d] = std::byte(static_cast<int8_t>(most == 0 ? 0 : std::nearbyint(x[d] / scale)));
    }
    std::memcpy(to + count, &scale, sizeof scale);
}

/// Returns the numbers in a cache's rows.
inline std::vector<double> read_rows(RowForm form, const std::vector<std::byte>& rows, size_t count) {
    const size_t width = row_bytes(form, static_cast<int64_t>(count));
    std::vector<double> numbers;
    numbers.reserve(rows.size() / width * count);
    for (const std::byte* row = rows.data(); row != rows.data() + rows.size(); row += width) {
        float scale;
        if (form == RowForm::kInt8) std::memcpy(&scale, row + count, sizeof scale);
        for (size_t d = 0; d < count; ++d) {
            float x;
            uint16_t bits;
            if (form == RowForm::kFloat32) std::memcpy(&x, row + 4 * d, sizeof x);
            if (form == RowForm::kFloat16) {
                std::memcpy(&bits, row + 2 * d, sizeof bits);
                x = float16_value(bits);
            }
            numbers.push_back(form == RowForm::kInt8
                                  ? static_cast<double>(static_cast<int8_t>(row[d])) * static_cast<double>(scale)
                                  : static_cast<double>(x));
        }
    }
    return numbers;
}

/// An attention step on random numbers, and its expected results.
struct AttentionStep {
    Attention a{};
    std::vector<int64_t> position;
    std::vector<float> q, k, v, cos, sin, slopes, out;
    std::vector<std::byte> k_cache, v_cache, k_rows, v_rows;

    AttentionStep(const Shape& shape, RowForm form, uint32_t seed = 1) : position(shape.position) {
        std::mt19937 engine(seed);
        std::normal_distribution<float> normal;
        const auto random = [&](std::vector<float>& to, int64_t count) {
            to.resize(static_cast<size_t>(count));
            for (float& x : to) x = normal(engine);
        };
        const auto batch = static_cast<int64_t>(position.size());
        const int64_t tokens = batch * shape.length;
        a.batch = batch;
        a.heads = shape.heads;
        a.kv_heads = shape.kv_heads;
        a.head_dim = shape.head_dim;
        a.length = shape.length;
        a.slots = shape.slots;
        a.rope_pairs = shape.rope_pairs;
        a.window = shape.window;
        a.scale = 0.9f / std::sqrt(static_cast<float>(shape.head_dim));
        a.softcap = shape.softcap;
        a.form = form;
        random(q, tokens * a.heads * a.head_dim);
        random(k, tokens * a.kv_heads * a.head_dim);
        random(v, tokens * a.kv_heads * a.head_dim);
        random(cos, tokens * a.rope_pairs);
        sin = cos;
        for (size_t i = 0; i < cos.size(); ++i) {
            sin[i] = std::sin(3 * cos[i]);
            cos[i] = std::cos(3 * cos[i]);
        }
        for (int64_t h = 0; h < a.heads; ++h) slopes.push_back(std::exp2(-static_cast<float>(h + 1)));
        const size_t width = row_bytes(form, a.head_dim);
        const auto caches = static_cast<size_t>(batch * a.kv_heads);
        k_rows.resize(caches * static_cast<size_t>(a.length) * width);
        v_rows = k_rows;
        for (std::vector<std::byte>* cache : {&k_cache, &v_cache}) {
            const size_t rows = caches * static_cast<size_t>(a.slots);
            std::vector<float> row;
            cache->resize(rows * width);
            for (size_t i = 0; i < rows; ++i) {
                random(row, a.head_dim);
                write_row(form, row.data(), row.size(), cache->data() + i * width);
            }
        }
        out.resize(q.size(), -1);
        a.q = q.data();
        a.k = k.data();
        a.v = v.data();
        a.cos = a.rope_pairs > 0 ? cos.data() : nullptr;
        a.sin = a.rope_pairs > 0 ? sin.data() : nullptr;
        a.slopes = shape.alibi ? slopes.data() : nullptr;
        a.k_cache = k_cache.data();
        a.v_cache = v_cache.data();
        a.position = position.data();
        a.out = out.data();
        a.k_rows = k_rows.data();
        a.v_rows = v_rows.data();
    }
    AttentionStep(const AttentionStep&) = delete;

    /// Returns the row of head h of x at a token, rotated. `volatile` keeps the compiler from rounding a product and a
    /// sum only once.
    std::vector<float> rotated(const std::vector<float>& x, int64_t token, int64_t heads, int64_t h) const {
        const auto start = x.begin() + (token * heads + h) * a.head_dim;
        std::vector<float> row(start, start + a.head_dim);
        const auto pairs = static_cast<size_t>(a.rope_pairs);
        for (size_t i = 0; i < pairs; ++i) {
            const float c = cos[static_cast<size_t>(token) * pairs + i];
            const float s = sin[static_cast<size_t>(token) * pairs + i];
            const volatile float ac = row[i] * c, bs = row[i + pairs] * s, bc = row[i + pairs] * c, as = row[i] * s;
            row[i] = ac - bs;
            row[i + pairs] = bc + as;
        }
        return row;
    }

    void expected_rows(std::vector<std::byte>& keys, std::vector<std::byte>& values) const {
        const size_t width = row_bytes(a.form, a.head_dim);
        keys.resize(k_rows.size());
        values.resize(v_rows.size());
        for (int64_t i = 0; i < a.batch * a.kv_heads * a.length; ++i) {
            const int64_t h = i / a.length % a.kv_heads;
            const int64_t token = i / a.length / a.kv_heads * a.length + i % a.length;
            const std::vector<float> key = rotated(k, token, a.kv_heads, h);
            write_row(a.form, key.data(), key.size(), keys.data() + static_cast<size_t>(i) * width);
            write_row(a.form, v.data() + (token * a.kv_heads + h) * a.head_dim, key.size(),
                      values.data() + static_cast<size_t>(i) * width);
        }
    }

    /// Cached and new keys and values as float64.
    struct Numbers {
        std::vector<double> k_cache, v_cache, k_rows, v_rows;
    };

    /// Returns the expected result of one query head of one token, in float64.
    std::vector<double> expected(const Numbers& numbers, int64_t token, int64_t head) const {
        const int64_t b = token / a.length;
        const int64_t sequence_head = b * a.kv_heads + head / (a.heads / a.kv_heads);
        const auto dim = static_cast<size_t>(a.head_dim);
        const std::vector<float> query = rotated(q, token, a.heads, head);
        const int64_t start = position[static_cast<size_t>(b)];
        const int64_t p = start + token % a.length;
        const auto cap = static_cast<double>(a.softcap);
        std::vector<double> scores;
        std::vector<const double*> values;
        for (int64_t c = std::max(int64_t{0}, start - a.slots); c <= p; ++c) {
            if (a.window > 0 && c <= p - a.window) continue;
            const bool cached = c < start;
            const int64_t row = cached ? sequence_head * a.slots + c % a.slots : sequence_head * a.length + c - start;
            const double* key = (cached ? numbers.k_cache : numbers.k_rows).data() + row * a.head_dim;
            double score = 0;
            for (size_t d = 0; d < dim; ++d) score += static_cast<double>(query[d]) * key[d];
            score *= static_cast<double>(a.scale);
            if (cap != 0) score = cap * std::tanh(score / cap);
            const auto slope = static_cast<double>(a.slopes == nullptr ? 0 : slopes[static_cast<size_t>(head)]);
            scores.push_back(score - slope * static_cast<double>(p - c));
            values.push_back((cached ? numbers.v_cache : numbers.v_rows).data() + row * a.head_dim);
        }
        const double most = *std::ranges::max_element(scores);
        double sum = 0;
        std::vector<double> result(dim);
        for (size_t j = 0; j < values.size(); ++j) {
            const double weight = std::exp(scores[j] - most);
            sum += weight;
            for (size_t d = 0; d < dim; ++d) result[d] += weight * values[j][d];
        }
        for (double& x : result) x /= sum;
        return result;
    }

    /// Returns the largest error of the results, relative to the largest result.
    double error() const {
        const auto dim = static_cast<size_t>(a.head_dim);
        const Numbers numbers = {read_rows(a.form, k_cache, dim), read_rows(a.form, v_cache, dim),
                                 read_rows(a.form, k_rows, dim), read_rows(a.form, v_rows, dim)};
        double most = 0;
        double worst = 0;
        for (int64_t token = 0; token < a.batch * a.length; ++token) {
            for (int64_t head = 0; head < a.heads; ++head) {
                const std::vector<double> result = expected(numbers, token, head);
                for (size_t d = 0; d < result.size(); ++d) {
                    const auto got =
                        static_cast<double>(out[static_cast<size_t>((token * a.heads + head) * a.head_dim) + d]);
                    most = std::max(most, std::abs(result[d]));
                    worst = std::isfinite(got) ? std::max(worst, std::abs(result[d] - got)) : HUGE_VAL;
                }
            }
        }
        return worst / most;
    }
};

}  // namespace llama_runner
