#include "llama_runner/metadata.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>

#include "support/checksum.h"
#include "support/json.h"

namespace llama_runner {

namespace {

using nlohmann::json;

constexpr int64_t kMostElements = int64_t{1} << 40;

Error unreadable(const std::string& detail) {
    return {"the file's metadata cannot be read (" + detail + "); export it again"};
}

/// Reads values and keeps the first error, so that reading takes one line per field.
class Reader {
  public:
    explicit Reader(const Constants& constants) : constants_(constants) {}

    const std::optional<Error>& error() const { return error_; }

    void fail(const std::string& detail) {
        if (!error_) error_ = unreadable(detail);
    }

    /// Calls `take` with the constant method's values.
    void values(const char* name, const std::function<void(std::vector<Constant>)>& take) {
        if (error_) return;
        if (auto called = constants_(name, take); !called) error_ = called.error();
    }

    int64_t integer(const char* name, int64_t least) {
        int64_t result = least;
        single<int64_t>(name, [&](int64_t value) { result = value; });
        if (result < least || result > kMostElements) fail(std::string(name) + " is " + std::to_string(result));
        return result;
    }

    std::string text(const char* name) {
        std::string result;
        single<std::string>(name, [&](std::string value) { result = std::move(value); });
        return result;
    }

    json parsed(const char* name) {
        json result = json::parse(text(name), nullptr, false);
        if (result.is_discarded()) fail(std::string(name) + " is not JSON");
        return result;
    }

    template <typename T>
    void single(const char* name, const std::function<void(T)>& take) {
        values(name, [&](std::vector<Constant> found) {
            T* value = found.size() == 1 ? std::get_if<T>(&found[0]) : nullptr;
            value ? take(std::move(*value)) : fail(std::string(name) + " has another type");
        });
    }

    /// Reads a tensor of `dimensions` dimensions; sets `width` to the size of the last.
    std::vector<float> floats(const char* name, size_t dimensions, int64_t& width) {
        std::vector<float> result;
        single<ConstantTensor>(name, [&](ConstantTensor tensor) {
            if (!tensor.is_float32 || tensor.shape.size() != dimensions || tensor.shape.back() < 1 ||
                tensor.nbytes == 0) {
                return fail(std::string(name) + " is not a float32 tensor of " + std::to_string(dimensions) +
                            " dimensions");
            }
            width = tensor.shape.back();
            result.resize(tensor.nbytes / sizeof(float));
            std::memcpy(result.data(), tensor.data, result.size() * sizeof(float));
        });
        return result;
    }

    // Readers of members of JSON objects.

    const json& member(const json& object, const char* key) {
        const json& found = llama_runner::member(object, key);
        if (found.is_null()) fail(std::string(key) + " is missing");
        return found;
    }

    std::string text(const json& object, const char* key) {
        const json& value = member(object, key);
        if (!value.is_string()) fail(std::string(key) + " is not a string");
        return value.is_string() ? value.get<std::string>() : "";
    }

    int64_t integer(const json& object, const char* key) {
        const json& value = member(object, key);
        if (!value.is_number_integer()) fail(std::string(key) + " is not a whole number");
        return value.is_number_integer() ? value.get<int64_t>() : 0;
    }

    std::vector<std::string> texts(const json& object, const char* key) {
        std::vector<std::string> result;
        for (const json& item : member(object, key)) {
            item.is_string() ? result.push_back(item.get<std::string>())
                             : fail(std::string(key) + " is not a list of strings");
        }
        return result;
    }

