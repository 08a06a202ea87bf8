#pragma once

#include <memory>
#include <span>
#include <string>

#include "llama_runner/metadata.h"
#include "llama_runner/result.h"

/// What asks ExecuTorch: nothing outside this room includes it.
namespace llama_runner {

/// One file: some blocks of a model, or all.
class Shard {
  public:
    /// Opens the file and reads what it carries.
    static Result<Shard> open(const std::string& path);

    Shard(Shard&& other) noexcept;
    Shard& operator=(Shard&& other) noexcept;
    ~Shard();

    const std::string& path() const;
    const Metadata& metadata() const;

    /// Loads its methods, which takes the memory for its weights.
    Result<void> load();

    /// Loads its methods from weights that are packed in a file beside it, which it makes the first time: their memory
    /// is the system's, to be dropped and read again. Where no file can be made it is as `load`.
    Result<void> load_mapped();

    /// Gives that memory back.
    void unload();

    /// Has the system read the file while something else is computed.
    void read_ahead() const;

    /// Runs a method once; see `Steps::step`.
    Result<std::span<const void* const>> run(size_t method, StepSize step, std::span<const void* const> inputs);

  private:
    struct State;

    explicit Shard(std::unique_ptr<State> state);

    std::unique_ptr<State> state_;
};

/// Refuses what this ExecuTorch cannot run.
Result<void> check_requirements(const std::string& path, const Requirements& needed);

/// How many threads ExecuTorch uses, in the whole process.
Result<void> set_threads(int64_t threads);

/// Keeps a small model to the caller's thread, while it is loaded and while it runs.
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
