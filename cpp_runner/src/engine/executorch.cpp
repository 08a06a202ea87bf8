#include "engine/executorch.h"

#include <fcntl.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <executorch/extension/data_loader/mmap_data_loader.h>
#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/extension/threadpool/threadpool_guard.h>
#include <executorch/runtime/backend/backend_options_map.h>
#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/platform/platform.h>
#include <executorch/runtime/platform/runtime.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <set>
#include <stdexcept>

#include "pte/program_check.h"
#include "support/checksum.h"

namespace et = executorch::runtime;

#ifdef ET_USE_THREADPOOL
// Exported by ExecuTorch's thread pool library, whose header is not installed.
namespace executorch::extension::threadpool {
class ThreadPool {
  public:
    bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool
#endif

namespace llama_runner {

namespace {

constexpr size_t kMostDimensions = 8;

/// ExecuTorch's latest error message, which becomes part of our error messages instead of going to stderr.
thread_local std::array<char, 256> last_complaint{};

void keep_complaint(et_timestamp_t, et_pal_log_level_t level, const char*, const char*, size_t, const char* message,
                    size_t length) {
    if (level != kError && level != kFatal) return;
    const size_t count = std::min(length, last_complaint.size() - 1);
    std::memcpy(last_complaint.data(), message, count);
    last_complaint[count] = '\0';
}

/// Takes the place of ExecuTorch's abort, which ends the process when a program is not what a kernel expects.
[[noreturn]] void refuse() { throw std::runtime_error(last_complaint.data()); }

void start_runtime() {
    static const bool started = [] {
        et::PalImpl platform = et::PalImpl::create(keep_complaint, "llama_runner");
        platform.abort = refuse;
        et::register_pal(platform);
        et::runtime_init();
        return true;
    }();
    static_cast<void>(started);
}

Error failure(const std::string& what, et::Error error) {
    std::string message = what + " failed in ExecuTorch (" + et::to_string(error);
    if (last_complaint[0] != '\0') message += std::string(": ") + last_complaint.data();
    return {message + "); export the file again"};
}

/// Temporary memory for kernels during one call. Allocations that do not fit in the block use malloc, and the block
/// grows for the next call, so that later steps do not allocate.
class Scratch final : public et::MemoryAllocator {
  public:
    Scratch() : MemoryAllocator(0, nullptr) {}

    void* allocate(size_t size, size_t alignment = kDefaultAlignment) override {
        void* start = block_.data() + used_;
        size_t space = block_.size() - used_;
        needed_ += size + alignment;
        if (std::align(alignment, size, start, space) != nullptr) {
            used_ = block_.size() - space + size;
            return start;
        }
        return overflow_.allocate(size, alignment);
    }

    void reset() override {
        if (needed_ > block_.size()) block_.resize(needed_);
        overflow_.reset();
        used_ = needed_ = 0;
    }

  private:
    std::vector<uint8_t> block_;
    executorch::extension::MallocMemoryAllocator overflow_;
    size_t used_ = 0;
    size_t needed_ = 0;
};

/// The options that make XNNPACK pack each weight once for all methods, which halves the memory and shortens loading.
/// If a file is given, XNNPACK stores packed weights in it and maps it the next time.
class BackendOptions {
  public:
    explicit BackendOptions(const std::string& packed_file = "") {
        bool set = xnnpack_.set_option("weight_cache_enabled", true) == et::Error::Ok;
        if (!packed_file.empty() && packed_file.size() < et::kMaxOptionValueLength) {
            set = set && xnnpack_.set_option("packed_cache_path", packed_file.c_str()) == et::Error::Ok;
        }
        ET_CHECK(set && options_.set_options("XnnpackBackend", xnnpack_.view()) == et::Error::Ok);
    }

    const et::LoadBackendOptionsMap& get() const { return options_; }

