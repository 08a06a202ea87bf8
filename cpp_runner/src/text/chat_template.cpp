#include "llama_runner/chat_template.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <ctime>
#include <nlohmann/json.hpp>

#include "support/json.h"
#include "support/no_throw.h"
#include "tokenizer/special_tokens.h"
#include "tokenizer/whitespace.h"

namespace llama_runner {

namespace {

using nlohmann::json;

Error unreadable(const std::string& detail) {
    return {"the file's chat template cannot be read (" + detail + "); export it again"};
}

std::string_view name_of(Role role) {
    return role == Role::kSystem ? "system" : role == Role::kUser ? "user" : "assistant";
}

/// Returns whether a token's text has an ASCII letter or digit, rather than only spaces, line ends or punctuation.
bool is_marker(std::string_view text) {
    return std::ranges::any_of(text, [](unsigned char c) { return c < 0x80 && std::isalnum(c) != 0; });
}

Part content_part(std::string_view text, bool strips) { return {std::string(strips ? stripped(text) : text), false}; }

/// The marks around a strftime format, U+E000 and U+E001; marks and format are replaced by the conversation's time.
constexpr std::string_view kDateOpens = "\xEE\x80\x80";
constexpr std::string_view kDateCloses = "\xEE\x80\x81";

/// Returns the text with its formats replaced by the time.
std::string dated(const std::string& text, const std::tm& now) {
    std::string found;
    size_t done = 0;
    for (;;) {
        const size_t opens = text.find(kDateOpens, done);
        const size_t closes = opens == std::string::npos ? opens : text.find(kDateCloses, opens);
        if (closes == std::string::npos) return found + text.substr(done);
        const size_t start = opens + kDateOpens.size();
        std::array<char, 256> time{};
        const size_t length = std::strftime(time.data(), time.size(), text.substr(start, closes - start).c_str(), &now);
        found += text.substr(done, opens - done) + std::string(time.data(), length);
        done = closes + kDateCloses.size();
    }
}

}  // namespace

Result<ChatTemplate> ChatTemplate::from_json(std::string_view text) {
    const json whole = json::parse(text, nullptr, false);
    const json& file = member(whole, "data");
    if (file.is_null() && member(whole, "jinja").is_object()) {
        return Error{
            "the file's chat template needs Jinja, which this runner lacks; export again with --chat-template "
            "NAME, or use `llama-pte chat`"};
    }
    const auto has_texts = [](const json& object, std::initializer_list<const char*> keys) {
        return std::ranges::all_of(keys, [&](const char* key) { return member(object, key).is_string(); });
    };
    if (!has_texts(file, {"opening", "answer", "again", "ask"})) return unreadable("a text is missing");
    ChatTemplate found{.opening = text_member(file, "opening"),
                       .answer = text_member(file, "answer"),
                       .again = text_member(file, "again"),
                       .ask = text_member(file, "ask"),
                       .strips_user = flag_member(file, "strips_user", false),
                       .strips_assistant = flag_member(file, "strips_assistant", false),
                       .system = std::nullopt,
                       .thought_end = text_member(file, "thought_end"),
                       .thought_strips = text_member(file, "thought_strips")};
    if (const json& system = member(file, "system"); !system.is_null()) {
        if (!has_texts(system, {"before", "behind"})) return unreadable("a text around the system message is missing");
        found.system = SystemPlace{.before = text_member(system, "before"),
                                   .behind = text_member(system, "behind"),
                                   .is_late = flag_member(system, "is_late", false),
                                   .strips = flag_member(system, "strips", false),
                                   .joins = flag_member(system, "joins", false),
                                   .skips_empty = flag_member(system, "skips_empty", false)};
    }
    return found;
}

Result<void> ChatTemplate::check(std::span<const Message> messages) const {
    const bool has_system = !messages.empty() && messages[0].role == Role::kSystem;
    const auto turns = messages.subspan(has_system);
    bool in_turns = turns.size() % 2 == 1;
    for (size_t i = 0; i < turns.size(); ++i) {
        in_turns = in_turns && turns[i].role == (i % 2 == 0 ? Role::kUser : Role::kAssistant);
    }
    if (!in_turns) {
        std::string roles;
        for (const Message& message : messages)
            roles += (roles.empty() ? "" : ", ") + std::string(name_of(message.role));
        return Error{"the roles of the messages are " + (roles.empty() ? "none" : roles) +
                     "; give user and assistant in turns, the user first and last, and before them at most one of "
                     "system"};
    }
    if (has_system && !system) return Error{"the chat template supports no system message; leave it out"};
    return {};
}

Result<std::vector<Part>> ChatTemplate::parts(std::span<const Message> messages, std::optional<std::time_t> now) const {
    auto found = undated(messages);
    if (!found) return found;
    const std::time_t time = now.value_or(std::time(nullptr));
    std::tm local{};
    localtime_r(&time, &local);
    for (Part& part : *found) {
        if (part.parse_special) part.text = dated(part.text, local);
    }
    return found;
}

/// Returns the part of an earlier answer that the template keeps: the text after its last thought.
std::string_view ChatTemplate::answered(std::string_view content) const {
    const size_t end = thought_end.empty() ? std::string_view::npos : content.rfind(thought_end);
    if (end == std::string_view::npos) return content;
    content.remove_prefix(end + thought_end.size());
    content.remove_prefix(std::min(content.find_first_not_of(thought_strips), content.size()));
    return content;
}

/// Returns the whole text in parts, with dates still as formats.
Result<std::vector<Part>> ChatTemplate::undated(std::span<const Message> messages) const {
    if (auto checked = check(messages); !checked) return checked.error();
    const Message* given = messages[0].role == Role::kSystem ? &messages[0] : nullptr;
    const auto turns = messages.subspan(given != nullptr);
    if (given != nullptr && system->skips_empty && given->content.empty()) given = nullptr;
    std::vector<Part> found;
    for (size_t i = 0; i < turns.size(); ++i) {
        const std::string& content = turns[i].content;
        if (i % 2 == 1) {
            found.push_back({answer, true});
            found.push_back(content_part(answered(content), strips_assistant));
            continue;
        }
        const std::string& before = i == 0 ? opening : again;
        if (given != nullptr && i == (system->is_late ? turns.size() - 1 : 0)) {
            add_with_system(before, given->content, content, found);
        } else {
            found.push_back({before, true});
            found.push_back(content_part(content, strips_user));
        }
    }
    found.push_back({ask, true});
    return found;
}

void ChatTemplate::add_with_system(const std::string& before, const std::string& system_message,
                                   const std::string& content, std::vector<Part>& parts) const {
    if (system->is_late) parts.push_back({before, true});
    parts.push_back({system->before, true});
    parts.push_back(content_part(system_message, system->strips));
    parts.push_back({system->behind, true});
    parts.push_back(content_part(content, strips_user && !system->joins));
    if (!system->joins) return;
    for (size_t i = parts.size() - 1; i >= parts.size() - 3; --i) {
        parts[i].text = std::string(stripped_right(parts[i].text));
        if (!parts[i].text.empty()) break;
    }
}

Result<std::string> ChatTemplate::text(std::span<const Message> messages, std::optional<std::time_t> now) const {
    const auto found = parts(messages, now);
    if (!found) return found.error();
    std::string whole;
    for (const Part& part : *found) whole += part.text;
    return whole;
}

Result<std::vector<int64_t>> ChatTemplate::encode(std::span<const Message> messages, const Tokenizer& tokenizer) const {
    const auto found = parts(messages);
    if (!found) return found.error();
    std::string own;
    for (const Part& part : *found) own += part.parse_special ? part.text : "";
    for (const auto& [marker, id] : tokenizer.fixed()) {
        if (!is_marker(marker) || own.find(marker) == std::string::npos) continue;
        for (const Part& part : *found) {
            if (!part.parse_special && part.text.find(marker) != std::string::npos) {
                return Error{"a message holds " + marker + ", which separates messages; leave it out"};
            }
        }
    }
    return tokenizer.encode_parts(*found);
}

std::optional<int64_t> ChatTemplate::end_id(const Tokenizer& tokenizer, std::optional<int64_t> bos_id) const {
    SpecialText texts;
    std::vector<int64_t> ids;
    const auto add = [&](const std::string& marker, int64_t id) {
        texts.add(marker);
        ids.push_back(id);
    };
    for (const auto& [marker, id] : tokenizer.specials()) add(marker, id);
    for (const auto& [marker, id] : tokenizer.fixed()) {
        if (is_marker(marker)) add(marker, id);
    }
    const size_t index = texts.find(again, 0).index;
    if (index == texts.size() || ids[index] == bos_id) return std::nullopt;
    return ids[index];
}

}  // namespace llama_runner
