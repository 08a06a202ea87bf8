#pragma once

#include <memory>
#include <optional>
#include <string>

#include "llama_runner/metadata.h"
#include "llama_runner/result.h"
#include "llama_runner/steps.h"
#include "llama_runner/tokenizer.h"

namespace llama_runner {

/// Bytes of matrices below which several threads are slower than one.
inline constexpr int64_t kSmall = 16'000'000;

/// A model that llama-pte exported, ready to run: one .pte, or several shards, which run some blocks each. It is
/// immutable and shared by any number of sessions, one step at a time.
class Program final : public Steps {
  public:
    struct Options {
        /// Number of ExecuTorch's threads, in the whole process. None means one per core, and only the caller's thread
        /// for a model of less than kSmall bytes.
        std::optional<int64_t> threads;
        /// Whether to compare the checksum, which reads the file through once.
        bool check = true;
        /// Bytes that this process may hold, with one session. Shards that do not fit are loaded for each step. None
        /// keeps all in memory.
        std::optional<int64_t> memory_budget;
    };

    /// Opens a file, or a folder of shards: checks the files, reads their metadata, and loads their methods.
    ///
    /// Fails if a file is damaged or not by llama-pte, shards are not one model, the memory budget is too small, or
    /// this runtime lacks a backend or operator. The checksum finds accidental damage; a malicious file with a correct
    /// checksum is not detected.
    static Result<std::unique_ptr<Program>> open(const std::string& path, const Options& options);

    ~Program() override;

    const Metadata& metadata() const override;

    /// The tokenizer inside the file, or null. Owned by the program.
    const Tokenizer* tokenizer() const;

    Result<std::span<const void* const>> step(size_t method, StepSize step,
                                              std::span<const void* const> inputs) override;

  private:
    struct State;

    explicit Program(std::unique_ptr<State> state);

    static Result<void> join_shards(State& state);
    static Result<void> load(State& state, const Options& options);

    /// Loads a shard that does not stay in memory, runs it, and frees its memory.
    Result<std::span<const void* const>> run_once(size_t shard, size_t method, StepSize step);

    std::unique_ptr<State> state_;
};

}  // namespace llama_runner
