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

/// Tokens at the start of a text that `Session::slide` keeps, because attention falls back on them (StreamingLLM,
/// https://arxiv.org/abs/2309.17453, section 3.2).
inline constexpr int64_t kSinks = 4;

/// One text in the making: its tokens, its caches, and the ways to extend, shorten, copy and keep it.
///
/// Sessions of one program are independent, also in several threads: they take turns, as a program runs one step at a
/// time. After an error the session stands where the last whole step left it.
class Session {
  public:
    /// Allocates all that the session will ever need; `program` must outlive it.
    static Result<Session> create(Steps& program);

    /// How many tokens the text has.
    int64_t position() const { return cache_.position(); }

    /// How many tokens it can have.
    int64_t capacity() const { return cache_.capacity(); }

    /// Keys and values of the text so far; without buffers where the program's method takes the whole text.
    const KVCache& cache() const { return cache_; }

    /// Width of the logits.
    int64_t vocab_size() const { return program_->metadata().vocab_size; }

    /// The ids of the text so far.
    std::span<const int64_t> tokens() const { return tokens_; }

    /// Starts a new text.
    void reset();

    /// Forgets the tokens from `position` on; see `KVCache::rewind`.
    Result<void> rewind(int64_t position);

    /// Appends a prompt, chunk by chunk, and returns the logits after its last token: [V], valid until the next call.
    ///
    /// Fails where the prompt is empty, does not fit behind the present position, or holds an id that is none.
    Result<std::span<const float>> prefill(std::span<const int64_t> tokens);

    /// Appends one token and returns the logits after it, as `prefill` does.
    Result<std::span<const float>> decode(int64_t token) { return prefill({&token, 1}); }

    /// Appends tokens, chunk by chunk, and returns the logits after each of the last `rows` of them, [rows, V], valid
    /// until the next call. Up to `MethodSpec::max_rows` of them come out of one step. Fails as `prefill` does.
    Result<std::span<const float>> extend(std::span<const int64_t> tokens, int64_t rows);

    /// The logits after each of a few tokens that may come next, at most `max_proposed()`, [n, V], valid until the next
    /// call: of the text as if they were appended. `accept` then appends as many of them as are right. Fails as
    /// `prefill` does.
    Result<std::span<const float>> propose(std::span<const int64_t> tokens);

    /// Appends the first `count` of the tokens just proposed, 1 or more.
    Result<void> accept(int64_t count);

    /// How many tokens `propose` takes; 1 where guessing does not pay.
    int64_t max_proposed() const;

    /// Makes the text a prompt, and returns the logits after it, as `prefill` does. Of what the prompt begins with, as
    /// much as the text began with, too, is not run again.
    Result<std::span<const float>> restart(std::span<const int64_t> prompt);

    /// A session of its own that stands where this one does. Only what is filled of the caches is copied: memory behind
    /// it is not touched before it is used.
    Result<Session> fork() const;

    /// Keeps the session in a file, which is as large as what is filled of the caches; see session_file.h. The file is
    /// whole, or as it was before.
    Result<void> save(const std::string& path) const;

    /// Makes the session what was saved, with this model, in Python or C++. Fails where the file is none, damaged, or
    /// another model's; the session is then as it was.
    Result<void> load(const std::string& path);

    /// Makes room: forgets the older half of the text, but for its first tokens, and moves the rest to earlier
    /// positions, as if those had never been. Keys that were rotated for a position are turned back by the difference.
    ///
    /// Returns how many tokens it forgot. Fails where positions are learned, or where the model sees so much of its
    /// context that nothing can be spared.
    Result<int64_t> slide();

    /// What the last block returned for each token of the latest prefill or decode, normalised: [n, hidden_width()],
    /// valid until the next. Empty before the first and after a failure, and where the program does not return it.
    std::span<const float> hidden() const;

    /// Width of the hidden states; 0 where the program does not return them.
    int64_t hidden_width() const { return hidden_width_; }

  private:
    /// A method and the buffers that its inputs and outputs lie in.
    ///
    /// With caches, a step's tokens stand at the start of the input `tokens`, and the caches hold those before them.
    /// Without, `tokens` holds the text so far, and a step's stand behind it.
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
        /// Past the end where there is none.
        size_t hidden_output;
        /// Output of each cache buffer's new rows.
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
    /// What the latest step gave, and its length.
    std::span<const void* const> outputs_;
    int64_t length_ = 0;
    std::vector<Binding> bindings_;
    std::vector<const void*> rows_;
    /// Room for a whole text, untouched until it is used.
    std::unique_ptr<float[]> hidden_;
    int64_t hidden_width_ = 0;
    int64_t hidden_rows_ = 0;
};

}  // namespace llama_runner
