// The golden files that Python is tested against too (tests/test_golden.py).

#include "llama_runner/generate.h"
#include "llama_runner/program.h"
#include "support.h"

namespace llama_runner {
namespace {

using nlohmann::json;

SamplingOptions sampling_of(const json& entry) { return {entry["temperature"], entry["top_k"], entry["top_p"]}; }

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
        const auto logits = golden["logits"][entry["logits"].get<size_t>()].get<std::vector<float>>();
        Sampler sampler(static_cast<int64_t>(logits.size()));
        Rng rng(entry["seed"].get<uint64_t>());
        std::vector<int64_t> tokens;
        for (size_t i = 0; i < entry["tokens"].size(); ++i) {
            tokens.push_back(sampler.sample(logits, sampling_of(entry), rng));
        }
        EXPECT_EQ(tokens, entry["tokens"].get<std::vector<int64_t>>()) << entry;
    }
}

TEST(Sampler, RefusesImpossibleOptions) {
    EXPECT_EQ((SamplingOptions{-1.0, 0, 1.0}.check().error().message),
              "temperature -1.0 is impossible; give 0 or more");
    EXPECT_EQ((SamplingOptions{0.0, -3, 1.0}.check().error().message), "top-k -3 is impossible; give 0 (all) or more");
    EXPECT_EQ((SamplingOptions{0.0, 0, 1.5}.check().error().message),
              "top-p 1.5 is impossible; give more than 0, up to 1");
    EXPECT_FALSE((SamplingOptions{NAN, 0, 1.0}.check()));
    EXPECT_FALSE((SamplingOptions{0.0, 0, 0.0}.check()));
    EXPECT_TRUE((SamplingOptions{0.0, 0, 1.0}.check()));
}

TEST(Sampler, SurvivesLogitsThatAreNoNumbers) {
    const std::vector<float> logits = {NAN, 1.0F, INFINITY, NAN, -INFINITY};
    Sampler sampler(5);
    Rng rng(1);
    for (const SamplingOptions& options : {SamplingOptions{}, {1.0, 0, 1.0}, {1.0, 2, 1.0}, {1.0, 0, 0.5}}) {
        const int64_t token = sampler.sample(logits, options, rng);
        EXPECT_GE(token, 0);
        EXPECT_LT(token, 5);
    }
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
    EXPECT_EQ(program.error().message, "--threads 0 is impossible; give 1 or more");
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
