#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "llama_runner/chat_template.h"
#include "llama_runner/generation.h"
#include "llama_runner/result.h"
#include "llama_runner/session.h"
#include "llama_runner/tokenizer.h"

namespace llama_runner {

class Program;

/// A message leaves at least a fourth of the context to its answer, unless it is too long by itself.
inline constexpr int64_t kAnswerShare = 4;

/// A talk: each message is answered in the light of those before it.
class Chat {
  public:
    /// Starts a talk. `program` and `rng` must outlive it; the ids that end an answer come from program and template.
    ///
    /// Fails where the file carries no tokenizer or no template, or the template takes no system message.
    static Result<Chat> create(Program& program, GenerationOptions options, Rng& rng,
                               std::optional<std::string> system = std::nullopt);

    /// What was said, without the system message: of user and assistant in turns.
    const std::vector<Message>& messages() const { return messages_; }

    const std::optional<std::string>& system() const { return system_; }

    /// How many of the oldest turns were forgotten to make room for the latest message.
    size_t forgotten() const { return forgotten_; }

    /// How many tokens the talk can have.
    int64_t capacity() const { return session_->capacity(); }

    /// Whether no more token fits, so that an answer had to end.
    bool is_full() const { return session_->position() == session_->capacity(); }

    /// Sets the system message for what follows, or takes it away. Fails where the template takes none.
    Result<void> instruct(std::optional<std::string> system);

    /// Starts anew, with the same system message.
    void reset();

    /// Takes a message, which `next` answers. Where the context has no room for all, the oldest turns are forgotten;
    /// see `forgotten`.
    ///
    /// Fails where the message does not fit even by itself; the talk is then as it was.
    Result<void> send(std::string_view message);

    /// The next step of the answer, or null after the last. It is overwritten by the next call.
    Result<const Step*> next();

    /// Ends the answer: what was said until now is all of it.
    void stop();

  private:
    Chat(std::unique_ptr<Session> session, const Tokenizer& tokenizer, GenerationOptions options, Rng& rng);

    Result<std::vector<int64_t>> fitting(const Message& message);

    std::unique_ptr<Session> session_;
    const Tokenizer* tokenizer_;
    GenerationOptions options_;
    Rng* rng_;
    ChatTemplate template_;
    std::optional<std::string> system_;
    std::vector<Message> messages_;
    size_t forgotten_ = 0;
    /// The answer in the making, and what it answers; none between turns.
    std::optional<Generator> generator_;
    std::string asked_;
    std::optional<std::string> said_;
};

}  // namespace llama_runner
