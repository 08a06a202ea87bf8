#include "llama_runner/conversation.h"

#include <algorithm>

#include "llama_runner/program.h"
#include "support/no_throw.h"

namespace llama_runner {

Chat::Chat(std::unique_ptr<Session> session, const Tokenizer& tokenizer, GenerationOptions options, Rng& rng)
    : session_(std::move(session)), tokenizer_(&tokenizer), options_(std::move(options)), rng_(&rng) {}

Result<Chat> Chat::create(Program& program, GenerationOptions options, Rng& rng, std::optional<std::string> system) {
    return guarded([&]() -> Result<Chat> {
        const Tokenizer* tokenizer = program.tokenizer();
        const Metadata& metadata = program.metadata();
        if (tokenizer == nullptr) return Error{"the file has no tokenizer; export it again with --tokenizer"};
        if (metadata.chat_template.empty()) {
            return Error{"the file has no chat template; export it again with --chat-template"};
        }
        auto found = ChatTemplate::from_json(metadata.chat_template);
        if (!found) return found.error();
        options.stop_ids = metadata.stop_ids;
        if (const auto id = found->end_id(*tokenizer, metadata.bos_id)) options.stop_ids.push_back(*id);
        auto session = Session::create(program);
        if (!session) return session.error();
        Chat chat(std::make_unique<Session>(*std::move(session)), *tokenizer, std::move(options), rng);
        chat.template_ = *std::move(found);
        if (auto instructed = chat.instruct(std::move(system)); !instructed) return instructed.error();
        return chat;
    });
}

Result<void> Chat::instruct(std::optional<std::string> system) {
    if (system) {
        const std::vector<Message> probe = {{Role::kSystem, *system}, {Role::kUser, ""}};
        if (auto taken = template_.parts(probe); !taken) return taken.error();
    }
    system_ = std::move(system);
    return {};
}

void Chat::reset() {
    stop();
    messages_.clear();
    forgotten_ = 0;
}

Result<void> Chat::send(std::string_view message) {
    return guarded([&]() -> Result<void> {
        stop();
        const auto ids = fitting({Role::kUser, std::string(message)});
        if (!ids) return ids.error();
        auto generator = Generator::create(*session_, *ids, options_, *rng_, tokenizer_);
        if (!generator) return generator.error();
        generator_ = *std::move(generator);
        asked_ = message;
        return {};
    });
}

/// Removes as many of the oldest turns as necessary; returns the ids of the conversation and the message.
Result<std::vector<int64_t>> Chat::fitting(const Message& message) {
    const int64_t wanted = capacity() / kAnswerShare;
    const auto room = static_cast<size_t>(capacity() - std::min(wanted, options_.max_new_tokens.value_or(wanted)));
    std::vector<int64_t> ids;
    size_t start = 0;
    for (;; start += 2) {
        std::vector<Message> talk;
        if (system_) talk.push_back({Role::kSystem, *system_});
        talk.insert(talk.end(), messages_.begin() + static_cast<std::ptrdiff_t>(start), messages_.end());
        talk.push_back(message);
        auto encoded = template_.encode(talk, *tokenizer_);
        if (!encoded) return encoded.error();
        ids = *std::move(encoded);
        if (ids.size() <= room || start == messages_.size()) break;
    }
    if (ids.size() > static_cast<size_t>(capacity())) {
        return Error{"the message has " + std::to_string(ids.size()) +
                     " tokens with what the chat template adds, but the context only " + std::to_string(capacity()) +
                     "; shorten it or export with a larger --max-seq-len"};
    }
    forgotten_ = start / 2;
    messages_.erase(messages_.begin(), messages_.begin() + static_cast<std::ptrdiff_t>(start));
    return ids;
}

Result<const Step*> Chat::next() {
    if (!generator_) return nullptr;
    const auto step = generator_->next();
    if (!step || *step == nullptr) {
        stop();
    } else {
        said_ = said_.value_or("") + (*step)->text;
    }
    return step;
}

void Chat::stop() {
    if (said_) {
        messages_.push_back({Role::kUser, std::move(asked_)});
        messages_.push_back({Role::kAssistant, *std::move(said_)});
    }
    said_.reset();
    generator_.reset();
}

}  // namespace llama_runner