  private:
    const Constants& constants_;
    std::optional<Error> error_;
};

struct NamedDtype {
    std::string_view name;
    Dtype dtype;
    size_t size;
};

constexpr std::array kDtypes{
    NamedDtype{"float32", Dtype::kFloat32, 4},
    NamedDtype{"float16", Dtype::kFloat16, 2},
    NamedDtype{"int8", Dtype::kInt8, 1},
    NamedDtype{"int64", Dtype::kInt64, 8},
};

TensorSpec tensor_spec(Reader& reader, const json& object, StepSize most) {
    TensorSpec spec{reader.text(object, "name"), {}, Dtype::kFloat32};
    int64_t elements = 1;
    for (const json& size : reader.member(object, "shape")) {
        const int64_t fixed = size.is_number_integer() ? std::max(size.get<int64_t>(), int64_t{0}) : 0;
        const int64_t value = size == "L" ? kLength : size == "R" ? kRows : fixed;
        if (value == 0 || most.of(value) > kMostElements / elements) {
            reader.fail("the shape of " + spec.name + " is invalid");
            break;
        }
        elements *= most.of(value);
        spec.shape.push_back(value);
    }
    const std::string dtype = reader.text(object, "dtype");
    const auto found = std::ranges::find(kDtypes, dtype, &NamedDtype::name);
    if (found == kDtypes.end()) {
        reader.fail(spec.name + " is " + dtype + ", which this runner does not know: update it");
    } else {
        spec.dtype = found->dtype;
    }
    return spec;
}

std::vector<int64_t> layers(Reader& reader, const json& config, const char* key) {
    std::vector<int64_t> found;
    for (const json& layer : reader.member(config, key)) {
        layer.is_number_integer() ? found.push_back(layer.get<int64_t>())
                                  : reader.fail(std::string(key) + " is not a list of whole numbers");
    }
    return found;
}

MethodSpec method_spec(Reader& reader, const json& object) {
    MethodSpec spec{reader.text(object, "name"),
                    reader.integer(object, "min_length"),
                    reader.integer(object, "max_length"),
                    reader.integer(object, "max_rows"),
                    {},
                    {},
                    reader.integer(object, "start_layer"),
                    reader.integer(object, "end_layer"),
                    object.contains("slices") ? reader.integer(object, "slices") : 1};
    if (spec.min_length < 1 || spec.max_length < spec.min_length || spec.max_length > kMostElements ||
        spec.max_rows < 1 || spec.max_rows > spec.max_length) {
        reader.fail("the lengths of method " + spec.name + " are invalid");
        return spec;
    }
    if (spec.start_layer < 0 || spec.end_layer < spec.start_layer + (spec.slices == 1)) {
        reader.fail("the blocks of method " + spec.name + " are invalid");
    }
    for (const json& input : reader.member(object, "inputs")) {
        spec.inputs.push_back(tensor_spec(reader, input, spec.most()));
    }
    for (const json& output : reader.member(object, "outputs")) {
        spec.outputs.push_back(tensor_spec(reader, output, spec.most()));
    }
    return spec;
}

SamplingOptions sampling_of(Reader& reader) {
    SamplingOptions found;
    const json given = reader.parsed("get_sampling");
    const auto read = [&](const char* key, auto& value) {
        const auto at = given.find(key);
        if (at == given.end()) return;
        if (!at->is_number()) return reader.fail(std::string("get_sampling has a ") + key + " that is not a number");
        at->get_to(value);
    };
    read("temperature", found.temperature);
    read("top_k", found.top_k);
    read("top_p", found.top_p);
    read("repetition_penalty", found.repetition_penalty);
    return found;
}

}  // namespace

std::string_view role_of(std::string_view name) { return name.substr(0, name.find('.')); }

std::optional<int64_t> layer_of(std::string_view name) {
    const size_t dot = name.find('.');
    int64_t layer = 0;
    if (dot == std::string_view::npos) return std::nullopt;
    const auto [end, error] = std::from_chars(name.data() + dot + 1, name.data() + name.size(), layer);
    return error == std::errc() && end == name.data() + name.size() ? std::optional(layer) : std::nullopt;
}

std::string rows_of(std::string_view cache) {
    const std::string_view role = role_of(cache);
    return std::string(role == kKCache ? "k_rows" : "v_rows").append(cache.substr(role.size()));
}

size_t size_of(Dtype dtype) { return std::ranges::find(kDtypes, dtype, &NamedDtype::dtype)->size; }

int64_t TensorSpec::elements(StepSize step) const {
    int64_t count = 1;
    for (const int64_t size : shape) count *= step.of(size);
    return count;
}

bool TensorSpec::is(std::span<const int64_t> sizes, StepSize step, Dtype type) const {
    return dtype == type && std::equal(shape.begin(), shape.end(), sizes.begin(), sizes.end(),
                                       [&](int64_t a, int64_t b) { return step.of(a) == b; });
}

int64_t Metadata::cache_bytes() const {
    int64_t bytes = 0;
    for (const TensorSpec& spec : methods[0].inputs) {
        if (spec.is_cache()) bytes += spec.elements(1) * static_cast<int64_t>(size_of(spec.dtype));
    }
    return bytes;
}

Result<Metadata> from_constants(const Constants& constants) {
    Reader reader(constants);
    Metadata metadata{};
    metadata.max_seq_len = reader.integer("get_max_seq_len", 1);
    metadata.vocab_size = reader.integer("get_vocab_size", 1);
    metadata.n_layers = reader.integer("get_n_layers", 1);
    metadata.matrix_bytes = reader.integer("get_matrix_bytes", 1);
    metadata.activation_bytes = reader.integer("get_activation_bytes", 0);
    if (reader.integer("get_batch_size", 1) != 1) {
        reader.fail(
            "it was exported for several texts at once, which this runner does not support: leave --batch-size out");
    }
    if (const int64_t id = reader.integer("get_bos_id", -1); id >= 0) metadata.bos_id = id;
    reader.values("get_eos_ids", [&](std::vector<Constant> ids) {
        for (const Constant& id : ids) {
            const auto* value = std::get_if<int64_t>(&id);
            value ? metadata.stop_ids.push_back(*value) : reader.fail("get_eos_ids has another type");
        }
    });
    for (const json& method : reader.parsed("get_methods")) metadata.methods.push_back(method_spec(reader, method));
    if (metadata.methods.empty()) reader.fail("get_methods is empty");
    const json requirements = reader.parsed("get_requirements");
    metadata.requirements = {reader.text(requirements, "executorch"), reader.texts(requirements, "backends"),
                             reader.texts(requirements, "operators")};
    metadata.identity = digest_of(reader.text("get_provenance"));
    const json config = reader.parsed("get_config");
    metadata.positions = reader.text(config, "positions");
    metadata.nope_layers = layers(reader, config, "nope_layers");
    if (const auto theta = config.find("local_rope_theta"); theta != config.end() && !theta->is_null()) {
        metadata.locally_rotated_layers = layers(reader, config, "local_layers");
    }
    int64_t width = 0;
    metadata.rope.cos = reader.floats("get_rope_cos", 2, metadata.rope.width);
    metadata.rope.sin = reader.floats("get_rope_sin", 2, width);
    if (width != metadata.rope.width || metadata.rope.sin.size() != metadata.rope.cos.size()) {
        reader.fail("the rotary tables differ in shape");
    }
    metadata.alibi_slopes = reader.floats("get_alibi_slopes", 1, width);
    if (std::ranges::count(metadata.alibi_slopes, 0.0F) == std::ssize(metadata.alibi_slopes)) {
        metadata.alibi_slopes.clear();
    }
    metadata.sliding_window = reader.integer("get_sliding_window", 0);
    metadata.tokenizer_kind = reader.text("get_tokenizer_kind");
    if (metadata.tokenizer_kind != "none") {
        reader.single<ConstantTensor>("get_tokenizer", [&](ConstantTensor tensor) {
            metadata.tokenizer.assign(static_cast<const char*>(tensor.data), tensor.nbytes);
        });
    }
    metadata.chat_template = reader.text("get_chat_template");
    metadata.sampling = sampling_of(reader);
    if (reader.error()) return *reader.error();
    return metadata;
}

}  // namespace llama_runner
