#include "llama_runner/session.h"

#include <algorithm>
#include <array>

#include "guard.h"

namespace llama_runner {

namespace {

/// Values of all hidden states; far more than memory has.
constexpr int64_t kMostHidden = int64_t{1} << 48;

}  // namespace

Result<Session> Session::create(Steps& program) {
    return guarded([&]() -> Result<Session> {
        const std::vector<MethodSpec>& methods = program.metadata().methods;
        auto cache = KVCache::create(methods.front(), program.metadata().max_seq_len);
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
    if (!cached() && spec.max_length < capacity()) {
        return Error{"method " + spec.name + " takes neither a cache nor a whole text; export the file again"};
    }
    Binding binding{.method = method,
                    .min_length = spec.min_length,
                    .max_length = spec.max_length,
                    .tokens = {},
                    .select = {},
                    .positions = PositionInputs(program_->metadata(), spec.max_length, cached()),
                    .inputs = {},
                    .logits_output = spec.outputs.size(),
                    .hidden_output = spec.outputs.size(),
                    .rows_outputs = {}};
    binding.tokens.resize(static_cast<size_t>(spec.max_length));
    binding.select.resize(static_cast<size_t>(spec.max_length));
    for (const TensorSpec& input : spec.inputs) {
        if (auto bound = bind_input(binding, input); !bound) return bound;
    }
    if (auto bound = bind_outputs(binding, spec); !bound) return bound;
    if (auto bound = bind_hidden(binding, spec); !bound) return bound;
    bindings_.push_back(std::move(binding));
    return {};
}

Result<void> Session::bind_input(Binding& binding, const TensorSpec& spec) {
    const int64_t length = binding.max_length;
    const auto is = [&](std::initializer_list<int64_t> sizes, Dtype dtype) { return spec.is(sizes, length, dtype); };
    bool known = true;
    const void* data = nullptr;
    if (spec.name == "tokens") {
        known = is({1, length}, Dtype::kInt64);
        data = binding.tokens.data();
    } else if (spec.name == "select") {
        known = is({1, length}, Dtype::kFloat32);
        data = binding.select.data();
    } else if (const auto found = std::ranges::find(cache_.buffers(), spec.name, &KVCache::Buffer::name);
               found != cache_.buffers().end()) {
        known = is({found->heads, found->slots, found->width()}, found->dtype);
        data = found->data;
    } else {
        const auto added = binding.positions.add(spec);
        if (!added) return added.error();
        data = *added;
    }
    if (data == nullptr) {
        return Error{"the file's methods take " + spec.name + ", which this runner does not know; update it"};
    }
    if (!known) return Error{"the shape of the input " + spec.name + " is not what this runner knows; update it"};
    binding.inputs.push_back(data);
    return {};
}

Result<void> Session::bind_outputs(Binding& binding, const MethodSpec& spec) {
    const auto find = [&](const std::string& name, std::initializer_list<int64_t> sizes, Dtype dtype) {
        const auto found = std::ranges::find(spec.outputs, name, &TensorSpec::name);
        const bool known = found != spec.outputs.end() && found->is(sizes, spec.max_length, dtype);
        return known ? static_cast<size_t>(found - spec.outputs.begin()) : spec.outputs.size();
    };
    binding.logits_output = find("logits", {1, program_->metadata().vocab_size}, Dtype::kFloat32);
    bool whole = binding.logits_output < spec.outputs.size();
    for (const KVCache::Buffer& buffer : cache_.buffers()) {
        std::string name = buffer.name;
        name.replace(name.find("cache"), 5, "rows");
        binding.rows_outputs.push_back(find(name, {buffer.heads, spec.max_length, buffer.width()}, buffer.dtype));
        whole = whole && binding.rows_outputs.back() < spec.outputs.size();
    }
    if (!whole) return Error{"method " + spec.name + " does not return what this runner knows; update it"};
    return {};
}

/// Hidden states are returned by all methods, in one width, or by none.
Result<void> Session::bind_hidden(Binding& binding, const MethodSpec& spec) {
    const auto found = std::ranges::find(spec.outputs, "hidden", &TensorSpec::name);
    const bool there = found != spec.outputs.end();
    const int64_t width = there && !found->shape.empty() ? found->shape.back() : 0;
    const std::array sizes{int64_t{1}, spec.max_length, width};
    const bool known = !there || (width > 0 && found->is(sizes, spec.max_length, Dtype::kFloat32));
    if (!known || (!bindings_.empty() && width != hidden_width_) || width > kMostHidden / capacity()) {
        return Error{"the hidden states that method " + spec.name +
                     " returns are not what this runner knows; update it"};
    }
    binding.hidden_output = static_cast<size_t>(found - spec.outputs.begin());
    if (width != 0 && !hidden_) {
        hidden_ = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(capacity() * width));
    }
    hidden_width_ = width;
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
    hidden_rows_ = 0;
    for (;;) {
        Binding& binding = binding_for(static_cast<int64_t>(tokens.size()));
        const size_t count = std::min(tokens.size(), static_cast<size_t>(binding.max_length));
        auto logits = step(binding, tokens.first(count));
        tokens = tokens.subspan(count);
        if (!logits) hidden_rows_ = 0;
        if (!logits || tokens.empty()) return logits;
    }
}

std::span<const float> Session::hidden() const {
    return {hidden_.get(), static_cast<size_t>(hidden_rows_ * hidden_width_)};
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
    const auto position = cache_.plan(valid);
    if (!position) return position.error();
    const int64_t start = cached() ? 0 : *position;
    const int64_t end = start + valid;
    const int64_t length = std::max(end, binding.min_length);

    std::fill(std::copy(tokens.begin(), tokens.end(), binding.tokens.begin() + start), binding.tokens.begin() + length,
              0);
    std::fill_n(binding.select.begin(), length, 0.0F);
    binding.select[static_cast<size_t>(end - 1)] = 1;
    binding.positions.move(*position - start, length);
    const auto outputs = program_->step(binding.method, length, binding.inputs);
    if (!outputs) return outputs.error();
    for (size_t i = 0; i < rows_.size(); ++i) rows_[i] = (*outputs)[binding.rows_outputs[i]];
    if (auto committed = cache_.commit(rows_, length, valid); !committed) return committed.error();
    if (hidden_) {
        const auto* rows = static_cast<const float*>((*outputs)[binding.hidden_output]);
        std::copy_n(rows + start * hidden_width_, valid * hidden_width_, hidden_.get() + hidden_rows_ * hidden_width_);
        hidden_rows_ += valid;
    }
    return std::span(static_cast<const float*>((*outputs)[binding.logits_output]),
                     static_cast<size_t>(program_->metadata().vocab_size));
}

}  // namespace llama_runner
