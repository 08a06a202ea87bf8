// Tests against the golden files that Python is tested against, too (tests/integration/test_golden.py).

#include "engine/memory_budget.h"
#include "engine/session_file.h"
#include "llama_runner/conversation.h"
#include "llama_runner/generation.h"
#include "llama_runner/program.h"
#include "support.h"
#include "tokenizer/kinds.h"

namespace llama_runner {
namespace {

using nlohmann::json;

SamplingOptions sampling_of(const json& entry) {
    const SamplingOptions usual;
    SamplingOptions options{.temperature = entry["temperature"],
                            .top_k = entry["top_k"],
                            .top_p = entry["top_p"],
                            .min_p = entry.value("min_p", usual.min_p),
                            .repetition_penalty = entry.value("repetition_penalty", usual.repetition_penalty),
                            .presence_penalty = entry.value("presence_penalty", usual.presence_penalty),
                            .frequency_penalty = entry.value("frequency_penalty", usual.frequency_penalty),
                            .penalty_window = entry.value("penalty_window", usual.penalty_window)};
    const json biases = entry.value("logit_bias", json::object());
    for (const auto& [id, bias] : biases.items()) options.logit_bias[std::stoll(id)] = bias;
    return options;
}

std::vector<float> logits_of(const json& golden, const json& entry) {
    return golden["logits"][entry["logits"].get<size_t>()].get<std::vector<float>>();
}

json to_json(const SamplingOptions& options) {
    json biases = json::object();
    for (const auto& [id, bias] : options.logit_bias) biases[std::to_string(id)] = bias;
    return {{"temperature", options.temperature},
            {"top_k", options.top_k},
            {"top_p", options.top_p},
            {"min_p", options.min_p},
            {"repetition_penalty", options.repetition_penalty},
            {"presence_penalty", options.presence_penalty},
            {"frequency_penalty", options.frequency_penalty},
            {"penalty_window", options.penalty_window},
            {"logit_bias", biases}};
}

TEST(Golden, Constants) {
    const json ours = {{"format_version", kFormatVersion},
                       {"session_version", kSnapshotVersion},
                       {"stream", kStream},
                       {"small", kSmall},
                       {"margin", kMargin},
                       {"sinks", kSinks},
                       {"answer_share", kAnswerShare},
                       {"hidden", kHidden},
                       {"sampling", to_json({})},
                       {"llama3_pattern", kLlama3Pattern},
                       {"llama3_specials", llama3_specials()}};
    EXPECT_EQ(ours, testing::golden("constants.json"));
}

constexpr double kRounding = 1e-12;

TEST(Golden, Coins) {
    const json golden = testing::golden("sampler.json");
    for (const json& entry : golden["coins"]) {
        Rng rng(entry["seed"].get<uint64_t>());
        for (const json& value : entry["values"]) EXPECT_EQ(rng.coin(), value.get<double>());
    }
}

TEST(Golden, Sampler) {
    const json golden = testing::golden("sampler.json");
    ASSERT_FALSE(golden["cases"].empty());
    for (const json& entry : golden["cases"]) {
        const auto logits = logits_of(golden, entry);
        Sampler sampler(static_cast<int64_t>(logits.size()));
        Rng rng(entry["seed"].get<uint64_t>());
        auto text = entry.value("recent", std::vector<int64_t>());
        const auto start = std::ssize(text);
        for (size_t i = 0; i < entry["tokens"].size(); ++i) {
            text.push_back(sampler.sample(logits, sampling_of(entry), rng, text));
        }
        EXPECT_EQ(std::vector(text.begin() + start, text.end()), entry["tokens"].get<std::vector<int64_t>>()) << entry;
    }
}

TEST(Golden, LogProbs) {
    const json golden = testing::golden("sampler.json");
    ASSERT_FALSE(golden["logprobs"].empty());
    for (const json& entry : golden["logprobs"]) {
        const auto logits = logits_of(golden, entry);
        Sampler sampler(static_cast<int64_t>(logits.size()));
        std::vector<LogProb> top;
        const double found = sampler.logprobs(logits, entry["token"], entry["k"], top);
        const double expected = entry["logprob"];
        EXPECT_NEAR(found, expected, kRounding * std::max(1.0, std::abs(expected)));
        const json& likeliest = entry["top_logprobs"];
        ASSERT_EQ(top.size(), likeliest.size());
        for (size_t i = 0; i < top.size(); ++i) {
            EXPECT_EQ(top[i].token, likeliest[i][0].get<int64_t>());
            const double logprob = likeliest[i][1];
            EXPECT_NEAR(top[i].logprob, logprob, kRounding * std::max(1.0, std::abs(logprob)));
        }
    }
}

/// A substitute for a program whose logits prescribe the given tokens, whatever the text is.
class Prescribed final : public Steps {
  public:
    explicit Prescribed(const json& entry) : tokens_(entry["tokens"].get<std::vector<int64_t>>()) {
        const auto capacity = entry["capacity"].get<int64_t>();
        metadata_.max_seq_len = capacity;
        metadata_.vocab_size = entry["vocab_size"];
        metadata_.methods = {{"forward",
                              capacity,
                              capacity,
                              1,
                              {{"tokens", {1, capacity}, Dtype::kInt64}, {"select", {1, 1, capacity}, Dtype::kFloat32}},
                              {{"logits", {1, 1, metadata_.vocab_size}, Dtype::kFloat32}}}};
    }

