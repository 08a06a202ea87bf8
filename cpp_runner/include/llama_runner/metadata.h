#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "llama_runner/result.h"
#include "llama_runner/sampling_options.h"

/// The contract with export (runtime/pte/metadata.py): what a file carries, under which names, in which format version.
namespace llama_runner {

inline constexpr uint32_t kFormatVersion = 4;

/// Stands in a shape for the method's length.
inline constexpr int64_t kLength = -1;

/// And for its rows of logits.
inline constexpr int64_t kRows = -2;

enum class Dtype { kFloat32, kFloat16, kInt8, kInt64 };

/// Bytes of one element.
size_t size_of(Dtype dtype);

/// What is not fixed in a step's shapes: how many tokens it takes, and how many rows of logits it returns.
struct StepSize {
    StepSize(int64_t of_length, int64_t of_rows = 1) : length(of_length), rows(of_rows) {}

    /// A size of a shape, as a number.
    int64_t of(int64_t size) const { return size == kLength ? length : size == kRows ? rows : size; }

    int64_t length;
    int64_t rows;
};

/// What a tensor is by its name, such as k_cache of k_cache.3.
std::string_view role_of(std::string_view name);

/// The layer that it is of; none where it is no layer's.
std::optional<int64_t> layer_of(std::string_view name);

/// Keys and values so far.
inline constexpr std::string_view kKCache = "k_cache";
inline constexpr std::string_view kVCache = "v_cache";

/// The name of what a step adds to a cache: k_rows.3 for k_cache.3.
std::string rows_of(std::string_view cache);

/// One input or output of a method.
struct TensorSpec {
    /// Its role, and the layer where it is one's: tokens, select, logits, hidden; what depends on the position, see
    /// `PositionInputs`; k_cache.3, v_cache.3, k_rows.3, v_rows.3 for layer 3; and stream, which a shard hands to the
    /// next.
    std::string name;
    /// Sizes; kLength and kRows where they are not fixed.
    std::vector<int64_t> shape;
    Dtype dtype;

    int64_t elements(StepSize step) const;

    /// Whether it is a KV cache.
    bool is_cache() const { return role_of(name) == kKCache || role_of(name) == kVCache; }

    /// Whether these are its sizes, in such a step, and this its type.
    bool is(std::span<const int64_t> sizes, StepSize step, Dtype type) const;
};

/// One method of the program: a range of layers for a range of lengths. Inputs are filled by name.
struct MethodSpec {
    std::string name;
    /// The L it takes; equal where the graph is static.
    int64_t min_length;
    int64_t max_length;
    /// The most rows of logits that it returns.
    int64_t max_rows;
    std::vector<TensorSpec> inputs;
    std::vector<TensorSpec> outputs;
    /// The blocks it runs, end excluded.
    int64_t start_layer = 0;
    int64_t end_layer = 1;
    /// How many slices the model has, of which the file is one; this runner runs what has one.
    int64_t slices = 1;

    /// The largest step.
    StepSize most() const { return {max_length, max_rows}; }
};

/// What a runtime must offer before it may load the program.
struct Requirements {
    std::string executorch;
    std::vector<std::string> backends;
    std::vector<std::string> operators;
};

/// Rotary tables: [rows, width] float32 each, one column for each rotated pair of a head.
struct RopeTables {
    int64_t width = 0;
    std::vector<float> cos;
    std::vector<float> sin;

    int64_t rows() const { return static_cast<int64_t>(cos.size()) / width; }
};

/// All that a file carries beside graph and weights, as far as running it needs it.
struct Metadata {
    /// Positions that a text may have (T): prompt and answer together.
    int64_t max_seq_len;
    int64_t vocab_size;
    /// Blocks of the whole model.
    int64_t n_layers;
    /// Of the matrices that a step multiplies by: decoding reads them for each token, beside the caches.
    int64_t matrix_bytes;
    /// An upper estimate of what the longest step takes beside weights and caches.
    int64_t activation_bytes;
    std::optional<int64_t> bos_id;
    std::vector<int64_t> stop_ids;
    std::vector<MethodSpec> methods;
    Requirements requirements;
    /// 16 bytes, equal for files that were made in the same way from the same checkpoint.
    std::array<unsigned char, 16> identity;
    RopeTables rope;
    /// How the model knows them: rope, alibi or learned.
    std::string positions;
    /// Blocks that do not rotate although others do.
    std::vector<int64_t> nope_layers;
    /// [H]: what each head's mask takes off for every position of distance; empty where it takes off nothing.
    std::vector<float> alibi_slopes;
    /// Positions that a local block sees, itself included; 0 where all see everything.
    int64_t sliding_window;
    /// sentencepiece, tiktoken, tokenizer.json or none.
    std::string tokenizer_kind;
    /// The tokenizer file's own bytes; empty where there is none.
    std::string tokenizer;
    /// How messages become a text, see `ChatTemplate::from_json`; empty where nothing says.
    std::string chat_template;
    /// What the checkpoint recommends; the rest is as if nothing were said.
    SamplingOptions sampling;

    /// Of the KV caches.
    int64_t cache_bytes() const;
};

/// A tensor that a constant method returns; `data` lives as long as the call that received it.
struct ConstantTensor {
    bool is_float32;
    std::vector<int64_t> shape;
    const void* data;
    size_t nbytes;
};

/// One value that a constant method returns.
using Constant = std::variant<int64_t, std::string, ConstantTensor>;

/// Runs a constant method of the file and hands its values to the second argument before they go away.
using Constants = std::function<Result<void>(const char* name, const std::function<void(std::vector<Constant>)>&)>;

/// Reads the metadata. Fails where a value is missing, has the wrong form, or asks for what this runner cannot do.
Result<Metadata> from_constants(const Constants& constants);

/// The tensor that a shard hands to the next: the residual stream between two blocks.
inline constexpr std::string_view kStream = "stream";

}  // namespace llama_runner