  private:
    et::BackendOptions<2> xnnpack_;
    et::LoadBackendOptionsMap options_;
};

/// A loaded method and its memory.
struct Loaded {
    executorch::extension::MallocMemoryAllocator structures;
    Scratch scratch;
    std::vector<std::vector<uint8_t>> planned;
    std::vector<et::Span<uint8_t>> planned_spans;
    std::optional<et::HierarchicalAllocator> planned_memory;
    std::optional<et::MemoryManager> manager;
    std::optional<et::Method> method;
    std::vector<std::unique_ptr<std::max_align_t[]>> outputs;
    std::vector<const void*> output_pointers;
};

Result<std::unique_ptr<Loaded>> load(const et::Program& program, const char* name, const BackendOptions& options) {
    last_complaint[0] = '\0';
    const auto meta = program.method_meta(name);
    if (!meta.ok()) return Error{std::string("the file has no ") + name + "; export it again"};
    auto loaded = std::make_unique<Loaded>();
    for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
        loaded->planned.emplace_back(static_cast<size_t>(*meta->memory_planned_buffer_size(i)));
    }
    for (auto& buffer : loaded->planned) loaded->planned_spans.emplace_back(buffer.data(), buffer.size());
    loaded->planned_memory.emplace(et::Span(loaded->planned_spans.data(), loaded->planned_spans.size()));
    loaded->manager.emplace(&loaded->structures, &*loaded->planned_memory, &loaded->scratch);
    auto method = program.load_method(name, &*loaded->manager, nullptr, nullptr, &options.get());
    if (!method.ok()) return failure(std::string("loading ") + name, method.error());
    loaded->method.emplace(std::move(*method));
    return loaded;
}

Result<Constant> constant(const et::EValue& value, const char* name) {
    if (value.isInt()) return Constant(value.toInt());
    if (value.isBool()) return Constant(int64_t{value.toBool()});
    if (value.isString()) return Constant(std::string(value.toString()));
    if (!value.isTensor()) return Error{std::string(name) + " has an unknown type; export the file again"};
    const auto& tensor = value.toTensor();
    return Constant(ConstantTensor{tensor.scalar_type() == et::etensor::ScalarType::Float,
                                   {tensor.sizes().begin(), tensor.sizes().end()},
                                   tensor.const_data_ptr(),
                                   tensor.nbytes()});
}

Result<void> call_constant(const et::Program& program, const char* name,
                           const std::function<void(std::vector<Constant>)>& take) {
    auto loaded = load(program, name, BackendOptions());
    if (!loaded) return loaded.error();
    et::Method& method = *(*loaded)->method;
    if (const auto error = method.execute(); error != et::Error::Ok)
        return failure(std::string("reading ") + name, error);
    std::vector<Constant> values;
    for (size_t i = 0; i < method.outputs_size(); ++i) {
        auto value = constant(method.get_output(i), name);
        if (!value) return value.error();
        values.push_back(*std::move(value));
    }
    take(std::move(values));
    return {};
}

et::etensor::ScalarType scalar_type(Dtype dtype) {
    using et::etensor::ScalarType;
    switch (dtype) {
        case Dtype::kFloat32:
            return ScalarType::Float;
        case Dtype::kFloat16:
            return ScalarType::Half;
        case Dtype::kInt8:
            return ScalarType::Char;
        case Dtype::kInt64:
            return ScalarType::Long;
    }
    return ScalarType::Undefined;
}

bool matches(const et::Result<et::TensorInfo>& found, const TensorSpec& spec, StepSize most) {
    return found.ok() && found->scalar_type() == scalar_type(spec.dtype) &&
           found->sizes().size() == spec.shape.size() && spec.shape.size() <= kMostDimensions &&
           found->nbytes() == static_cast<size_t>(spec.elements(most)) * size_of(spec.dtype);
}

/// Checks that a method matches its spec, and sets the memory of its outputs.
Result<void> prepare(Loaded& loaded, const MethodSpec& spec) {
    const et::MethodMeta meta = loaded.method->method_meta();
    bool whole = meta.num_inputs() == spec.inputs.size() && meta.num_outputs() == spec.outputs.size();
    for (size_t i = 0; whole && i < spec.inputs.size(); ++i) {
        whole = matches(meta.input_tensor_meta(i), spec.inputs[i], spec.most());
    }
    for (size_t i = 0; whole && i < spec.outputs.size(); ++i) {
        whole = matches(meta.output_tensor_meta(i), spec.outputs[i], spec.most());
    }
    if (!whole) return Error{"method " + spec.name + " is not what get_methods says; export the file again"};
    for (size_t i = 0; i < spec.outputs.size(); ++i) {
        const TensorSpec& output = spec.outputs[i];
        const size_t bytes = static_cast<size_t>(output.elements(spec.most())) * size_of(output.dtype);
        auto& memory = loaded.outputs.emplace_back(
            std::make_unique_for_overwrite<std::max_align_t[]>(bytes / sizeof(std::max_align_t) + 1));
        loaded.output_pointers.push_back(memory.get());
        const auto error = loaded.method->set_output_data_ptr(memory.get(), bytes, i);
        if (error != et::Error::Ok) return failure("placing " + output.name, error);
    }
    return {};
}

}  // namespace

Result<void> check_requirements(const std::string& path, const Requirements& needed) {
    std::set<std::string> missing(needed.backends.begin(), needed.backends.end());
    for (size_t i = 0; i < et::get_num_registered_backends(); ++i) {
        if (const auto name = et::get_backend_name(i); name.ok()) missing.erase(*name);
    }
    for (const std::string& name : needed.operators) {
        if (!name.starts_with("executorch_prim::")) missing.insert(name);
    }
    for (const et::Kernel& kernel : et::get_registered_kernels()) missing.erase(kernel.name_);
    if (missing.empty()) return {};

    constexpr size_t kMost = 4;
    std::string names;
    size_t shown = 0;
    for (auto name = missing.begin(); name != missing.end() && shown < kMost; ++name, ++shown) {
        names += (shown > 0 ? ", " : "") + *name;
    }
    if (missing.size() > kMost) names += " and " + std::to_string(missing.size() - kMost) + " more";
    return Error{path + " needs " + names + ", which the installed ExecuTorch lacks; install ExecuTorch " +
                 needed.executorch + ", which made the file, or export it again"};
}

Result<void> set_threads(int64_t threads) {
    if (threads < 1) return Error{"--threads " + std::to_string(threads) + " is invalid; give 1 or more"};
#ifdef ET_USE_THREADPOOL
    auto* const pool = executorch::extension::threadpool::get_threadpool();
    if (pool != nullptr && pool->_unsafe_reset_threadpool(static_cast<uint32_t>(std::min<int64_t>(threads, 1024)))) {
        return {};
    }
#endif
    return Error{"--threads " + std::to_string(threads) +
                 " is invalid, because this ExecuTorch has no thread pool; leave it out"};
}

Threads::Threads(bool is_small) : is_small_(is_small) {
#ifdef ET_USE_THREADPOOL
    if (is_small_) executorch::extension::threadpool::NoThreadPoolGuard::set_enabled(true);
#endif
}

Threads::~Threads() {
#ifdef ET_USE_THREADPOOL
    if (is_small_) executorch::extension::threadpool::NoThreadPoolGuard::set_enabled(false);
#endif
}

struct Shard::State {
    State(std::string name, executorch::extension::MmapDataLoader file)
        : path(std::move(name)), loader(std::move(file)) {}

