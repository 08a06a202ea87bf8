// Attention on one instruction set. No include guard: attention.cpp includes it once for each, having set
// LLAMA_RUNNER_SET, the namespace, LLAMA_RUNNER_LANES and LLAMA_RUNNER_REGISTERS, how many vectors the CPU holds.
//
// Query rows that share a KV head are taken kTileRows at a time against kTileKeys keys at a time, with the softmax
// carried along as in FlashAttention (https://arxiv.org/abs/2205.14135). Many rows share a block of keys that was
// transposed for them, so that scores need no sums across lanes; a few, as in decoding, read the cache as it lies.

#include "attention_vector.h"
//
#include "attention_rows.h"

namespace llama_runner::LLAMA_RUNNER_SET {
namespace {

constexpr int kFewRows = 8;
constexpr int kRowsAtOnce = LLAMA_RUNNER_REGISTERS == 32 ? 8 : 4;
constexpr int kSumsAtOnce = LLAMA_RUNNER_REGISTERS / 2;
constexpr float kNothing = -__builtin_inff();

/// The query rows of a task. Row numbers count over (token, head of the group): neighbours see the same keys.
struct Tile {
    alignas(64) float q[kTileRows * kMostHeadDim];     // rotated, scaled and padded to whole vectors
    alignas(64) float out[kTileRows * kMostHeadDim];   // weighted sums of values so far
    alignas(64) float scores[kTileRows * kTileKeys];   // then weights
    alignas(64) float keys[kMostHeadDim * kTileKeys];  // a block of keys, transposed
    alignas(64) float gathered[kTileKeys * kMostHeadDim];
    alignas(64) float k_scale[kTileKeys];
    alignas(64) float v_scale[kTileKeys];
    Floats sum[kTileRows];
    float max[kTileRows];
    float correction[kTileRows];  // of sum and out, when max has grown
    float slope[kTileRows];
    int64_t position[kTileRows];
    int rows;
    int head_dim;
    int width;  // head_dim, padded
};

// Scores

/// Scores of R query rows, from keys as they lie in the cache: sums of products, folded across lanes many at a time.
template <class T, int R>
INLINE void score_few(Tile& tile, int row, Rows keys, int count, Rows ahead) {
    constexpr int kKeys = kSumsAtOnce / R;
    const float* q = tile.q + row * tile.width;
    for (int j = 0; j < count; j += kKeys) {
        const std::byte* key[kKeys];
        UNROLL
        for (int i = 0; i < kKeys; ++i) {
            key[i] = keys[j + i < count ? j + i : count - 1];
            if (row == 0) prefetch(ahead[j + i], ahead.stride);
        }
        Floats sums[kSumsAtOnce]{};
        for (int d = 0; d < tile.width; d += kLanes) {
            UNROLL
            for (int i = 0; i < kKeys; ++i) {
                const Floats x = load(T(), key[i] + static_cast<size_t>(d) * T::kBytes);
                UNROLL
                for (int r = 0; r < R; ++r) sums[r * kKeys + i] += load(q + r * tile.width + d) * x;
            }
        }
        float totals[kSumsAtOnce];
        UNROLL
        for (int i = 0; i < kSumsAtOnce; i += kLanes) {
            fold_sums(sums + i);
            store(totals + i, sums[i]);
        }
        float* scores = tile.scores + row * kTileKeys + j;
        UNROLL
        for (int r = 0; r < R; ++r) __builtin_memcpy(scores + r * kTileKeys, totals + r * kKeys, kKeys * sizeof(float));
    }
}

/// Transposes a block of keys, with zeros to an even number of vectors.
template <class T>
void pack(Tile& tile, Rows keys, int count) {
    for (int j = 0; j < count || j / kLanes % 2 != 0; j += kLanes) {
        for (int d = 0; d < tile.width; d += kLanes) {
            Floats x[kLanes];
            UNROLL
            for (int i = 0; i < kLanes; ++i) {
                x[i] = j + i < count ? load(T(), keys[j + i] + static_cast<size_t>(d) * T::kBytes) : Floats{};
            }
            transpose(x);
            UNROLL
            for (int i = 0; i < kLanes; ++i) store(tile.keys + (d + i) * kTileKeys + j, x[i]);
        }
    }
}

template <int R>
INLINE void score_packed(Tile& tile, int row, int count) {
    const float* q = tile.q + row * tile.width;
    for (int j = 0; j < count; j += 2 * kLanes) {
        Floats sums[R][2]{};
        for (int d = 0; d < tile.head_dim; ++d) {
            const Floats low = load(tile.keys + d * kTileKeys + j);
            const Floats high = load(tile.keys + d * kTileKeys + j + kLanes);
            UNROLL
            for (int r = 0; r < R; ++r) {
                const Floats x = splat(q[r * tile.width + d]);
                sums[r][0] += x * low;
                sums[r][1] += x * high;
            }
        }
        UNROLL
        for (int r = 0; r < R; ++r) {
            store(tile.scores + (row + r) * kTileKeys + j, sums[r][0]);
            store(tile.scores + (row + r) * kTileKeys + j + kLanes, sums[r][1]);
        }
    }
}

template <class T>
void score(Tile& tile, Rows keys, int count, Rows ahead) {
    int row = 0;
    if (tile.rows <= kFewRows) {
        for (; row + 4 <= tile.rows; row += 4) score_few<T, 4>(tile, row, keys, count, ahead);
        for (; row + 2 <= tile.rows; row += 2) score_few<T, 2>(tile, row, keys, count, ahead);
        if (row < tile.rows) score_few<T, 1>(tile, row, keys, count, ahead);
        return;
    }
    pack<T>(tile, keys, count);
    for (; row + kRowsAtOnce <= tile.rows; row += kRowsAtOnce) score_packed<kRowsAtOnce>(tile, row, count);
    for (; row + 2 <= tile.rows; row += 2) score_packed<2>(tile, row, count);
    if (row < tile.rows) score_packed<1>(tile, row, count);
}

// Softmax

/// Turns a row's scores of the keys from position `first` on into weights, relative to the highest score so far.
template <bool SCALED>
INLINE void weigh(const Attention& attention, Tile& tile, int row, int64_t first, int count) {
    const int vectors = (count + kLanes - 1) / kLanes;
    float* scores = tile.scores + row * kTileKeys;
    const int64_t last = tile.position[row] - first;
    const int64_t before = attention.window > 0 ? last - attention.window : -1;
    const int end = last < count - 1 ? static_cast<int>(last) + 1 : count;
    const int begin = before < 0 ? 0 : before < count ? static_cast<int>(before) + 1 : count;
    tile.correction[row] = 1;
    if (begin >= end) {
        for (int i = 0; i < vectors; ++i) store(scores + i * kLanes, Floats{});
        return;
    }
    const bool all = begin == 0 && end == vectors * kLanes;
    const Ints lanes = iota(Lanes());
    Floats most = splat(tile.max[row]);
    for (int i = 0; i < vectors; ++i) {
        Floats x = load(scores + i * kLanes);
        if (SCALED) x *= load(tile.k_scale + i * kLanes);
        if (attention.softcap != 0) x = attention.softcap * hyperbolic_tangent(x / attention.softcap);
        if (attention.slopes != nullptr) {
            const auto distance = static_cast<float>(last - i * kLanes);
            x -= tile.slope[row] * (distance - __builtin_convertvector(lanes, Floats));
        }
        if (!all) {
            const Ints key = lanes + i * kLanes;
            x = ((key >= begin) & (key < end)) ? x : splat(kNothing);
        }
        most = greater(x, most);
        store(scores + i * kLanes, x);
    }
    const float max = greatest_of(most);
    const float correction = exponential(splat(tile.max[row] - max))[0];
    Floats sum = tile.sum[row] * correction;
    for (int i = 0; i < vectors; ++i) {
        Floats x = exponential(load(scores + i * kLanes) - max);
        sum += x;
        if (SCALED) x *= load(tile.v_scale + i * kLanes);
        store(scores + i * kLanes, x);
    }
    tile.sum[row] = sum;
    tile.max[row] = max;
    tile.correction[row] = correction;
}

// Weighted sums

template <class T, int R, int V>
INLINE void add_values(Tile& tile, int row, Rows values, int count, Rows ahead, int d) {
    Floats sums[R][V];
    float* out = tile.out + row * tile.width + d;
    const float* weights = tile.scores + row * kTileKeys;
    UNROLL
    for (int r = 0; r < R; ++r) {
        UNROLL
        for (int i = 0; i < V; ++i) sums[r][i] = load(out + r * tile.width + i * kLanes) * tile.correction[row + r];
    }
    const std::byte* value = values.data + static_cast<size_t>(d) * T::kBytes;
    for (int j = 0; j < count; ++j, value += values.stride) {
        Floats x[V];
        UNROLL
        for (int i = 0; i < V; ++i) x[i] = load(T(), value + static_cast<size_t>(i * kLanes) * T::kBytes);
        if (row == 0) prefetch(ahead[j] + static_cast<size_t>(d) * T::kBytes, V * kLanes * T::kBytes);
        UNROLL
        for (int r = 0; r < R; ++r) {
            const Floats weight = splat(weights[r * kTileKeys + j]);
            UNROLL
            for (int i = 0; i < V; ++i) sums[r][i] += weight * x[i];
        }
    }
    UNROLL
    for (int r = 0; r < R; ++r) {
        UNROLL
        for (int i = 0; i < V; ++i) store(out + r * tile.width + i * kLanes, sums[r][i]);
    }
}

template <class T, int R>
INLINE void add_values_of(Tile& tile, int row, Rows values, int count, Rows ahead) {
    constexpr int kVectors = R > 4 ? 2 : kSumsAtOnce / 4;
    int d = 0;
    for (; d + kVectors * kLanes <= tile.width; d += kVectors * kLanes) {
        add_values<T, R, kVectors>(tile, row, values, count, ahead, d);
    }
    for (; d < tile.width; d += kLanes) add_values<T, R, 1>(tile, row, values, count, ahead, d);
}

template <class T>
void add_all_values(Tile& tile, Rows values, int count, Rows ahead) {
    int row = 0;
    for (; row + kRowsAtOnce <= tile.rows; row += kRowsAtOnce) {
        add_values_of<T, kRowsAtOnce>(tile, row, values, count, ahead);
    }
    if (kRowsAtOnce > 4 && row + 4 <= tile.rows) {
        add_values_of<T, 4>(tile, row, values, count, ahead);
        row += 4;
    }
    for (; row + 2 <= tile.rows; row += 2) add_values_of<T, 2>(tile, row, values, count, ahead);
    if (row < tile.rows) add_values_of<T, 1>(tile, row, values, count, ahead);
}

// Tasks

/// All query rows of the tile against `count` keys at consecutive positions.
template <class T>
void attend_block(const Attention& attention, Tile& tile, Rows keys, Rows values, int64_t first, int count) {
    constexpr bool kScaled = T::kForm == RowForm::kInt8;
    const Rows next{keys[count], keys.stride};
    const bool padded = tile.width != tile.head_dim;
    if (kScaled) {
        gather_scales(keys, count, tile.head_dim, tile.k_scale);
        gather_scales(values, count, tile.head_dim, tile.v_scale);
    }
    if (padded) {
        score<Float32>(tile, gather<T>(keys, count, tile.head_dim, tile.gathered), count, values);
    } else {
        score<T>(tile, keys, count, values);
    }
    for (int row = 0; row < tile.rows; ++row) weigh<kScaled>(attention, tile, row, first, count);
    const bool converted = T::kForm != RowForm::kFloat32 && tile.rows > kFewRows;
    if (padded || converted) {
        add_all_values<Float32>(tile, gather<T>(values, count, tile.head_dim, tile.gathered), count, next);
    } else {
        add_all_values<T>(tile, values, count, next);
    }
}

void start(const Work& work, Tile& tile, int64_t sequence_head, int64_t row, int rows) {
    const Attention& attention = work.attention;
    const int64_t position = attention.position[sequence_head / attention.kv_heads];
    tile.rows = rows;
    tile.head_dim = static_cast<int>(attention.head_dim);
    tile.width = (tile.head_dim + kLanes - 1) / kLanes * kLanes;
    for (int r = 0; r < rows; ++r) {
        const int64_t head = work.head(sequence_head, row + r);
        const int64_t token = work.token(sequence_head, row + r);
        const float* from = attention.q + (token * attention.heads + head) * attention.head_dim;
        float* q = tile.q + r * tile.width;
        rotate(attention, token, static_cast<int>(attention.rope_pairs), from, q);
        for (int d = 0; d < tile.width; d += kLanes) store(q + d, load(q + d) * attention.scale);
        tile.sum[r] = Floats{};
        tile.max[r] = kNothing;
        tile.slope[r] = attention.slopes == nullptr ? 0 : attention.slopes[head];
        tile.position[r] = position + (row + r) / work.group();
    }
    for (int i = 0; i < rows * tile.width; i += kLanes) store(tile.out + i, Floats{});
    for (int i = 0; i < kTileKeys; i += kLanes) {  // a block's last vector may be part of one
        store(tile.k_scale + i, Floats{});
        store(tile.v_scale + i, Floats{});
    }
}

/// The tile against the keys at positions begin to end: first cached ones, from slot to slot, then new ones.
template <class T>
void attend_keys(const Attention& attention, Tile& tile, int64_t sequence_head, int64_t begin, int64_t end) {
    const size_t stride = row_bytes(T::kForm, attention.head_dim);
    const int64_t position = attention.position[sequence_head / attention.kv_heads];
    for (int64_t first = begin; first < end;) {
        const bool cached = first < position;
        const int64_t slots = cached ? attention.slots : attention.length;
        const int64_t slot = cached ? first % slots : first - position;
        const int64_t run = (cached && position < end ? position : end) - first;
        int64_t count = run < slots - slot ? run : slots - slot;
        if (count > kTileKeys) count = kTileKeys;
        const size_t offset = static_cast<size_t>(sequence_head * slots + slot) * stride;
        attend_block<T>(attention, tile, {(cached ? attention.k_cache : attention.k_rows) + offset, stride},
                        {(cached ? attention.v_cache : attention.v_rows) + offset, stride}, first,
                        static_cast<int>(count));
        first += count;
    }
}

/// Writes the tile's results, or what merge() makes them of.
void finish(const Work& work, Tile& tile, int64_t sequence_head, int64_t chunk, int64_t row) {
    const Attention& attention = work.attention;
    const auto bytes = static_cast<size_t>(attention.head_dim) * sizeof(float);
    for (int r = 0; r < tile.rows; ++r) {
        float* out = tile.out + r * tile.width;
        const float sum = sum_of(tile.sum[r]);
        if (work.chunks > 1) {
            float* partial = work.partial_row(sequence_head, chunk, row + r);
            partial[0] = tile.max[r];
            partial[1] = sum;
            __builtin_memcpy(partial + 2, out, bytes);
            continue;
        }
        for (int d = 0; d < tile.width; d += kLanes) store(out + d, load(out + d) / sum);
        const int64_t to = work.token(sequence_head, row + r) * attention.heads + work.head(sequence_head, row + r);
        __builtin_memcpy(attention.out + to * attention.head_dim, out, bytes);
    }
}

void attend(const Work& work, int64_t task) {
    const Attention& attention = work.attention;
    const int64_t sequence_heads = attention.batch * attention.kv_heads;
    // The blocks that see the most come first, for threads to finish at about the same time.
    const int64_t sequence_head = work.chunks > 1 ? task / work.chunks : task % sequence_heads;
    const int64_t chunk = work.chunks > 1 ? task % work.chunks : 0;
    const int64_t row = work.chunks > 1 ? 0 : (work.blocks - 1 - task / sequence_heads) * kTileRows;
    const int64_t rows = work.rows() - row < kTileRows ? work.rows() - row : kTileRows;

    Tile tile;
    start(work, tile, sequence_head, row, static_cast<int>(rows));
    const int64_t position = attention.position[sequence_head / attention.kv_heads];
    const int64_t first_seen = attention.window > 0 ? tile.position[0] - attention.window + 1 : 0;
    int64_t begin = position > attention.slots ? position - attention.slots : 0;
    if (begin < first_seen) begin = first_seen;
    int64_t end = tile.position[rows - 1] + 1;
    if (work.chunks > 1) {
        int64_t length = (end - begin + work.chunks - 1) / work.chunks;
        length = (length + kTileKeys - 1) / kTileKeys * kTileKeys;
        begin += chunk * length;
        if (end > begin + length) end = begin + length;
    }
    switch (attention.form) {
        case RowForm::kFloat32:
            attend_keys<Float32>(attention, tile, sequence_head, begin, end);
            break;
        case RowForm::kFloat16:
            attend_keys<Float16>(attention, tile, sequence_head, begin, end);
            break;
        case RowForm::kInt8:
            attend_keys<Int8>(attention, tile, sequence_head, begin, end);
            break;
    }
    finish(work, tile, sequence_head, chunk, row);
}

/// Combines the chunks of one KV head's rows, in order.
void merge(const Work& work, int64_t sequence_head) {
    const Attention& attention = work.attention;
    const auto head_dim = static_cast<int>(attention.head_dim);
    for (int64_t row = 0; row < work.rows(); ++row) {
        float max = kNothing;
        for (int64_t c = 0; c < work.chunks; ++c) {
            const float of_chunk = work.partial_row(sequence_head, c, row)[0];
            if (of_chunk > max) max = of_chunk;
        }
        const int64_t to = work.token(sequence_head, row) * attention.heads + work.head(sequence_head, row);
        float* out = attention.out + to * attention.head_dim;
        float sum = 0;
        for (int d = 0; d < head_dim; ++d) out[d] = 0;
        for (int64_t c = 0; c < work.chunks; ++c) {
            const float* partial = work.partial_row(sequence_head, c, row);
            const float correction = exponential(splat(partial[0] - max))[0];
            sum += partial[1] * correction;
            for (int d = 0; d < head_dim; ++d) out[d] += partial[2 + d] * correction;
        }
        for (int d = 0; d < head_dim; ++d) out[d] /= sum;
    }
}

constexpr Kernel kKernel{InstructionSet::LLAMA_RUNNER_SET, append, attend, merge, turn};

#undef INLINE
#undef UNROLL

}  // namespace
}  // namespace llama_runner::LLAMA_RUNNER_SET

#undef LLAMA_RUNNER_SET
#undef LLAMA_RUNNER_LANES
#undef LLAMA_RUNNER_REGISTERS
