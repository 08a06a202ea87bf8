#include "llama_runner/session.h"

#include <algorithm>
#include <array>
#include <map>

#include "attention/attention.h"
#include "engine/session_file.h"
#include "support/no_throw.h"

namespace llama_runner {

namespace {

/// Maximum number of values of all hidden states; far more than fits in memory.
constexpr int64_t kMostHidden = int64_t{1} << 48;

RowForm form_of(Dtype dtype) {
    if (dtype == Dtype::kInt8) return RowForm::kInt8;
    return dtype == Dtype::kFloat16 ? RowForm::kFloat16 : RowForm::kFloat32;
}

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
        session.tokens_.reserve(static_cast<size_t>(session.capacity()));
        session.proposed_.reserve(static_cast<size_t>(session.max_proposed()));
        session.logits_.reserve(static_cast<size_t>(session.max_proposed() * session.vocab_size()));
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
                    .max_rows = spec.max_rows,
                    .tokens = {},
                    .select = {},
                    .positions = PositionInputs(program_->metadata(), spec.max_length, cached()),
                    .inputs = {},
                    .logits_output = spec.outputs.size(),
                    .hidden_output = spec.outputs.size(),
                    .rows_outputs = {}};
    binding.tokens.resize(static_cast<size_t>(spec.max_length));
    binding.select.resize(static_cast<size_t>(spec.max_length * spec.max_rows));
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
    const StepSize most(length, binding.max_rows);
    const auto is = [&](std::initializer_list<int64_t> sizes, Dtype dtype) { return spec.is(sizes, most, dtype); };
    bool known = true;
    const void* data = nullptr;
    if (spec.name == "tokens") {
        known = is({1, length}, Dtype::kInt64);
        data = binding.tokens.data();
    } else if (spec.name == "select") {
        known = is({1, binding.max_rows, length}, Dtype::kFloat32);
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
        const bool known = found != spec.outputs.end() && found->is(sizes, spec.most(), dtype);
        return known ? static_cast<size_t>(found - spec.outputs.begin()) : spec.outputs.size();
    };
    binding.logits_output = find("logits", {1, spec.max_rows, program_->metadata().vocab_size}, Dtype::kFloat32);
    bool whole = binding.logits_output < spec.outputs.size();
    for (const KVCache::Buffer& buffer : cache_.buffers()) {
        binding.rows_outputs.push_back(
            find(rows_of(buffer.name), {buffer.heads, spec.max_length, buffer.width()}, buffer.dtype));
        whole = whole && binding.rows_outputs.back() < spec.outputs.size();
    }
    if (!whole) return Error{"method " + spec.name + " does not return what this runner knows; update it"};
    return {};
}

