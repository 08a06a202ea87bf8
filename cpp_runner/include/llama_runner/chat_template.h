#pragma once

#include <cstdint>
#include <ctime>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "llama_runner/result.h"
#include "llama_runner/tokenizer.h"

namespace llama_runner {

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

/// What stands between the contents of messages; see preproc/chat_template.py.
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

}  // namespace llama_runner