    const Metadata& metadata() const override { return metadata_; }

    Result<std::span<const void* const>> step(size_t, StepSize, std::span<const void* const>) override {
        if (next_ == tokens_.size()) return Error{"it has said all"};
        logits_.assign(static_cast<size_t>(metadata_.vocab_size), 0);
        logits_[static_cast<size_t>(tokens_[next_++])] = 1;
        output_ = logits_.data();
        return std::span<const void* const>(&output_, 1);
    }

  private:
    Metadata metadata_{};
    std::vector<int64_t> tokens_;
    size_t next_ = 0;
    std::vector<float> logits_;
    const void* output_ = nullptr;
};

json steps_of(const json& entry, const Tokenizer& tokenizer) {
    Prescribed program(entry);
    auto session = Session::create(program);
    if (!session) return session.error().message;
    GenerationOptions options{.sampling = {},
                              .max_new_tokens = std::nullopt,
                              .stop_ids = entry["stop_ids"],
                              .stop_strings = entry["stop_strings"]};
    if (!entry["max_new_tokens"].is_null()) options.max_new_tokens = entry["max_new_tokens"].get<int64_t>();
    Rng rng(0);
    auto generator = Generator::create(*session, entry["prompt"].get<std::vector<int64_t>>(), options, rng, &tokenizer);
    if (!generator) return generator.error().message;
    json steps = json::array();
    for (;;) {
        const auto step = generator->next();
        if (!step) return step.error().message;
        if (*step == nullptr) return steps;
        const auto reason = name_of((*step)->finish_reason);
        steps.push_back({(*step)->token, (*step)->text, reason ? json(*reason) : json()});
    }
}

TEST(Golden, Finish) {
    const auto tokenizer = from_bytes(testing::read_file(LLAMA_RUNNER_TEST_TOKENIZER));
    ASSERT_TRUE(tokenizer) << tokenizer.error().message;
    const json golden = testing::golden("finish.json");
    ASSERT_FALSE(golden["cases"].empty());
    for (const json& entry : golden["cases"]) EXPECT_EQ(steps_of(entry, **tokenizer), entry["steps"]) << entry["name"];
}

TEST(Golden, StopFilter) {
    const json golden = testing::golden("finish.json");
    ASSERT_FALSE(golden["filters"].empty());
    for (const json& entry : golden["filters"]) {
        StopFilter filter(entry["stop_strings"].get<std::vector<std::string>>());
        json given = json::array();
        for (const json& piece : entry["pieces"]) {
            std::string text;
            filter.add(piece.get<std::string>(), text);
            given.push_back(text);
        }
        std::string rest;
        filter.finish(rest);
        given.push_back(rest);
        EXPECT_EQ(given, entry["given"]) << entry;
        EXPECT_EQ(filter.stopped(), entry["stopped"].get<bool>()) << entry;
    }
}

TEST(Generator, RefusesOptionsThatNeedWhatIsNotThere) {
    const json entry = testing::golden("finish.json")["cases"][0];
    Prescribed program(entry);
    auto session = Session::create(program);
    ASSERT_TRUE(session);
    const std::vector<int64_t> prompt = {1};
    Rng rng(0);
    const auto refused = [&](const GenerationOptions& options) {
        return Generator::create(*session, prompt, options, rng, nullptr).error().message;
    };
    EXPECT_EQ(refused({.sampling = {}, .max_new_tokens = {}, .stop_ids = {}, .stop_strings = {"x"}}),
              "--stop 'x' needs a tokenizer, but the file has none; leave it out");
    EXPECT_EQ(refused({.sampling = {}, .max_new_tokens = {}, .stop_ids = {}, .stop_strings = {"x", ""}}),
              "--stop '' is invalid; give at least one character");
    EXPECT_EQ(refused({.sampling = {}, .max_new_tokens = {}, .stop_ids = {}, .logprobs = -1}),
              "--logprobs -1 is invalid; give 0 or more");
    EXPECT_EQ(refused({.sampling = {.logit_bias = {{2048, 1.0}}}, .max_new_tokens = {}, .stop_ids = {}}),
              "logit-bias 2048 is invalid; give ids from 0 to 2047");
}

TEST(Sampler, RefusesImpossibleOptions) {
    EXPECT_EQ((SamplingOptions{-1.0, 0, 1.0}.check().error().message), "temperature -1.0 is invalid; give 0 or more");
    EXPECT_EQ((SamplingOptions{0.0, -3, 1.0}.check().error().message), "top-k -3 is invalid; give 0 (all) or more");
    EXPECT_EQ((SamplingOptions{0.0, 0, 1.5}.check().error().message),
              "top-p 1.5 is invalid; give more than 0, up to 1");
    EXPECT_EQ((SamplingOptions{.min_p = 1.5}.check().error().message), "min-p 1.5 is invalid; give 0 (all) to 1");
    EXPECT_EQ((SamplingOptions{.repetition_penalty = 0}.check().error().message),
              "repetition-penalty 0.0 is invalid; give more than 0, where 1 is none");
    EXPECT_EQ((SamplingOptions{.presence_penalty = NAN}.check().error().message),
              "presence-penalty nan is invalid; give a finite number, where 0 is none");
    EXPECT_EQ((SamplingOptions{.frequency_penalty = -INFINITY}.check().error().message),
              "frequency-penalty -inf is invalid; give a finite number, where 0 is none");
    EXPECT_EQ((SamplingOptions{.penalty_window = 0}.check().error().message),
              "penalty-window 0 is invalid; give 1 or more");
    EXPECT_EQ((SamplingOptions{.logit_bias = {{-1, 2.0}}}.check().error().message),
              "logit-bias -1=2.0 is invalid; give an id of 0 or more and a finite number");
    EXPECT_FALSE((SamplingOptions{.repetition_penalty = INFINITY}.check()));
    EXPECT_FALSE((SamplingOptions{.logit_bias = {{1, NAN}}}.check()));
    EXPECT_FALSE((SamplingOptions{NAN, 0, 1.0}.check()));
    EXPECT_FALSE((SamplingOptions{0.0, 0, 0.0}.check()));
    EXPECT_TRUE((SamplingOptions{0.0, 0, 1.0}.check()));
}

TEST(Sampler, SurvivesLogitsThatAreNoNumbers) {
    const std::vector<float> logits = {NAN, 1.0F, INFINITY, NAN, -INFINITY};
    Sampler sampler(5);
    Rng rng(1);
    const std::vector<int64_t> recent = {0, 2, 4};
    for (const SamplingOptions& options : {SamplingOptions{}, {1.0, 0, 1.0}, {1.0, 2, 1.0}, {1.0, 0, 0.5}}) {
        for (const double min_p : {0.0, 0.5}) {
            for (const double penalty : {1.0, 1.5}) {
                SamplingOptions more = options;
                more.min_p = min_p;
                more.repetition_penalty = penalty;
                const int64_t token = sampler.sample(logits, more, rng, recent);
                EXPECT_GE(token, 0);
                EXPECT_LT(token, 5);
            }
        }
    }
    std::vector<LogProb> top;
    sampler.logprobs(logits, 1, 3, top);
    EXPECT_EQ(top.size(), 3U);
}

void check_generation(const json& golden, const std::string& path) {
    const auto program = Program::open(path, {});
    ASSERT_TRUE(program) << program.error().message;
    for (const json& run : golden["runs"]) {
        const auto prompt = prompt_ids(**program, run["prompt"].get<std::string>());
        ASSERT_TRUE(prompt);
        EXPECT_EQ(*prompt, run["prompt_ids"].get<std::vector<int64_t>>());
        auto session = Session::create(**program);
        ASSERT_TRUE(session);
        Rng rng(run["seed"].get<uint64_t>());
        const GenerationOptions options{sampling_of(run), run["max_new_tokens"].get<int64_t>(),
                                        (*program)->metadata().stop_ids};
        auto generator = Generator::create(*session, *prompt, options, rng, (*program)->tokenizer());
        ASSERT_TRUE(generator);
        std::vector<int64_t> ids;
        std::string text;
        for (;;) {
            const auto step = generator->next();
            ASSERT_TRUE(step) << step.error().message;
            if (*step == nullptr) break;
            ids.push_back((*step)->token);
            text += (*step)->text;
        }
        EXPECT_EQ(ids, run["ids"].get<std::vector<int64_t>>())
            << "if the built-in model has changed, run python -m tests.golden.generate";
        EXPECT_EQ(text, run["text"].get<std::string>());
    }
}

TEST(Golden, Tiny) {
    REQUIRE_TINY(path);
    check_generation(testing::golden("tiny.json"), path);
}

TEST(Golden, Stories260K) {
    REQUIRE_STORIES(path);
    check_generation(testing::golden("stories260K.json"), path);
}

TEST(Program, RefusesWhatIsMissing) {
    EXPECT_FALSE(Program::open("nowhere.pte", {}));
    REQUIRE_TINY(path);
    const auto program = Program::open(path, {.threads = 0});
    ASSERT_FALSE(program);
    EXPECT_EQ(program.error().message, "--threads 0 is invalid; give 1 or more");
    EXPECT_TRUE(Program::open(path, {.threads = 2}));
}

TEST(Program, ServesSessionsInTurns) {
    REQUIRE_TINY(path);
    const auto program = Program::open(path, {});
    ASSERT_TRUE(program);
    auto one = Session::create(**program);
    auto two = Session::create(**program);
    ASSERT_TRUE(one && two);
    for (const int64_t token : {1, 5, 9}) {
        const auto first = one->decode(token);
        ASSERT_TRUE(first);
        const std::vector<float> kept(first->begin(), first->end());
        const auto second = two->decode(token);
        ASSERT_TRUE(second);
        EXPECT_EQ(kept, std::vector<float>(second->begin(), second->end()));
    }
}

}  // namespace
}  // namespace llama_runner
