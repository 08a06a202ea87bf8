#pragma once

#include <memory>
#include <optional>
#include <string>

#include "llama_runner/metadata.h"
#include "llama_runner/result.h"
#include "llama_runner/session.h"
#include "llama_runner/tokenizer.h"

namespace llama_runner {

/// Bytes of matrices below which waking another thread takes longer than it saves.
inline constexpr int64_t kSmall = 16'000'000;

/// A .pte of ours and its methods: checked before it is believed, immutable, shared by any number of sessions, one
/// step at a time.
class Program final : public Steps {
  public:
    struct Options {
        /// How many threads ExecuTorch uses, in the whole process; none leaves its choice, one per core, and runs a
        /// model of less than kSmall bytes in the caller's.
        std::optional<int64_t> threads;
        /// Compare the checksum, which reads the file through once.
        bool check = true;
    };

    /// Opens the file: checks it, reads its metadata, and loads its methods.
    ///
    /// Fails where it is not a whole file of ours, or this runtime lacks what it needs. Damage is found by the
    /// checksum; a file made to deceive, with a right checksum, is outside that promise.
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

    std::unique_ptr<State> state_;
};

}  // namespace llama_runner
