#pragma once

#include <memory>
#include <optional>
#include <string>

#include "llama_runner/metadata.h"
#include "llama_runner/result.h"
#include "llama_runner/steps.h"
#include "llama_runner/tokenizer.h"

namespace llama_runner {

/// Bytes of matrices below which waking another thread takes longer than it saves.
inline constexpr int64_t kSmall = 16'000'000;

/// A model of ours, ready to be run: a .pte and its methods, or the shards of one, each of which runs its blocks.
/// Checked before it is believed, immutable, shared by any number of sessions, one step at a time.
class Program final : public Steps {
  public:
    struct Options {
        /// How many threads ExecuTorch uses, in the whole process; none leaves its choice, one per core, and runs a
        /// model of less than kSmall bytes in the caller's.
        std::optional<int64_t> threads;
        /// Compare the checksum, which reads the file through once.
        bool check = true;
        /// Bytes that this process may hold, with one session. Shards for which there is no room are loaded for each
        /// step; none keeps all.
        std::optional<int64_t> memory_budget;
    };

    /// Opens the file, or all of a folder: checks it, reads its metadata, and loads its methods.
    ///
    /// Fails where the budget is too little, it is not a whole file of ours, shards do not make one model, or this
    /// runtime lacks what it needs. Damage is found by the checksum; a file made to deceive, with a right checksum, is
    /// outside that promise.
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

    /// Loads a shard that does not stay, runs it, and gives its memory back.
    Result<std::span<const void* const>> run_once(size_t shard, size_t method, StepSize step);

    std::unique_ptr<State> state_;
};

}  // namespace llama_runner
