#include "llama_runner/parts.h"

#include <algorithm>
#include <vector>

namespace llama_runner {

namespace {

/// Adds the specs whose names are not present.
void add(std::vector<TensorSpec>& specs, const std::vector<TensorSpec>& others) {
    for (const TensorSpec& other : others) {
        if (std::ranges::find(specs, other.name, &TensorSpec::name) == specs.end()) specs.push_back(other);
    }
}

/// Extends a method by the next shard's part of it.
void extend(MethodSpec& spec, const MethodSpec& next) {
    spec.max_rows = next.max_rows;
    spec.end_layer = next.end_layer;
    add(spec.inputs, next.inputs);
    add(spec.outputs, next.outputs);
}

/// Returns a sort key for the order in a whole file: keys and then values after all others.
std::string_view order(const TensorSpec& spec) { return layer_of(spec.name) ? role_of(spec.name) : ""; }

Requirements united(Requirements a, const Requirements& b) {
    a.backends.insert(a.backends.end(), b.backends.begin(), b.backends.end());
    a.operators.insert(a.operators.end(), b.operators.begin(), b.operators.end());
    return a;
}

}  // namespace

Result<Metadata> join_parts(std::span<const NamedMetadata> shards) {
    Metadata whole = *shards[0].metadata;
    int64_t end = 0;
    const auto missing = [&](int64_t start) {
        return Error{"the shard with blocks " + std::to_string(end) + " to " + std::to_string(start - 1) +
                     " is missing beside " + shards[0].path + "; copy it there or export again"};
    };
    for (const auto& [path, metadata] : shards) {
        const MethodSpec& first = metadata->methods[0];
        if (first.slices > 1) {
            return Error{path + " is one of " + std::to_string(first.slices) +
                         " slices, which only the Python runtime runs; export without --tensor-parallel"};
        }
        if (metadata->identity != whole.identity || metadata->methods.size() != whole.methods.size()) {
            return Error{path + " is from another export than " + shards[0].path +
                         "; keep the shards of one export together"};
        }
        if (first.start_layer < end) {
            return Error{path + " has block " + std::to_string(first.start_layer) +
                         ", which another shard also has; remove one"};
        }
        if (first.start_layer > end) return missing(first.start_layer);
        end = first.end_layer;
        if (metadata == shards[0].metadata) continue;
        whole.matrix_bytes += metadata->matrix_bytes;
        whole.activation_bytes = std::max(whole.activation_bytes, metadata->activation_bytes);
        whole.requirements = united(std::move(whole.requirements), metadata->requirements);
        for (size_t i = 0; i < whole.methods.size(); ++i) extend(whole.methods[i], metadata->methods[i]);
    }
    if (end < whole.n_layers) return missing(whole.n_layers);
    if (shards.size() == 1) return whole;
    for (MethodSpec& spec : whole.methods) {
        for (auto* tensors : {&spec.inputs, &spec.outputs}) {
            std::erase_if(*tensors, [](const TensorSpec& tensor) { return tensor.name == kStream; });
            std::ranges::stable_sort(*tensors, {}, order);
        }
    }
    return whole;
}

}  // namespace llama_runner
