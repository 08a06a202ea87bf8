#pragma once

#include <cstdint>
#include <ctime>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "llama_runner/generate.h"
#include "llama_runner/result.h"
#include "llama_runner/session.h"
#include "llama_runner/tokenizer.h"

namespace llama_runner {

class Program;

enum class Role { kSystem, kUser, kAssistant };

/// What someone says.
struct Message {
    Role role;
    std::string content;
};

/// How a system message is given.
struct SystemPlace {
    /// What stands before it: in place of the text's opening, or behind what opens the last turn where it is given
    /// there.
    std::string before;
    /// What stands between it and the user's content.
    std::string behind;
    /// Whether it is given in the last turn, in place of the first.
    bool is_late = false;
    /// Whether white space around it falls away.
    bool strips = false;
    /// Whether it and the user's content are one, and white space falls away only behind them.
    bool joins = false;
    /// Whether an empty one counts as none.
    bool skips_empty = false;
};

/// What stands between the contents of messages; see preproc/chat.py.
struct ChatTemplate {
    /// What stands before the first user's content where no system message is given.
    std::string opening;
    /// What stands between a user's content and the answer to it.
    std::string answer;
    /// What stands between an answer and the user's next content.
    std::string again;
    /// What stands behind the last user's content, and asks for an answer.
    std::string ask;
    /// Whether white space around such contents falls away.
    bool strips_user = false;
    bool strips_assistant = false;
    /// How a system message is given; none refuses one.
    std::optional<SystemPlace> system;
    /// What ends a thought, such as </think>: of an answer that is given again, only what stands behind the last one
    /// is. Empty where answers are given again as they were.
    std::string thought_end;
    /// The characters that fall away right behind it.
    std::string thought_strips;

    /// Reads what a file carries. Fails where it is no template.
    static Result<ChatTemplate> from_json(std::string_view text);

    /// The whole text. Special tokens are only in what comes from the template.
    ///
    /// `now` is the time of the conversation; without it, the clock's.
    ///
    /// Fails where the messages do not take turns, or there is a system message where none can be given.
    Result<std::vector<Part>> parts(std::span<const Message> messages,
                                    std::optional<std::time_t> now = std::nullopt) const;

    /// The whole text; see `parts`.
    Result<std::string> text(std::span<const Message> messages, std::optional<std::time_t> now = std::nullopt) const;

    /// The ids of the whole text, which no BOS is added to: the template says what opens it.
    ///
    /// Fails as `parts` does, and where a content holds what the template uses and the tokenizer knows no other way
    /// than to take it for a token.
    Result<std::vector<int64_t>> encode(std::span<const Message> messages, const Tokenizer& tokenizer) const;

    /// The id that ends an answer: the first token behind it that is no ordinary text.
    std::optional<int64_t> end_id(const Tokenizer& tokenizer, std::optional<int64_t> bos_id) const;

  private:
    Result<void> check(std::span<const Message> messages) const;
    Result<std::vector<Part>> undated(std::span<const Message> messages) const;
    std::string_view answered(std::string_view content) const;
    void add_with_system(const std::string& before, const std::string& system_message, const std::string& content,
                         std::vector<Part>& parts) const;
};

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
