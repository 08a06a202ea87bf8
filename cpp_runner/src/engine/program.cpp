#include "llama_runner/program.h"

#include <algorithm>
#include <filesystem>

#include "engine/executorch.h"
#include "engine/memory_budget.h"
#include "llama_runner/measure.h"
#include "llama_runner/parts.h"
#include "llama_runner/trailer.h"
#include "support/no_throw.h"

namespace llama_runner {

namespace {

/// Returns the path of a .pte itself, or the .pte files in a folder of shards.
Result<std::vector<std::string>> files(const std::string& path) {
    if (!std::filesystem::is_directory(path)) return std::vector<std::string>{path};
    std::vector<std::string> found;
    for (const auto& entry : std::filesystem::directory_iterator(path)) {
        if (entry.path().extension() == ".pte") found.push_back(entry.path().string());
    }
    if (found.empty()) {
        return Error{"the folder " + path + " has no .pte files; give one with shards, or a .pte"};
    }
    std::ranges::sort(found);
    return found;
}

constexpr size_t kFromBefore = SIZE_MAX;

/// Returns the indices of a shard's tensors among those of the whole model; kFromBefore for the stream between shards.
std::vector<size_t> places(const std::vector<TensorSpec>& shard, const std::vector<TensorSpec>& whole) {
    std::vector<size_t> found;
    for (const TensorSpec& spec : shard) {
        const auto place = std::ranges::find(whole, spec.name, &TensorSpec::name);
        found.push_back(spec.name == kStream ? kFromBefore : static_cast<size_t>(place - whole.begin()));
    }
    return found;
}

/// The inputs and outputs of a shard's part of a method, as indices of the whole method's tensors.
struct Route {
    std::vector<size_t> inputs;
    std::vector<size_t> outputs;
    std::vector<const void*> given;
    /// Copies of the outputs of a shard that does not stay loaded.
    std::vector<std::vector<std::byte>> copies;
    std::vector<const void*> copied;
};

}  // namespace

struct Program::State {
    Metadata metadata;
    std::unique_ptr<Tokenizer> tokenizer;
    std::vector<Shard> shards;
    /// Routes, indexed by method and shard.
    std::vector<std::vector<Route>> routes;
    std::vector<const void*> outputs;
    /// Whether each shard stays loaded.
    std::vector<bool> resident;
    bool is_small = false;
};

Program::Program(std::unique_ptr<State> state) : state_(std::move(state)) {}

Program::~Program() = default;

const Metadata& Program::metadata() const { return state_->metadata; }

const Tokenizer* Program::tokenizer() const { return state_->tokenizer.get(); }

Result<std::unique_ptr<Program>> Program::open(const std::string& path, const Options& options) {
    return guarded([&]() -> Result<std::unique_ptr<Program>> {
        const auto paths = files(path);
        if (!paths) return paths.error();
        for (const std::string& each : *paths) {
            if (auto checked = check_file(each, options.check); !checked) return checked.error();
        }
        if (options.threads) {
            if (auto set = set_threads(*options.threads); !set) return set.error();
        }
        auto state = std::make_unique<State>();
        for (const std::string& each : *paths) {
            auto shard = Shard::open(each);
            if (!shard) return shard.error();
            state->shards.push_back(*std::move(shard));
        }
        if (auto joined = join_shards(*state); !joined) return joined.error();
        if (auto met = check_requirements(paths->front(), state->metadata.requirements); !met) return met.error();
        if (!state->metadata.tokenizer.empty()) {
            auto tokenizer = from_bytes(state->metadata.tokenizer, state->metadata.tokenizer_kind);
            if (!tokenizer) return tokenizer.error();
            state->tokenizer = *std::move(tokenizer);
        }
        state->is_small = !options.threads && state->metadata.matrix_bytes < kSmall;
        if (auto loaded = load(*state, options); !loaded) return loaded.error();
        return std::unique_ptr<Program>(new Program(std::move(state)));
    });
}

Result<void> Program::load(State& state, const Options& options) {
    state.resident.assign(state.shards.size(), true);
    if (options.memory_budget) {
        const Metadata& whole = state.metadata;
        std::vector<int64_t> sizes;
        for (const Shard& shard : state.shards) {
            sizes.push_back(static_cast<int64_t>(kMargin * static_cast<double>(shard.metadata().matrix_bytes)));
        }
        auto found = llama_runner::choose_resident(
            sizes, *options.memory_budget - memory() - whole.activation_bytes - whole.cache_bytes());
        if (!found) return found.error();
        state.resident = *std::move(found);
    }
    std::vector<size_t> order;  // the largest first, because loading takes twice the memory
    for (size_t i = 0; i < state.shards.size(); ++i) {
        if (state.resident[i]) order.push_back(i);
    }
    std::ranges::stable_sort(order, std::ranges::greater(),
                             [&](size_t i) { return state.shards[i].metadata().matrix_bytes; });
    const Threads threads(state.is_small);
    for (const size_t i : order) {
        if (auto loaded = state.shards[i].load(); !loaded) return loaded.error();
    }
    return {};
}

Result<void> Program::join_shards(State& state) {
    std::ranges::sort(state.shards, {}, [](const Shard& shard) { return shard.metadata().methods[0].start_layer; });
    std::vector<NamedMetadata> named;
    for (const Shard& shard : state.shards) named.push_back({shard.path(), &shard.metadata()});
    auto whole = join_parts(named);
    if (!whole) return whole.error();
    state.metadata = *std::move(whole);
    for (size_t method = 0; method < state.metadata.methods.size(); ++method) {
        const MethodSpec& spec = state.metadata.methods[method];
        std::vector<Route>& routes = state.routes.emplace_back();
        for (const Shard& shard : state.shards) {
            const MethodSpec& part = shard.metadata().methods[method];
            routes.push_back({places(part.inputs, spec.inputs), places(part.outputs, spec.outputs), {}, {}, {}});
            routes.back().given.resize(part.inputs.size());
        }
        state.outputs.resize(std::max(state.outputs.size(), spec.outputs.size()));
    }
    return {};
}

Result<std::span<const void* const>> Program::step(size_t method, StepSize step, std::span<const void* const> inputs) {
    const Threads threads(state_->is_small);
    const void* stream = nullptr;
    const size_t count = state_->shards.size();
    for (size_t i = 0; i < count; ++i) {
        if (const size_t next = (i + 1) % count; !state_->resident[next]) state_->shards[next].read_ahead();
        Route& route = state_->routes[method][i];
        std::ranges::transform(route.inputs, route.given.begin(),
                               [&](size_t place) { return place == kFromBefore ? stream : inputs[place]; });
        auto found = state_->resident[i] ? state_->shards[i].run(method, step, route.given) : run_once(i, method, step);
        if (!found) return found.error();
        for (size_t output = 0; output < found->size(); ++output) {
            const size_t place = route.outputs[output];
            (place == kFromBefore ? stream : state_->outputs[place]) = (*found)[output];
        }
    }
    return std::span<const void* const>(state_->outputs).first(state_->metadata.methods[method].outputs.size());
}

Result<std::span<const void* const>> Program::run_once(size_t number, size_t method, StepSize step) {
    Shard& shard = state_->shards[number];
    Route& route = state_->routes[method][number];
    if (auto loaded = shard.load_mapped(); !loaded) return loaded.error();
    const auto found = shard.run(method, step, route.given);
    if (!found) return found.error();
    const std::vector<TensorSpec>& specs = shard.metadata().methods[method].outputs;
    route.copies.resize(specs.size());
    route.copied.resize(specs.size());
    for (size_t i = 0; i < specs.size(); ++i) {
        const auto* bytes = static_cast<const std::byte*>((*found)[i]);
        const auto size = static_cast<size_t>(specs[i].elements(step)) * size_of(specs[i].dtype);
        route.copies[i].assign(bytes, bytes + size);
        route.copied[i] = route.copies[i].data();
    }
    shard.unload();
    return std::span<const void* const>(route.copied);
}

}  // namespace llama_runner
