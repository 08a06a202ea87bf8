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

/// One message of a conversation.
struct Message {
    Role role;
    std::string content;
};

/// The place of the system message in the text.
struct SystemPlace {
    /// Text before the system message; it replaces the text's opening or, if `is_late`, follows the opening of the last
    /// turn.
    std::string before;
    /// Text between the system message and the user's content.
    std::string behind;
    /// Whether the system message is in the last turn instead of the first.
    bool is_late = false;
    /// Whether white space around it is removed.
    bool strips = false;
    /// Whether white space is removed only at the end of the system message and the user's content together.
    bool joins = false;
    /// Whether an empty system message counts as none.
    bool skips_empty = false;
};

/// The text between the contents of messages; see preproc/chat_template.py.
struct ChatTemplate {
    /// Text before the first user's content if there is no system message.
    std::string opening;
    /// Text between a user's content and the answer to it.
    std::string answer;
    /// Text between an answer and the user's next content.
    std::string again;
    /// Text after the last user's content, after which the model answers.
    std::string ask;
    /// Whether white space around the contents of user and assistant is removed.
    bool strips_user = false;
    bool strips_assistant = false;
    /// The place of the system message; none if the template takes no system message.
    std::optional<SystemPlace> system;
    /// Text that ends a thought, such as </think>. Of an earlier answer, only the part after the last thought is kept.
    /// Empty if earlier answers are kept whole.
    std::string thought_end;
    /// Characters that are removed directly after it.
    std::string thought_strips;

    /// Reads a template from a file's metadata. Fails if it is no template.
    static Result<ChatTemplate> from_json(std::string_view text);

    /// Returns the whole text in parts. Only text from the template may have special tokens.
    ///
    /// `now` is the time of the conversation; the default is the current time.
    ///
    /// Fails if user and assistant do not take turns, or the template takes no system message and there is one.
    Result<std::vector<Part>> parts(std::span<const Message> messages,
                                    std::optional<std::time_t> now = std::nullopt) const;

    /// Returns the whole text; see `parts`.
    Result<std::string> text(std::span<const Message> messages, std::optional<std::time_t> now = std::nullopt) const;

    /// Returns the ids of the whole text. BOS is not added: the template contains it if it is necessary.
    ///
    /// Fails as `parts` does, and if a content contains a text of the template that the tokenizer can only encode as a
    /// special token.
    Result<std::vector<int64_t>> encode(std::span<const Message> messages, const Tokenizer& tokenizer) const;

    /// Returns the id that ends an answer: the first token after an answer that is not ordinary text, if any.
    std::optional<int64_t> end_id(const Tokenizer& tokenizer, std::optional<int64_t> bos_id) const;

  private:
    Result<void> check(std::span<const Message> messages) const;
    Result<std::vector<Part>> undated(std::span<const Message> messages) const;
    std::string_view answered(std::string_view content) const;
    void add_with_system(const std::string& before, const std::string& system_message, const std::string& content,
                         std::vector<Part>& parts) const;
};

}  // namespace llama_runner