/// Checks that either all methods return hidden states, of one width, or none does.
Result<void> Session::bind_hidden(Binding& binding, const MethodSpec& spec) {
    const auto found = std::ranges::find(spec.outputs, "hidden", &TensorSpec::name);
    const bool there = found != spec.outputs.end();
    const int64_t width = there && !found->shape.empty() ? found->shape.back() : 0;
    const std::array sizes{int64_t{1}, spec.max_length, width};
    const bool known = !there || (width > 0 && found->is(sizes, spec.most(), Dtype::kFloat32));
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

void Session::reset() { static_cast<void>(rewind(0)); }

Result<void> Session::rewind(int64_t position) {
    if (auto done = cache_.rewind(position); !done) return done;
    tokens_.resize(static_cast<size_t>(position));
    return {};
}

Result<std::span<const float>> Session::prefill(std::span<const int64_t> tokens) { return extend(tokens, 1); }

Result<void> Session::check(std::span<const int64_t> tokens) const {
    if (tokens.empty()) return Error{"the prompt is empty; give at least one token"};
    const int64_t vocab_size = program_->metadata().vocab_size;
    for (const int64_t token : tokens) {
        if (token < 0 || token >= vocab_size) {
            return Error{"token " + std::to_string(token) + " is not in the vocabulary; give ids from 0 to " +
                         std::to_string(vocab_size - 1)};
        }
    }
    const int64_t free = capacity() - position();
    if (std::ssize(tokens) > free) {
        return Error{"the prompt has " + std::to_string(tokens.size()) + " tokens, but only " + std::to_string(free) +
                     " of " + std::to_string(capacity()) +
                     " positions are free; shorten it or export with a larger --max-seq-len"};
    }
    return {};
}

Result<std::span<const float>> Session::extend(std::span<const int64_t> tokens, int64_t rows) {
    if (auto checked = check(tokens); !checked) return checked.error();
    const int64_t end = std::ssize(tokens);
    if (rows < 1 || rows > end) return Error{std::to_string(end) + " tokens have no " + std::to_string(rows) + " rows"};
    hidden_rows_ = 0;
    logits_.clear();
    const std::lock_guard turn(program_->turn());
    const int64_t wanted_from = end - rows;
    for (int64_t start = 0;;) {
        Binding& binding = binding_for(end - start);
        const int64_t first = std::max(wanted_from, start);  // first token of the step whose logits are returned
        const int64_t next = std::min({start + binding.max_length, end, first + binding.max_rows});
        const auto chunk = tokens.subspan(static_cast<size_t>(start), static_cast<size_t>(next - start));
        const auto logits = run(binding, chunk, std::max(next - first, int64_t{1}));
        const auto committed = logits ? commit(binding, chunk) : Result<void>(logits.error());
        if (!committed) {
            hidden_rows_ = 0;
            return committed.error();
        }
        if (next > wanted_from) logits_.insert(logits_.end(), logits->begin(), logits->end());
        if (next == end) return std::span<const float>(logits_);
        start = next;
    }
}

Result<std::span<const float>> Session::propose(std::span<const int64_t> tokens) {
    if (auto checked = check(tokens); !checked) return checked.error();
    Binding& binding = binding_for(std::ssize(tokens));
    if (std::ssize(tokens) > binding.max_rows) {
        return Error{std::to_string(tokens.size()) + " tokens cannot be proposed at once; propose at most " +
                     std::to_string(max_proposed())};
    }
    proposed_.clear();
    const std::lock_guard turn(program_->turn());
    const auto logits = run(binding, tokens, std::ssize(tokens));
    if (!logits) return logits;
    logits_.assign(logits->begin(), logits->end());
    proposed_.assign(tokens.begin(), tokens.end());
    keep_outputs(binding);
    return std::span<const float>(logits_);
}

/// Copies the outputs that `commit` reads, because another session may run before it.
void Session::keep_outputs(const Binding& binding) {
    const std::vector<TensorSpec>& specs = program_->metadata().methods[binding.method].outputs;
    kept_.resize(specs.size());
    kept_outputs_.assign(specs.size(), nullptr);
    const auto keep = [&](size_t output) {
        const auto bytes = static_cast<size_t>(specs[output].elements(length_)) * size_of(specs[output].dtype);
        const auto* const from = static_cast<const std::byte*>(outputs_[output]);
        kept_[output].assign(from, from + bytes);
        kept_outputs_[output] = kept_[output].data();
    };
    for (const size_t output : binding.rows_outputs) keep(output);
    if (hidden_) keep(binding.hidden_output);
}

Result<void> Session::accept(int64_t count) {
    hidden_rows_ = 0;
    if (count < 1 || count > std::ssize(proposed_)) {
        return Error{"of " + std::to_string(proposed_.size()) + " proposed tokens " + std::to_string(count) +
                     " cannot be accepted"};
    }
    const Binding& binding = binding_for(std::ssize(proposed_));
    outputs_ = kept_outputs_;
    length_ = std::max(std::ssize(proposed_) + (cached() ? 0 : position()), binding.min_length);
    const auto committed = commit(binding, std::span(proposed_).first(static_cast<size_t>(count)));
    proposed_.clear();
    return committed;
}

int64_t Session::max_proposed() const { return std::ranges::max_element(bindings_, {}, &Binding::max_rows)->max_rows; }

Result<std::span<const float>> Session::restart(std::span<const int64_t> prompt) {
    if (prompt.empty()) return prefill(prompt);
    const auto before = prompt.first(prompt.size() - 1);
    const auto common = std::ranges::mismatch(tokens_, before).in1 - tokens_.begin();
    if (!rewind(common)) reset();  // a ring no longer holds the window before it
    return prefill(prompt.subspan(static_cast<size_t>(position())));
}

Result<Session> Session::fork() const {
    auto other = create(*program_);
    if (!other) return other;
    const std::vector<KVCache::Filled> copies = other->cache_.restore(cache_.state());
    const std::vector<KVCache::Filled> originals = cache_.filled();
    for (size_t i = 0; i < copies.size(); ++i) {
        for (int64_t head = 0; head < copies[i].heads; ++head) {
            std::ranges::copy(originals[i].of(head), copies[i].of(head).begin());
        }
    }
    other->tokens_.assign(tokens_.begin(), tokens_.end());
    return other;
}

Result<void> Session::save(const std::string& path) const {
    return write_session_file(path, {program_->metadata().identity, cache_.state(), tokens_, cache_.filled()});
}

Result<void> Session::load(const std::string& path) {
    return guarded([&]() -> Result<void> {
        auto file = open_session_file(path, program_->metadata().identity, capacity());
        if (!file) return file.error();
        tokens_.assign(file->tokens.begin(), file->tokens.end());
        hidden_rows_ = 0;
        return file->read_rows(cache_.restore(file->state));
    });
}

Result<int64_t> Session::slide() {
    const Metadata& metadata = program_->metadata();
    if (metadata.positions == "learned" && cached()) {
        return Error{"sliding is unsupported for a model with learned positions; stop when the context is full"};
    }
    const int64_t count = std::min((position() - kSinks) / 2, cache_.room(kSinks));
    if (count < 1) {
        return Error{"none of the " + std::to_string(position()) +
                     " tokens can be forgotten, because the model sees all but " + std::to_string(kSinks) +
                     " of them; export with a larger --max-seq-len"};
    }
    const Angles angles = earlier(metadata.rope, count);
    const auto is_in = [](const std::vector<int64_t>& layers, const KVCache::Buffer& buffer) {
        return std::ranges::find(layers, layer_of(buffer.name)) != layers.end();
    };
    const size_t pairs = angles.cos.size() / (metadata.locally_rotated_layers.empty() ? 1 : 2);
    std::map<std::string, size_t> first_pairs;  // of each buffer whose rows have rotary embedding
    for (const KVCache::Buffer& buffer : cache_.buffers()) {
        const bool rotates = metadata.positions == "rope" && !is_in(metadata.nope_layers, buffer);
        if (rotates && role_of(buffer.name) == kKCache) {
            first_pairs[buffer.name] = is_in(metadata.locally_rotated_layers, buffer) ? pairs : 0;
        }
    }
    cache_.slide(kSinks, count, [&](const KVCache::Buffer& buffer, std::span<std::byte> row) {
        if (const auto found = first_pairs.find(buffer.name); found != first_pairs.end()) {
            turn(form_of(buffer.dtype), std::span(angles.cos).subspan(found->second, pairs),
                 std::span(angles.sin).subspan(found->second, pairs), row);
        }
    });
    tokens_.erase(tokens_.begin() + kSinks, tokens_.begin() + kSinks + count);
    return count;
}

std::span<const float> Session::hidden() const {
    return {hidden_.get(), static_cast<size_t>(hidden_rows_ * hidden_width_)};
}

/// Returns the binding of the shortest method that takes `length` tokens at once, or else of the longest.
Session::Binding& Session::binding_for(int64_t length) {
    const auto found = std::find_if(bindings_.begin(), bindings_.end(),
                                    [length](const Binding& binding) { return binding.max_length >= length; });
    return found != bindings_.end() ? *found : bindings_.back();
}

/// Runs up to max_length tokens, padded to the method's length, and returns the logits of the last `rows`. The results
/// of padding are ignored.
Result<std::span<const float>> Session::run(Binding& binding, std::span<const int64_t> tokens, int64_t rows) {
    const auto position = cache_.plan(std::ssize(tokens));
    if (!position) return position.error();
    const int64_t start = cached() ? 0 : *position;
    const int64_t end = start + std::ssize(tokens);
    length_ = std::max(end, binding.min_length);

    std::copy_n(tokens_.begin(), start, binding.tokens.begin());
    std::fill(std::copy(tokens.begin(), tokens.end(), binding.tokens.begin() + start), binding.tokens.begin() + length_,
              0);
    std::fill_n(binding.select.begin(), rows * length_, 0.0F);
    for (int64_t row = 0; row < rows; ++row) binding.select[static_cast<size_t>(row * length_ + end - rows + row)] = 1;
    binding.positions.move(*position - start, length_);
    const auto outputs = program_->step(binding.method, {length_, rows}, binding.inputs);
    if (!outputs) return outputs.error();
    outputs_ = *outputs;
    return std::span(static_cast<const float*>(outputs_[binding.logits_output]),
                     static_cast<size_t>(rows * program_->metadata().vocab_size));
}

/// Appends tokens, the first ones of the latest step, and their cache rows.
Result<void> Session::commit(const Binding& binding, std::span<const int64_t> tokens) {
    const int64_t start = cached() ? 0 : position();
    const int64_t count = std::ssize(tokens);
    for (size_t i = 0; i < rows_.size(); ++i) rows_[i] = outputs_[binding.rows_outputs[i]];
    if (auto committed = cache_.commit(rows_, length_, count); !committed) return committed;
    tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
    if (hidden_) {
        const auto* states = static_cast<const float*>(outputs_[binding.hidden_output]);
        std::copy_n(states + start * hidden_width_, count * hidden_width_,
                    hidden_.get() + hidden_rows_ * hidden_width_);
        hidden_rows_ += count;
    }
    return {};
}

}  // namespace llama_runner
