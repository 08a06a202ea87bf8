#include "llama_runner/generation.h"

#include <algorithm>

#include "llama_runner/program.h"
#include "support/no_throw.h"

namespace llama_runner {

namespace {

/// Bytes reserved for the text of one step, so that steps need not allocate.
constexpr size_t kTextRoom = 1024;

Result<void> check_ids(const SamplingOptions& options, int64_t vocab_size) {
    for (const auto& [token, bias] : options.logit_bias) {
        if (token >= vocab_size) {
            return Error{"logit-bias " + std::to_string(token) + " is invalid; give ids from 0 to " +
                         std::to_string(vocab_size - 1)};
        }
    }
    return {};
}

}  // namespace

std::optional<std::string_view> name_of(FinishReason reason) {
    if (reason == FinishReason::kNone) return std::nullopt;
    return reason == FinishReason::kStop ? "stop" : "length";
}

Result<void> GenerationOptions::check() const {
    if (auto checked = sampling.check(); !checked) return checked;
    if (max_new_tokens && *max_new_tokens < 1) {
        return Error{"--max-new-tokens " + std::to_string(*max_new_tokens) + " is invalid; give 1 or more"};
    }
    if (std::ranges::find(stop_strings, "") != stop_strings.end()) {
        return Error{"--stop '' is invalid; give at least one character"};
    }
    if (logprobs && *logprobs < 0) {
        return Error{"--logprobs " + std::to_string(*logprobs) + " is invalid; give 0 or more"};
    }
    return {};
}

StopFilter::StopFilter(std::vector<std::string> stop_strings, size_t room) : stops_(std::move(stop_strings)) {
    for (const std::string& stop : stops_) longest_ = std::max(longest_, stop.size());
    held_.reserve(longest_ + room);
}

void StopFilter::add(std::string_view text, std::string& given) {
    if (stopped_) return;
    held_ += text;
    size_t begun = held_.size() < longest_ ? 0 : held_.size() + 1 - longest_;
    while (begun < held_.size() && !may_begin(begun)) ++begun;
    const size_t first = found();
    stopped_ = first <= begun;
    const size_t end = std::min(first, begun);
    given.append(held_, 0, end);
    held_.erase(0, stopped_ ? std::string::npos : end);
}

void StopFilter::finish(std::string& given) {
    const size_t first = found();
    stopped_ = stopped_ || first != std::string::npos;
    given.append(held_, 0, first);
    held_.clear();
}

/// Returns the index of the earliest complete stop string in the held text, or npos.
size_t StopFilter::found() const {
    size_t first = std::string::npos;
    for (const std::string& stop : stops_) first = std::min(first, held_.find(stop));
    return first;
}

/// Returns whether the held text from `at` on is the beginning of a stop string.
bool StopFilter::may_begin(size_t at) const {
    const std::string_view rest = std::string_view(held_).substr(at);
    return std::ranges::any_of(stops_, [&](const std::string& stop) { return stop.starts_with(rest); });
}

Generator::Generator(Session& session, std::span<const int64_t> prompt, GenerationOptions options, Rng& rng)
    : session_(&session),
      prompt_(prompt.begin(), prompt.end()),
      options_(std::move(options)),
      rng_(&rng),
      sampler_(session.vocab_size()),
      stops_(options_.stop_strings, kTextRoom) {
    tokens_.reserve(prompt.size() + static_cast<size_t>(session.capacity()));
    tokens_.assign(prompt.begin(), prompt.end());
    proposed_.reserve(static_cast<size_t>(session.max_proposed()));
    step_.text.reserve(kTextRoom);
    said_.reserve(kTextRoom);
    if (options_.logprobs) {
        step_.top_logprobs.reserve(static_cast<size_t>(std::min(*options_.logprobs, session.vocab_size())));
    }
}

Result<Generator> Generator::create(Session& session, std::span<const int64_t> prompt, GenerationOptions options,
                                    Rng& rng, const Tokenizer* tokenizer) {
    if (auto checked = options.check(); !checked) return checked.error();
    if (!options.stop_strings.empty() && tokenizer == nullptr) {
        return Error{"--stop '" + options.stop_strings.front() +
                     "' needs a tokenizer, but the file has none; leave it out"};
    }
    if (auto checked = check_ids(options.sampling, session.vocab_size()); !checked) return checked.error();
    return guarded([&]() -> Result<Generator> {
        Generator generator(session, prompt, std::move(options), rng);
        if (tokenizer != nullptr) {
            generator.decoder_.emplace(*tokenizer);
            std::string said;  // the prompt may end inside a character, which the text then completes
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
    if (logits_.empty()) {
        if (auto ran = run(); !ran) return ran.error();
    }
    const auto logits = logits_.first(static_cast<size_t>(session_->vocab_size()));
    logits_ = logits_.subspan(logits.size());
    step_.token = sampler_.sample(logits, options_.sampling, *rng_, tokens_);
    if (options_.logprobs) {
        step_.logprob = sampler_.logprobs(logits, step_.token, *options_.logprobs, step_.top_logprobs);
    }
    tokens_.push_back(step_.token);
    ++row_;
    ++count_;
    const int64_t position = session_->position() + (proposed_.empty() ? 0 : row_);
    const bool full = position == session_->capacity() && !options_.slides_when_full;
    const bool stop =
        std::find(options_.stop_ids.begin(), options_.stop_ids.end(), step_.token) != options_.stop_ids.end();
    const bool end = stop || count_ == options_.max_new_tokens || full;
    tell(stop, end);
    if (end) step_.finish_reason = FinishReason::kLimit;
    if (stop || stops_.stopped()) step_.finish_reason = FinishReason::kStop;
    if (auto settled = settle(step_.finish_reason != FinishReason::kNone); !settled) return settled.error();
    return &step_;
}

/// Computes new logits: after the prompt, or after the latest token and the tokens guessed after it.
Result<void> Generator::run() {
    row_ = 0;
    proposed_.clear();
    if (count_ > 0 && session_->position() == session_->capacity()) {
        if (auto slid = session_->slide(); !slid) return slid.error();
    }
    if (count_ > 0 && options_.lookup) {
        const int64_t room = std::min(session_->max_proposed(), session_->capacity() - session_->position()) - 1;
        const auto guess = options_.lookup->guess(tokens_, room);
        if (!guess.empty()) {
            proposed_.push_back(step_.token);
            proposed_.insert(proposed_.end(), guess.begin(), guess.end());
        }
    }
    const auto logits = count_ == 0         ? session_->restart(prompt_)
                        : proposed_.empty() ? session_->decode(step_.token)
                                            : session_->propose(proposed_);
    if (!logits) return logits.error();
    logits_ = *logits;
    return {};
}

/// Appends the correct tokens of a guess once it turned out wrong or has ended.
Result<void> Generator::settle(bool end) {
    if (proposed_.empty()) return {};
    const bool right = row_ < std::ssize(proposed_) && proposed_[static_cast<size_t>(row_)] == step_.token;
    if (right && !end) return {};
    logits_ = {};
    const auto accepted = session_->accept(row_);
    proposed_.clear();
    return accepted;
}

/// Sets the text of the step.
void Generator::tell(bool stop, bool end) {
    step_.text.clear();
    if (!decoder_) return;
    said_.clear();
    if (!stop) decoder_->add(step_.token, said_);
    if (end) decoder_->finish(said_);
    stops_.add(said_, step_.text);
    if (end) stops_.finish(step_.text);
}

Result<std::vector<int64_t>> prompt_ids(const Program& program, std::string_view text, bool parse_special) {
    if (program.tokenizer() == nullptr) {
        return Error{"the file has no tokenizer; give --prompt-ids, or export again with --tokenizer"};
    }
    return guarded([&] {
        auto ids = program.tokenizer()->encode(text, parse_special);
        if (ids && program.metadata().bos_id) ids->insert(ids->begin(), *program.metadata().bos_id);
        return ids;
    });
}

}  // namespace llama_runner
