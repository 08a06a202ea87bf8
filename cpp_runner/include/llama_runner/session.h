#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "llama_runner/kv_cache.h"
#include "llama_runner/metadata.h"
#include "llama_runner/preproc.h"
#include "llama_runner/result.h"

namespace llama_runner {

/// What a session needs of a program: `Program`, or a stand-in.
class Steps {
  public:
    virtual ~Steps() = default;

    virtual const Metadata& metadata() const = 0;

    /// Runs a method once.
    ///
    /// `method` counts in metadata().methods; `inputs` are in the order of its spec, at this `length`, and are read in
    /// place. Returns the outputs in the order of its spec, valid only until the next step of this program.
    virtual Result<std::span<const void* const>> step(size_t method, int64_t length,
                                                      std::span<const void* const> inputs) = 0;
};

/// One text in the making: its position, its caches, and the two ways to extend it.
///
/// Sessions of one program are independent, but take turns: a program runs one step at a time. After an error the
/// session stands where the last whole step left it.
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

    /// Starts a new text.
    void reset();

    /// Forgets the tokens from `position` on; see `KVCache::rewind`.
    Result<void> rewind(int64_t position) { return cache_.rewind(position); }

    /// Appends a prompt, chunk by chunk, and returns the logits after its last token: [V], valid until the next call.
    ///
    /// Fails where the prompt is empty, does not fit behind the present position, or holds an id that is none.
    Result<std::span<const float>> prefill(std::span<const int64_t> tokens);

    /// Appends one token and returns the logits after it, as `prefill` does.
    Result<std::span<const float>> decode(int64_t token) { return prefill({&token, 1}); }

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
    Result<std::span<const float>> step(Binding& binding, std::span<const int64_t> tokens);

    Steps* program_;
    KVCache cache_;
    std::vector<Binding> bindings_;
    std::vector<const void*> rows_;
    /// Room for a whole text, untouched until it is used.
    std::unique_ptr<float[]> hidden_;
    int64_t hidden_width_ = 0;
    int64_t hidden_rows_ = 0;
};

}  // namespace llama_runner
