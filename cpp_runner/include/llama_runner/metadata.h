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

/// The contract with export (runtime/pte/metadata.py): the metadata in a file, its names, and the format version.
namespace llama_runner {

inline constexpr uint32_t kFormatVersion = 4;

/// The size in a shape that stands for the length of a step.
inline constexpr int64_t kLength = -1;

/// The size in a shape that stands for the rows of logits of a step.
inline constexpr int64_t kRows = -2;

enum class Dtype { kFloat32, kFloat16, kInt8, kInt64 };

/// Returns the bytes of one element.
size_t size_of(Dtype dtype);

/// The sizes of a step that shapes leave open: its number of tokens, and its rows of logits.
struct StepSize {
    StepSize(int64_t of_length, int64_t of_rows = 1) : length(of_length), rows(of_rows) {}

    /// Returns a size of a shape as a number.
    int64_t of(int64_t size) const { return size == kLength ? length : size == kRows ? rows : size; }

    int64_t length;
    int64_t rows;
};

/// Returns the role in a tensor's name, such as k_cache of k_cache.3.
std::string_view role_of(std::string_view name);

/// Returns the layer in a tensor's name; none if it belongs to no layer.
std::optional<int64_t> layer_of(std::string_view name);

/// The roles of a layer's cached keys and values.
inline constexpr std::string_view kKCache = "k_cache";
inline constexpr std::string_view kVCache = "v_cache";

/// Returns the name of the rows that a step adds to a cache: k_rows.3 for k_cache.3.
std::string rows_of(std::string_view cache);

/// One input or output of a method.
struct TensorSpec {
    /// The role, and the layer if it belongs to one: tokens, select, logits, hidden; inputs that depend on the
    /// position, see `PositionInputs`; k_cache.3, v_cache.3, k_rows.3, v_rows.3 for layer 3; and stream, which a shard
    /// passes to the next.
    std::string name;
    /// Sizes; kLength or kRows if a size is not fixed.
    std::vector<int64_t> shape;
    Dtype dtype;

    int64_t elements(StepSize step) const;

    /// Whether the tensor is a KV cache.
    bool is_cache() const { return role_of(name) == kKCache || role_of(name) == kVCache; }

    /// Returns whether the tensor has these sizes in a step of size `step`, and this type.
    bool is(std::span<const int64_t> sizes, StepSize step, Dtype type) const;
};

/// One method of the program: it runs a range of layers for a range of lengths. Inputs are filled by name.
struct MethodSpec {
    std::string name;
    /// The range of lengths L; equal if the graph is static.
    int64_t min_length;
    int64_t max_length;
    /// Maximum number of rows of logits.
    int64_t max_rows;
    std::vector<TensorSpec> inputs;
    std::vector<TensorSpec> outputs;
    /// The blocks that it runs, end excluded.
    int64_t start_layer = 0;
    int64_t end_layer = 1;
    /// Number of slices of the model; this runner only runs models that are not sliced, which have 1.
    int64_t slices = 1;

    /// The size of the largest step.
    StepSize most() const { return {max_length, max_rows}; }
};

/// The ExecuTorch version that made the program, and the backends and operators that a runtime needs to load it.
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

/// The contents of a file other than graph and weights, as far as they are needed to run it.
struct Metadata {
    /// Maximum number of positions in a text (T), prompt and answer together.
    int64_t max_seq_len;
    int64_t vocab_size;
    /// Number of blocks of the whole model.
    int64_t n_layers;
    /// Bytes of the matrices that a step multiplies by; decoding reads them and the caches for each token.
    int64_t matrix_bytes;
    /// An upper estimate of the bytes that the longest step takes in addition to weights and caches.
    int64_t activation_bytes;
    std::optional<int64_t> bos_id;
    std::vector<int64_t> stop_ids;
    std::vector<MethodSpec> methods;
    Requirements requirements;
    /// A digest of 16 bytes, equal for files that were exported with the same options from the same checkpoint.
    std::array<unsigned char, 16> identity;
    RopeTables rope;
    /// The kind of position embedding: rope, alibi or learned.
    std::string positions;
    /// Blocks without rotary embedding in a model whose other blocks have it.
    std::vector<int64_t> nope_layers;
    /// Blocks with rotary frequencies of their own, in the second half of the tables' columns.
    std::vector<int64_t> locally_rotated_layers;
    /// The number that each head's mask subtracts for every position of distance, [H]; empty for none.
    std::vector<float> alibi_slopes;
    /// Number of positions that a token of a local block sees, itself included; 0 if all blocks see everything.
    int64_t sliding_window;
    /// The kind of tokenizer: sentencepiece, tiktoken, tokenizer.json or none.
    std::string tokenizer_kind;
    /// The bytes of the tokenizer file; empty if there is none.
    std::string tokenizer;
    /// The chat template, see `ChatTemplate::from_json`; empty if there is none.
    std::string chat_template;
    /// The sampling options that the checkpoint recommends; the others have their defaults.
    SamplingOptions sampling;

    /// Returns the size of the KV caches in bytes.
    int64_t cache_bytes() const;
};

/// A tensor that a constant method returns; `data` is valid only during the call that receives it.
struct ConstantTensor {
    bool is_float32;
    std::vector<int64_t> shape;
    const void* data;
    size_t nbytes;
};

/// One value that a constant method returns.
using Constant = std::variant<int64_t, std::string, ConstantTensor>;

/// A function that runs a constant method of the file and passes its values to the second argument.
using Constants = std::function<Result<void>(const char* name, const std::function<void(std::vector<Constant>)>&)>;

/// Reads the metadata. Fails if a value is missing, has the wrong form, or needs a feature that this runner lacks.
Result<Metadata> from_constants(const Constants& constants);

/// The name of the residual stream between two blocks, which a shard passes to the next.
inline constexpr std::string_view kStream = "stream";

}  // namespace llama_runner