    std::string path;
    executorch::extension::MmapDataLoader loader;
    std::optional<et::Program> program;
    Metadata metadata;
    std::vector<std::unique_ptr<Loaded>> methods;

    Result<void> load(const BackendOptions& options);

    /// Returns the path of the file of packed weights: the .pte's path followed by the export's identity.
    std::string packed_file() const {
        std::string digits;
        for (const unsigned char byte : metadata.identity) {
            for (const int digit : {byte >> 4, byte & 15}) digits += "0123456789abcdef"[digit];
        }
        return path + "." + digits.substr(0, 16) + ".packed";
    }
};

Shard::Shard(std::unique_ptr<State> state) : state_(std::move(state)) {}

Shard::Shard(Shard&&) noexcept = default;

Shard& Shard::operator=(Shard&&) noexcept = default;

Shard::~Shard() = default;

const std::string& Shard::path() const { return state_->path; }

const Metadata& Shard::metadata() const { return state_->metadata; }

Result<Shard> Shard::open(const std::string& path) {
    using executorch::extension::MmapDataLoader;
    start_runtime();
    auto file = MmapDataLoader::from(path.c_str(), MmapDataLoader::MlockConfig::NoMlock);
    if (!file.ok()) return failure("opening " + path, file.error());
    Shard shard(std::make_unique<State>(path, std::move(*file)));
    auto program = et::Program::load(&shard.state_->loader, et::Program::Verification::InternalConsistency);
    if (!program.ok()) return failure("opening " + path, program.error());
    auto bytes = shard.state_->loader.load(0, *shard.state_->loader.size(), {});
    if (!bytes.ok()) return failure("opening " + path, bytes.error());
    if (const auto problem = malformed({static_cast<const std::byte*>(bytes->data()), bytes->size()})) {
        return Error{path + " is malformed (" + *problem + "); export it again"};
    }
    shard.state_->program.emplace(std::move(*program));
    auto metadata = from_constants(
        [&](const char* name, const auto& take) { return call_constant(*shard.state_->program, name, take); });
    if (!metadata) return metadata.error();
    shard.state_->metadata = *std::move(metadata);
    return shard;
}

Result<void> Shard::load() { return state_->load(BackendOptions()); }

Result<void> Shard::load_mapped() { return state_->load(BackendOptions(state_->packed_file())); }

Result<void> Shard::State::load(const BackendOptions& options) {
    for (const MethodSpec& spec : metadata.methods) {
        auto loaded = llama_runner::load(*program, spec.name.c_str(), options);
        if (!loaded) return loaded.error();
        if (auto prepared = prepare(**loaded, spec); !prepared) return prepared.error();
        methods.push_back(*std::move(loaded));
    }
    return {};
}

void Shard::unload() {
    state_->methods.clear();
#ifdef __GLIBC__
    malloc_trim(0);  // returns freed memory to the system
#endif
}

void Shard::read_ahead() const {
#ifdef POSIX_FADV_WILLNEED
    const std::string packed = state_->packed_file();
    File file(std::fopen(packed.c_str(), "rb"));
    if (!file) file.reset(std::fopen(state_->path.c_str(), "rb"));
    if (file) {
        posix_fadvise(fileno(file.get()), 0, 0, POSIX_FADV_WILLNEED);
    }
#endif
}

Result<std::span<const void* const>> Shard::run(size_t method, StepSize step, std::span<const void* const> inputs) {
    static constexpr std::array<uint8_t, kMostDimensions> kOrder{0, 1, 2, 3, 4, 5, 6, 7};
    const MethodSpec& spec = state_->metadata.methods[method];
    Loaded& loaded = *state_->methods[method];
    last_complaint[0] = '\0';
    for (size_t i = 0; i < inputs.size(); ++i) {
        const TensorSpec& input = spec.inputs[i];
        std::array<int32_t, kMostDimensions> sizes{};
        std::transform(input.shape.begin(), input.shape.end(), sizes.begin(),
                       [step](int64_t size) { return static_cast<int32_t>(step.of(size)); });
        et::etensor::TensorImpl tensor(scalar_type(input.dtype), static_cast<ssize_t>(input.shape.size()), sizes.data(),
                                       const_cast<void*>(inputs[i]), const_cast<uint8_t*>(kOrder.data()));
        const auto error = loaded.method->set_input(et::EValue(et::etensor::Tensor(&tensor)), i);
        if (error != et::Error::Ok) return failure("passing " + input.name, error);
    }
    if (const auto error = loaded.method->execute(); error != et::Error::Ok)
        return failure("running " + spec.name, error);
    return std::span<const void* const>(loaded.output_pointers);
}

}  // namespace llama_runner
