#include "llama_runner/generate.h"

#include <algorithm>

#include "guard.h"
#include "llama_runner/program.h"

namespace llama_runner {

namespace {

/// Room for the text of one step, so that steps need no more memory.
constexpr size_t kTextRoom = 1024;

}  // namespace

std::optional<std::string_view> name_of(FinishReason reason) {
    if (reason == FinishReason::kNone) return std::nullopt;
    return reason == FinishReason::kStopToken ? "stop" : "length";
}

Result<void> GenerationOptions::check() const {
    if (auto checked = sampling.check(); !checked) return checked;
    if (max_new_tokens && *max_new_tokens < 1) {
        return Error{"--max-new-tokens " + std::to_string(*max_new_tokens) + " is impossible; give 1 or more"};
    }
    return {};
}

Generator::Generator(Session& session, std::span<const int64_t> prompt, GenerationOptions options, Rng& rng)
    : session_(&session),
      prompt_(prompt.begin(), prompt.end()),
      options_(std::move(options)),
      rng_(&rng),
      sampler_(session.vocab_size()) {
    step_.text.reserve(kTextRoom);
}

Result<Generator> Generator::create(Session& session, std::span<const int64_t> prompt, GenerationOptions options,
                                    Rng& rng, const Tokenizer* tokenizer) {
    if (auto checked = options.check(); !checked) return checked.error();
    return guarded([&]() -> Result<Generator> {
        Generator generator(session, prompt, std::move(options), rng);
        if (tokenizer != nullptr) {
            generator.decoder_.emplace(*tokenizer);
            std::string said;  // the text goes on where the prompt ends, if need be inside a character
            for (const int64_t token : prompt) generator.decoder_->add(token, said);
        }
        return generator;
    });
}

Result<const Step*> Generator::next() {
    return guarded([this] { return advance(); });
}

Result<const Step*> Generator::advance() {
    if (step_.finish_reason != FinishReason::kNone) return nullptr;
    const auto logits = count_ == 0 ? session_->prefill(prompt_) : session_->decode(step_.token);
    if (!logits) return logits.error();
    step_.token = sampler_.sample(*logits, options_.sampling, *rng_);
    step_.text.clear();
    ++count_;
    const bool stop =
        std::find(options_.stop_ids.begin(), options_.stop_ids.end(), step_.token) != options_.stop_ids.end();
    const bool end = stop || count_ == options_.max_new_tokens || session_->position() == session_->capacity();
    if (decoder_ && !stop) decoder_->add(step_.token, step_.text);
    if (decoder_ && end) decoder_->finish(step_.text);
    if (end) step_.finish_reason = stop ? FinishReason::kStopToken : FinishReason::kLimit;
    return &step_;
}

Result<std::vector<int64_t>> prompt_ids(const Program& program, std::string_view text, bool parse_special) {
    if (program.tokenizer() == nullptr) {
        return Error{"the file carries no tokenizer; give --prompt-ids, or export again with --tokenizer"};
    }
    return guarded([&] {
        auto ids = program.tokenizer()->encode(text, parse_special);
        if (ids && program.metadata().bos_id) ids->insert(ids->begin(), *program.metadata().bos_id);
        return ids;
    });
}

}  // namespace llama_runner
