// Tests chats with the golden file of tests/runtime/test_chat.py, and with cases that it does not contain.

#include "llama_runner/conversation.h"
#include "llama_runner/program.h"
#include "support.h"

namespace llama_runner {
namespace {

using nlohmann::json;

Role role_of(const std::string& name) {
    return name == "system" ? Role::kSystem : name == "user" ? Role::kUser : Role::kAssistant;
}

ChatTemplate simple() {
    return {.opening = "<s>",
            .answer = ">",
            .again = "</s><s>",
            .ask = ">",
            .strips_user = false,
            .strips_assistant = false,
            .system = std::nullopt,
            .thought_end = "",
            .thought_strips = ""};
}

TEST(ChatTemplate, Golden) {
    const auto tokenizer = from_bytes(testing::read_file(LLAMA_RUNNER_TEST_TOKENIZER));
    ASSERT_TRUE(tokenizer);
    const json golden = testing::golden("chat.json");
    ASSERT_GT(golden["cases"].size(), 50);
    const json& at = golden["now"];
    std::tm local{};
    local.tm_year = at[0].get<int>() - 1900;
    local.tm_mon = at[1].get<int>() - 1;
    local.tm_mday = at[2];
    local.tm_hour = at[3];
    local.tm_min = at[4];
    local.tm_isdst = -1;
    const std::time_t now = std::mktime(&local);
    for (const json& entry : golden["cases"]) {
        const auto made = ChatTemplate::from_json(entry["template"].dump());
        ASSERT_TRUE(made) << made.error().message;
        std::vector<Message> messages;
        for (const json& message : entry["messages"]) messages.push_back({role_of(message[0]), message[1]});
        const auto text = made->text(messages, now);
        ASSERT_TRUE(text) << text.error().message;
        EXPECT_EQ(*text, entry["text"].get<std::string>());
        EXPECT_EQ(*(*tokenizer)->encode_parts(*made->parts(messages, now)), entry["ids"].get<std::vector<int64_t>>());
        const auto end_id = made->end_id(**tokenizer, 1);
        EXPECT_EQ(end_id ? json(*end_id) : json(nullptr), entry["end_id"]);
    }
}

TEST(ChatTemplate, RefusesMessagesOutOfTurn) {
    const std::vector<std::pair<std::vector<Message>, std::string>> cases = {
        {{}, "the roles of the messages are none"},
        {{{Role::kUser, "a"}, {Role::kAssistant, "b"}},
         "the roles of the messages are user, assistant; give user and assistant"},
        {{{Role::kAssistant, "a"}}, "are assistant;"},
        {{{Role::kUser, "a"}, {Role::kSystem, "b"}, {Role::kUser, "c"}}, "are user, system, user;"},
        {{{Role::kSystem, "a"}, {Role::kUser, "b"}}, "the chat template supports no system message; leave it out"},
    };
    for (const auto& [messages, message] : cases) {
        const auto text = simple().text(messages);
        ASSERT_FALSE(text);
        EXPECT_NE(text.error().message.find(message), std::string::npos) << text.error().message;
    }
}

TEST(ChatTemplate, RefusesDamage) {
    for (const char* text : {"", "{", "{}", "[]", R"({"data": {"opening": "", "answer": "", "again": "", "ask": 1}})",
                             R"({"data": {"opening": "", "answer": "", "again": "", "ask": "", "system": {}}})"}) {
        const auto made = ChatTemplate::from_json(text);
        ASSERT_FALSE(made) << text;
        EXPECT_TRUE(made.error().message.starts_with("the file's chat template cannot be read (")) << text;
    }
}

TEST(ChatTemplate, SaysThatItsJinjaIsNotForThisRunner) {
    const auto made = ChatTemplate::from_json(R"({"jinja": {"source": ""}, "data": null})");
    ASSERT_FALSE(made);
    EXPECT_TRUE(made.error().message.starts_with("the file's chat template needs Jinja, which this runner lacks; "));
}

TEST(ChatTemplate, RefusesATokenMatchedInAnyText) {
    const auto tokenizer = from_bytes(
        R"({"model": {"vocab": {"a": 0, "b": 1}, "merges": []},
            "added_tokens": [{"id": 2, "content": "<x>", "special": false}, {"id": 3, "content": "--", "special": false}]})");
    ASSERT_TRUE(tokenizer) << tokenizer.error().message;
    ChatTemplate made = simple();
    made.again = "--<x>";
    made.ask = "--<x>";
    const std::vector<Message> sly = {{Role::kUser, "a<x>b"}};
    const auto ids = made.encode(sly, **tokenizer);
    ASSERT_FALSE(ids);
    EXPECT_EQ(ids.error().message, "a message holds <x>, which separates messages; leave it out");
    const std::vector<Message> plain = {{Role::kUser, "a--b"}};
    const auto taken = made.encode(plain, **tokenizer);
    ASSERT_TRUE(taken);
    EXPECT_EQ(*taken, (std::vector<int64_t>{0, 3, 1, 3, 2}));
    EXPECT_EQ(made.end_id(**tokenizer, std::nullopt), 2);
    EXPECT_EQ(made.end_id(**tokenizer, 2), std::nullopt);
}

/// tests/runtime/test_chat.py makes chat.pte and compares its chats with Python's.
TEST(Chat, RefusesAFileWithoutATemplate) {
    REQUIRE_TINY(path);
    const auto program = Program::open(path, {});
    ASSERT_TRUE(program);
    Rng rng(0);
    const auto chat = Chat::create(**program, {}, rng);
    ASSERT_FALSE(chat);
    EXPECT_EQ(chat.error().message, "the file has no chat template; export it again with --chat-template");
}

}  // namespace
}  // namespace llama_runner
