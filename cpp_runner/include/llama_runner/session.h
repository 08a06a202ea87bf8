#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "llama_runner/kv_cache.h"
#include "llama_runner/metadata.h"
#include "llama_runner/position_inputs.h"
#include "llama_runner/result.h"
#include "llama_runner/steps.h"

namespace llama_runner {

/// Number of tokens at the start of a text that `Session::slide` keeps, because much attention goes to them
/// (StreamingLLM, https://arxiv.org/abs/2309.17453, section 3.2).
inline constexpr int64_t kSinks = 4;

/// One text, with its tokens and caches, which can be extended, shortened, copied and saved.
///
/// Sessions of one program are independent, also in several threads: they take turns, because a program runs one step
/// at a time. After an error the session is in the state after the last complete step.
class Session {
  public:
    /// Creates an empty session and allocates all memory that it needs; `program` must outlive it.
    static Result<Session> create(Steps& program);

    /// Number of tokens in the text.
    int64_t position() const { return cache_.position(); }

    /// Maximum number of tokens in the text.
    int64_t capacity() const { return cache_.capacity(); }

    /// The keys and values of the text; without buffers if the program's method takes the whole text.
    const KVCache& cache() const { return cache_; }

    /// Width of the logits.
    int64_t vocab_size() const { return program_->metadata().vocab_size; }

    /// The ids of the text.
    std::span<const int64_t> tokens() const { return tokens_; }

    /// Starts a new text.
    void reset();

    /// Removes the tokens from `position` on; see `KVCache::rewind`.
    Result<void> rewind(int64_t position);

    /// Appends a prompt, chunk by chunk, and returns the logits after its last token: [V], valid until the next call.
    ///
    /// Fails if the prompt is empty or does not fit after the present position, or has an unknown id.
    Result<std::span<const float>> prefill(std::span<const int64_t> tokens);

    /// Appends one token and returns the logits after it, as `prefill` does.
    Result<std::span<const float>> decode(int64_t token) { return prefill({&token, 1}); }

    /// Appends tokens, chunk by chunk, and returns the logits after each of the last `rows` of them, [rows, V], valid
    /// until the next call. One step returns at most `MethodSpec::max_rows` of them. Fails as `prefill` does.
    Result<std::span<const float>> extend(std::span<const int64_t> tokens, int64_t rows);

    /// Returns the logits after each of some guessed next tokens, at most `max_proposed()`, without appending the
    /// tokens: [n, V], valid until the next call. `accept` then appends as many of the tokens as are correct. Fails as
    /// `prefill` does.
    Result<std::span<const float>> propose(std::span<const int64_t> tokens);

    /// Appends the first `count` of the tokens of the latest `propose`, at least 1.
    Result<void> accept(int64_t count);

    /// Returns the maximum number of tokens for `propose`; 1 if the program cannot check guesses.
    int64_t max_proposed() const;

    /// Replaces the text by a prompt and returns the logits after it, as `prefill` does. The beginning that text and
    /// prompt have in common is not run again.
    Result<std::span<const float>> restart(std::span<const int64_t> prompt);

    /// Returns an independent session with the same text. Only the filled part of the caches is copied; the rest of
    /// their memory is not touched before it is used.
    Result<Session> fork() const;

    /// Saves the session to a file as large as the filled part of the caches; see session_file.h. On failure the
    /// earlier file is unchanged.
    Result<void> save(const std::string& path) const;

    /// Restores a session that was saved with this model, by Python or C++. Fails if the file is no saved session, is
    /// damaged, or is for another model; the session is then unchanged.
    Result<void> load(const std::string& path);

    /// Makes room: removes the older half of the text, except the first kSinks tokens. The later tokens move to earlier
    /// positions; keys with rotary embedding are rotated back by the difference.
    ///
    /// Returns the number of removed tokens. Fails if positions are learned, or if the window covers so much of the
    /// context that none can be removed.
    Result<int64_t> slide();

    /// The last block's output for each token of the latest prefill or decode, normalised: [n, hidden_width()], valid
    /// until the next one. Empty before the first, after a failure, and if the program does not return it.
    std::span<const float> hidden() const;

    /// Width of the hidden states; 0 if the program does not return them.
    int64_t hidden_width() const { return hidden_width_; }

  private:
    /// A method and the buffers of its inputs and outputs.
    ///
    /// With caches, the input `tokens` has only the step's tokens; the caches have the earlier ones. Without caches,
    /// `tokens` has the text so far, followed by the step's tokens.
    struct Binding {
        size_t method;
        int64_t min_length;
        int64_t max_length;
        int64_t max_rows;
        std::vector<int64_t> tokens;
        std::vector<float> select;
        PositionInputs positions;
        std::vector<const void*> inputs;
        size_t logits_output;
        /// Index of the output of hidden states; past the end if there is none.
        size_t hidden_output;
        /// Index of the output with each cache buffer's new rows.
        std::vector<size_t> rows_outputs;
    };

    Session(Steps& program, KVCache cache) : program_(&program), cache_(std::move(cache)) {}

    bool cached() const { return !cache_.buffers().empty(); }

    Result<void> bind(size_t method);
    Result<void> bind_input(Binding& binding, const TensorSpec& spec);
    Result<void> bind_outputs(Binding& binding, const MethodSpec& spec);
    Result<void> bind_hidden(Binding& binding, const MethodSpec& spec);
    Binding& binding_for(int64_t length);
    Result<void> check(std::span<const int64_t> tokens) const;
    Result<std::span<const float>> run(Binding& binding, std::span<const int64_t> tokens, int64_t rows);
    Result<void> commit(const Binding& binding, std::span<const int64_t> tokens);
    void keep_outputs(const Binding& binding);

    Steps* program_;
    KVCache cache_;
    std::vector<int64_t> tokens_;
    std::vector<float> logits_;
    std::vector<int64_t> proposed_;
    std::vector<std::vector<std::byte>> kept_;
    std::vector<const void*> kept_outputs_;
    /// The outputs of the latest step, and its length.
    std::span<const void* const> outputs_;
    int64_t length_ = 0;
    std::vector<Binding> bindings_;
    std::vector<const void*> rows_;
    /// Memory for the hidden states of a whole text, not touched before it is used.
    std::unique_ptr<float[]> hidden_;
    int64_t hidden_width_ = 0;
    int64_t hidden_rows_ = 0;
};

}  // namespace llama_runner
