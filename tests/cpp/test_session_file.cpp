#include "tiny_session.h"

namespace llama_runner {
namespace {

using testing::expect_close;
using testing::logits_after;
using testing::session_of;
using testing::tiny;

TEST(SavedSession, IsSavedAndLoaded) {
    REQUIRE_TINY(path);
    const auto program = tiny(path);
    const testing::TemporaryFile file("");
    ASSERT_TRUE(session_of(*program, {1, 5, 9}).save(file.path()));
    Session session = session_of(*program, {4, 4, 4, 4});
    ASSERT_TRUE(session.load(file.path()));
    EXPECT_EQ(session.position(), 3);
    expect_close(*session.decode(13), logits_after(*program, {1, 5, 9, 13}));

    const std::string whole = testing::read_file(file.path());
    std::string foreign = whole;
    foreign[20] ^= 1;
    std::string newer = whole;
    newer[8] = 9;
    std::string damaged = whole;
    damaged[100] ^= 1;
    const std::vector<std::pair<std::string, std::string>> cases = {
        {"hello", "is not a saved session"},
        {foreign, "was saved with another model"},
        {newer, "has version 9, but this program reads 1"},
        {damaged, "is damaged: its checksum does not match"},
        {whole.substr(0, whole.size() - 1), "is damaged: its checksum does not match"},
        {whole.substr(0, 48), "is damaged: its checksum does not match"},
    };
    for (const auto& [content, message] : cases) {
        const testing::TemporaryFile bad(content);
        const auto loaded = session.load(bad.path());
        ASSERT_FALSE(loaded) << message;
        EXPECT_NE(loaded.error().message.find(message), std::string::npos) << loaded.error().message;
        EXPECT_EQ(session.position(), 4);
    }
    EXPECT_FALSE(session.load("nowhere"));
    EXPECT_FALSE(session.save("nowhere/at/all"));
}

}  // namespace
}  // namespace llama_runner
