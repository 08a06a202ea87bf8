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

/// Why a text ended: after a stop token or a stop string, or because max_new_tokens or the context is used up.
enum class FinishReason { kNone, kStop, kLimit };

/// "stop", "length", or nothing.
std::optional<std::string_view> name_of(FinishReason reason);

/// One generated token.
struct Step {
    int64_t token = 0;
    /// The text it completes; empty while a UTF-8 character is open or a stop string may have begun, and for a stop
    /// token, but for what was held back until then.
    std::string text;
    FinishReason finish_reason = FinishReason::kNone;
    /// The logarithm of its probability in the model's own distribution, before any option of the sampler; none where
    /// GenerationOptions::logprobs is.
    std::optional<double> logprob;
    /// The likeliest tokens there, as many as GenerationOptions::logprobs says, each with its own.
    std::vector<LogProb> top_logprobs;
};

/// How to choose tokens and when to end.
struct GenerationOptions {
    SamplingOptions sampling;
    /// None for as many as the context holds.
    std::optional<int64_t> max_new_tokens;
    /// Ids that end the text.
    std::vector<int64_t> stop_ids;
    /// Texts that end it, too; see `StopFilter`.
    std::vector<std::string> stop_strings = {};
    /// Of how many of the likeliest tokens each step tells the probability; none to tell not even its own.
    std::optional<int64_t> logprobs = std::nullopt;
    /// Where the context is used up: forget the older half of the text and go on, see `Session::slide`, in place of
    /// ending it.
    bool slides_when_full = false;
    /// Guesses, which change nothing but the time a text takes; none by default.
    std::optional<Lookup> lookup = std::nullopt;

    /// Fails where a value is outside its range.
    Result<void> check() const;
};

/// Lets a text through, piece by piece, up to the first of some strings: the one that begins earliest.
///
/// What may be the beginning of one is held back until it is certain. So what was let through never depends on where
/// the text was cut.
class StopFilter {
  public:
    /// Pieces of up to `room` bytes will need no more memory.
    explicit StopFilter(std::vector<std::string> stop_strings, size_t room = 0);

    /// Takes the next piece, and appends to `given` what can be given out now.
    void add(std::string_view text, std::string& given);

    /// Ends the text, and appends what was held back.
    void finish(std::string& given);

    /// Whether the text has come to one of the strings.
    bool stopped() const { return stopped_; }

  private:
    size_t found() const;
    bool may_begin(size_t at) const;

    std::vector<std::string> stops_;
    size_t longest_ = 0;
    std::string held_;
    bool stopped_ = false;
};

/// Makes a session's text a prompt and yields what follows it, one step at a time. Of an older text in the session,
/// what the prompt begins with is not run again.
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
    /// The prompt and what was chosen.
    std::vector<int64_t> tokens_;
    /// What was guessed behind the latest token that was run, and the logits of that and of the guessed ones; `row_` of
    /// these are used.
    std::vector<int64_t> proposed_;
    std::span<const float> logits_;
    int64_t row_ = 0;
    Step step_;
};

/// The ids of a prompt, BOS first where the model has one. Fails where the file carries no tokenizer.
Result<std::vector<int64_t>> prompt_ids(const Program& program, std::string_view text, bool parse_special = false);

}  // namespace llama_runner
