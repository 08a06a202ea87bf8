#pragma once

#include <memory>
#include <span>
#include <string>

#include "llama_runner/metadata.h"
#include "llama_runner/result.h"

/// The interface to ExecuTorch; only files in this folder include it.
namespace llama_runner {

/// One file with some or all blocks of a model.
class Shard {
  public:
    /// Opens the file and reads its metadata.
    static Result<Shard> open(const std::string& path);

    Shard(Shard&& other) noexcept;
    Shard& operator=(Shard&& other) noexcept;
    ~Shard();

    const std::string& path() const;
    const Metadata& metadata() const;

    /// Loads the methods, which allocates the memory for the weights.
    Result<void> load();

    /// Loads the methods with weights from a file of packed weights beside it, which the first call writes. The system
    /// may drop this mapped memory and read it again. If no such file can be written, this is the same as `load`.
    Result<void> load_mapped();

    /// Frees the methods and their memory.
    void unload();

    /// Asks the operating system to read the file into the page cache in the background.
    void read_ahead() const;

    /// Runs a method once; see `Steps::step`.
    Result<std::span<const void* const>> run(size_t method, StepSize step, std::span<const void* const> inputs);

  private:
    struct State;

    explicit Shard(std::unique_ptr<State> state);

    std::unique_ptr<State> state_;
};

/// Checks that this ExecuTorch has the backends and operators that a file needs.
Result<void> check_requirements(const std::string& path, const Requirements& needed);

/// Sets the number of ExecuTorch's threads, in the whole process.
Result<void> set_threads(int64_t threads);

/// Makes ExecuTorch use only the caller's thread for a small model, while it is loaded and while it runs.
class Threads {
  public:
    explicit Threads(bool is_small);
    ~Threads();

    Threads(const Threads&) = delete;
    Threads& operator=(const Threads&) = delete;

  private:
    bool is_small_;
};

}  // namespace llama_runner
