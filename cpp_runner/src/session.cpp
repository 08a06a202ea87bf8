#include "llama_runner/session.h"

#include <algorithm>

#include "guard.h"

namespace llama_runner {

Result<Session> Session::create(Steps& program) {
    return guarded([&]() -> Result<Session> {
        const std::vector<MethodSpec>& methods = program.metadata().methods;
        auto cache = KVCache::create(methods.front());
        if (!cache) return cache.error();
        Session session(program, *std::move(cache));
        for (size_t method = 0; method < methods.size(); ++method) {
            if (auto bound = session.bind(method); !bound) return bound.error();
        }
        std::stable_sort(session.bindings_.begin(), session.bindings_.end(),
                         [](const Binding& a, const Binding& b) { return a.max_length < b.max_length; });
        session.rows_.resize(session.cache_.buffers().size());
        return session;
    });
}

Result<void> Session::bind(size_t method) {
    const MethodSpec& spec = program_->metadata().methods[method];
    const auto length = static_cast<size_t>(spec.max_length);
    const size_t angles = length * static_cast<size_t>(program_->metadata().rope.width);
    Binding binding{.method = method,
                    .min_length = spec.min_length,
                    .max_length = spec.max_length,
                    .tokens = std::vector<int64_t>(length),
                    .cos = std::vector<float>(angles),
                    .sin = std::vector<float>(angles),
                    .select = std::vector<float>(length),
                    .mask = CausalMask(spec.max_length, capacity()),
                    .inputs = {},
                    .mask_input = spec.inputs.size(),
                    .logits_output = spec.outputs.size(),
                    .rows_outputs = {}};
    for (const TensorSpec& input : spec.inputs) {
        if (auto bound = bind_input(binding, input); !bound) return bound;
    }
    if (auto bound = bind_outputs(binding, spec); !bound) return bound;
    bindings_.push_back(std::move(binding));
    return {};
}

Result<void> Session::bind_input(Binding& binding, const TensorSpec& spec) {
    const int64_t length = binding.max_length;
    int64_t elements = 0;
    const void* data = nullptr;
    if (spec.name == "tokens") {
        data = binding.tokens.data(), elements = length;
    } else if (spec.name == "cos" || spec.name == "sin") {
        const std::vector<float>& angles = spec.name == "cos" ? binding.cos : binding.sin;
        data = angles.data(), elements = static_cast<int64_t>(angles.size());
    } else if (spec.name == "select") {
        data = binding.select.data(), elements = length;
    } else if (spec.name == "mask") {
        binding.mask_input = binding.inputs.size();
        data = binding.mask.at(0, length), elements = length * (capacity() + length);
    } else {
        for (const KVCache::Buffer& buffer : cache_.buffers()) {
            if (buffer.name != spec.name) continue;
            data = buffer.data;
            elements = buffer.heads * capacity() * static_cast<int64_t>(buffer.row_bytes / size_of(spec.dtype));
        }
    }
    if (data == nullptr) {
        return Error{"the file's methods take " + spec.name + ", which this runner does not know; update it"};
    }
    const Dtype dtype = spec.name == "tokens" ? Dtype::kInt64 : Dtype::kFloat32;
    if (spec.elements(length) != elements || spec.dtype != dtype) {
        return Error{"the shape of the input " + spec.name + " is not what this runner knows; update it"};
    }
    binding.inputs.push_back(data);
    return {};
}

Result<void> Session::bind_outputs(Binding& binding, const MethodSpec& spec) {
    const auto find = [&](const std::string& name, int64_t elements) {
        const auto found = std::find_if(spec.outputs.begin(), spec.outputs.end(), [&](const TensorSpec& output) {
            return output.name == name && output.elements(spec.max_length) == elements &&
                   output.dtype == Dtype::kFloat32;
        });
        return static_cast<size_t>(found - spec.outputs.begin());
    };
    binding.logits_output = find("logits", program_->metadata().vocab_size);
    bool whole = binding.logits_output < spec.outputs.size();
    for (const KVCache::Buffer& buffer : cache_.buffers()) {
        std::string name = buffer.name;
        name.replace(name.find("cache"), 5, "rows");
        const auto width = static_cast<int64_t>(buffer.row_bytes / sizeof(float));
        binding.rows_outputs.push_back(find(name, buffer.heads * spec.max_length * width));
        whole = whole && binding.rows_outputs.back() < spec.outputs.size();
    }
    if (!whole) return Error{"method " + spec.name + " does not return what this runner knows; update it"};
    return {};
}

void Session::reset() { static_cast<void>(cache_.rewind(0)); }

Result<std::span<const float>> Session::prefill(std::span<const int64_t> tokens) {
    if (tokens.empty()) return Error{"the prompt is empty; give at least one token"};
    const int64_t vocab_size = program_->metadata().vocab_size;
    for (const int64_t token : tokens) {
        if (token < 0 || token >= vocab_size) {
            return Error{"token " + std::to_string(token) + " is not in the vocabulary; ids run from 0 to " +
                         std::to_string(vocab_size - 1)};
        }
    }
    const int64_t free = capacity() - position();
    if (static_cast<int64_t>(tokens.size()) > free) {
        return Error{"the prompt has " + std::to_string(tokens.size()) + " tokens, but only " + std::to_string(free) +
                     " of " + std::to_string(capacity()) +
                     " positions are free; shorten it or export with a larger --max-seq-len"};
    }
    for (;;) {
        Binding& binding = binding_for(static_cast<int64_t>(tokens.size()));
        const size_t count = std::min(tokens.size(), static_cast<size_t>(binding.max_length));
        auto logits = step(binding, tokens.first(count));
        tokens = tokens.subspan(count);
        if (!logits || tokens.empty()) return logits;
    }
}

/// The shortest method that takes `length` tokens at once, otherwise the longest.
Session::Binding& Session::binding_for(int64_t length) {
    const auto found = std::find_if(bindings_.begin(), bindings_.end(),
                                    [length](const Binding& binding) { return binding.max_length >= length; });
    return found != bindings_.end() ? *found : bindings_.back();
}

/// Runs up to max_length tokens, padded to the method's length; the padding is neither committed nor selected.
Result<std::span<const float>> Session::step(Binding& binding, std::span<const int64_t> tokens) {
    const auto valid = static_cast<int64_t>(tokens.size());
    const int64_t length = std::max(valid, binding.min_length);
    const auto position = cache_.plan(valid);
    if (!position) return position.error();

    std::fill(std::copy(tokens.begin(), tokens.end(), binding.tokens.begin()), binding.tokens.end(), 0);
    std::fill(binding.select.begin(), binding.select.end(), 0.0F);
    binding.select[tokens.size() - 1] = 1;
    rope_slices(program_->metadata().rope, *position, length, binding.cos.data(), binding.sin.data());
    if (binding.mask_input < binding.inputs.size()) {
        binding.inputs[binding.mask_input] = binding.mask.at(*position, length);
    }
    const auto outputs = program_->step(binding.method, length, binding.inputs);
    if (!outputs) return outputs.error();
    for (size_t i = 0; i < rows_.size(); ++i) rows_[i] = (*outputs)[binding.rows_outputs[i]];
    if (auto committed = cache_.commit(rows_, length, valid); !committed) return committed.error();
    return std::span(static_cast<const float*>((*outputs)[binding.logits_output]),
                     static_cast<size_t>(program_->metadata().vocab_size));
}

}  // namespace llama_runner
