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

/// Divisor of the context: capacity / kAnswerShare tokens, or max_new_tokens if that is less, are reserved for an
/// answer, unless the message alone is too long for that.
inline constexpr int64_t kAnswerShare = 4;

/// A conversation: each message is answered with the messages before it as context.
class Chat {
  public:
    /// Starts an empty conversation. `program` and `rng` must outlive it; the ids that end an answer come from program
    /// and template.
    ///
    /// Fails if the file has no tokenizer or no template, or if there is a system message and the template takes none.
    static Result<Chat> create(Program& program, GenerationOptions options, Rng& rng,
                               std::optional<std::string> system = std::nullopt);

    /// The messages of user and assistant in turns, without the system message.
    const std::vector<Message>& messages() const { return messages_; }

    const std::optional<std::string>& system() const { return system_; }

    /// Number of the oldest turns that were removed to make room for the latest message.
    size_t forgotten() const { return forgotten_; }

    /// Maximum number of tokens in the conversation.
    int64_t capacity() const { return session_->capacity(); }

    /// Whether the context is full, which ends an answer.
    bool is_full() const { return session_->position() == session_->capacity(); }

    /// Sets the system message for the following answers; none removes it. Fails if the template takes none.
    Result<void> instruct(std::optional<std::string> system);

    /// Starts a new conversation with the same system message.
    void reset();

    /// Takes a message, which `next` answers. If the context has no room for all messages, the oldest turns are
    /// removed; see `forgotten`.
    ///
    /// Fails if the message does not fit even alone; the conversation is then unchanged.
    Result<void> send(std::string_view message);

    /// Returns the next step of the answer, or null after the last. The next call overwrites it.
    Result<const Step*> next();

    /// Ends the answer; what was generated so far becomes the assistant's message.
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
    /// The generator of the current answer, the message that it answers, and its text so far; none between turns.
    std::optional<Generator> generator_;
    std::string asked_;
    std::optional<std::string> said_;
};

}  // namespace llama_runner
