#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "llama_runner/sampler.h"
#include "llama_runner/session.h"
#include "llama_runner/speculative.h"
#include "llama_runner/tokenizer.h"

namespace llama_runner {

class Program;

/// Why a text ended: a stop token or stop string (kStop), or max_new_tokens or the context used up (kLimit).
enum class FinishReason { kNone, kStop, kLimit };

/// Returns "stop", "length", or nothing.
std::optional<std::string_view> name_of(FinishReason reason);

/// One generated token.
struct Step {
    int64_t token = 0;
    /// The text that it completes; empty while a UTF-8 character is incomplete or a stop string may have begun. A stop
    /// token has no text of its own, only the text held back before it.
    std::string text;
    FinishReason finish_reason = FinishReason::kNone;
    /// Natural logarithm of its probability in the model's own distribution, before any sampling option; none if
    /// GenerationOptions::logprobs is none.
    std::optional<double> logprob;
    /// The likeliest tokens in its place, as many as GenerationOptions::logprobs, each with its logarithm.
    std::vector<LogProb> top_logprobs;
};

/// Options for choosing tokens and ending a text.
struct GenerationOptions {
    SamplingOptions sampling;
    /// Maximum number of new tokens; none for as many as the context holds.
    std::optional<int64_t> max_new_tokens;
    /// Ids that end the text.
    std::vector<int64_t> stop_ids;
    /// Strings that end the text; see `StopFilter`.
    std::vector<std::string> stop_strings = {};
    /// Number of likeliest tokens whose probability each step reports, beside its own token's; none for no
    /// probabilities at all.
    std::optional<int64_t> logprobs = std::nullopt;
    /// Whether to call `Session::slide` when the context is full, instead of ending the text.
    bool slides_when_full = false;
    /// A drafter that guesses the next tokens, which changes only the time a text takes; none by default.
    std::optional<Lookup> lookup = std::nullopt;

    /// Fails if a value is outside its range.
    Result<void> check() const;
};

/// A filter that passes on a text, piece by piece, up to the stop string that begins earliest.
///
/// Text that may be the beginning of a stop string is held back until that is certain. So the result does not depend on
/// how the text was split into pieces.
class StopFilter {
  public:
    /// Allocates for pieces of up to `room` bytes, so that `add` need not.
    explicit StopFilter(std::vector<std::string> stop_strings, size_t room = 0);

    /// Takes the next piece, and appends the text that is certain now to `given`.
    void add(std::string_view text, std::string& given);

    /// Ends the text, and appends what was held back, up to a stop string in it, to `given`.
    void finish(std::string& given);

    /// Whether a stop string was reached.
    bool stopped() const { return stopped_; }

  private:
    size_t found() const;
    bool may_begin(size_t at) const;

    std::vector<std::string> stops_;
    size_t longest_ = 0;
    std::string held_;
    bool stopped_ = false;
};

/// Replaces a session's text by a prompt and generates the tokens that follow it, one step at a time.
///
/// If the session's earlier text begins like the prompt, the common beginning is not run again.
///
/// After P prompt tokens in a context of T positions, T - P + 1 tokens can follow, because the last one is never run.
class Generator {
  public:
    /// Creates a generator. `session`, `rng` and `tokenizer` must outlive it. `tokenizer` may be null; then steps have
    /// no text.
    static Result<Generator> create(Session& session, std::span<const int64_t> prompt, GenerationOptions options,
                                    Rng& rng, const Tokenizer* tokenizer);

    /// Returns the next step, or null after the last. The next call overwrites it. The first call runs the prompt, and
    /// fails if that is empty or does not fit; see `Session::prefill`.
    Result<const Step*> next();

  private:
    Generator(Session& session, std::span<const int64_t> prompt, GenerationOptions options, Rng& rng);

    Result<const Step*> advance();
    void tell(bool stop, bool end);
    Result<void> run();
    Result<void> settle(bool end);

    Session* session_;
    std::vector<int64_t> prompt_;
    GenerationOptions options_;
    Rng* rng_;
    Sampler sampler_;
    std::optional<StreamDecoder> decoder_;
    StopFilter stops_;
    std::string said_;
    int64_t count_ = 0;
    /// The prompt and the chosen tokens.
    std::vector<int64_t> tokens_;
    /// The latest token and the tokens guessed after it, the logits after each of them, and the number of rows of
    /// logits already used.
    std::vector<int64_t> proposed_;
    std::span<const float> logits_;
    int64_t row_ = 0;
    Step step_;
};

/// Returns the ids of a prompt, with BOS first if the model has one. Fails if the file has no tokenizer.
Result<std::vector<int64_t>> prompt_ids(const Program& program, std::string_view text, bool parse_special = false);

}  // namespace llama_runner
