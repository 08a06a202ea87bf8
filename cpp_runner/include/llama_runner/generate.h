#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "llama_runner/sampler.h"
#include "llama_runner/session.h"
#include "llama_runner/tokenizer.h"

namespace llama_runner {

class Program;

/// Why a text ended: after a stop token, or because max_new_tokens or the context is used up.
enum class FinishReason { kNone, kStopToken, kLimit };

/// "stop", "length", or nothing.
std::optional<std::string_view> name_of(FinishReason reason);

/// One generated token.
struct Step {
    int64_t token = 0;
    /// The text it completes; empty while a UTF-8 character is open, and for a stop token.
    std::string text;
    FinishReason finish_reason = FinishReason::kNone;
};

/// How to choose tokens and when to end.
struct GenerationOptions {
    SamplingOptions sampling;
    /// None for as many as the context holds.
    std::optional<int64_t> max_new_tokens;
    /// Ids that end the text.
    std::vector<int64_t> stop_ids;

    /// Fails where a value is outside its range.
    Result<void> check() const;
};

/// Appends a prompt to a session and yields what follows it, one step at a time.
///
/// Of P prompt tokens in a context of T, T - P + 1 tokens can follow: the last needs no place of its own.
class Generator {
  public:
    /// `session`, `rng` and `tokenizer` (which may be null: then steps carry no text) must outlive the generator.
    static Result<Generator> create(Session& session, std::span<const int64_t> prompt, GenerationOptions options,
                                    Rng& rng, const Tokenizer* tokenizer);

    /// The next step, or null after the last. It is overwritten by the next call. The first call runs the prompt, and
    /// fails where that is empty or does not fit; see `Session::prefill`.
    Result<const Step*> next();

  private:
    Generator(Session& session, std::span<const int64_t> prompt, GenerationOptions options, Rng& rng);

    Result<const Step*> advance();

    Session* session_;
    std::vector<int64_t> prompt_;
    GenerationOptions options_;
    Rng* rng_;
    Sampler sampler_;
    std::optional<StreamDecoder> decoder_;
    int64_t count_ = 0;
    Step step_;
};

/// The ids of a prompt, BOS first where the model has one. Fails where the file carries no tokenizer.
Result<std::vector<int64_t>> prompt_ids(const Program& program, std::string_view text, bool parse_special = false);

}  // namespace llama_runner
