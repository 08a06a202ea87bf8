#include "llama_runner/tokenizer.h"
#include "support.h"

namespace llama_runner {
namespace {

/// Invalid bytes become U+FFFD. The expected texts are Python's.
TEST(Utf8Decoder, ReplacesWhatIsInvalid) {
    const std::string r = "\xEF\xBF\xBD";
    const std::vector<std::pair<std::string, std::string>> cases = {
        {"A\xC3\xA9\xF0\x9F\x99\x82", "A\xC3\xA9\xF0\x9F\x99\x82"},
        {"\xFF", r},
        {"\xC0\x80", r + r},
        {"\xE0\x80\x80", r + r + r},
        {"\xE2\x82", r},
        {"\xE2\x82"
         "A",
         r + "A"},
        {"\xED\xA0\x80", r + r + r},
        {"\xF0\x9F\x99", r},
        {"\xF0\x9F\xF0\x9F\x99\x82", r + "\xF0\x9F\x99\x82"},
        {"\xF4\x90\x80\x80", r + r + r + r},
        {"\x80\xBF", r + r},
    };
    for (const auto& [bytes, expected] : cases) {
        std::string at_once;
        Utf8Decoder decoder;
        decoder.add(bytes, at_once);
        decoder.finish(at_once);
        EXPECT_EQ(at_once, expected);
        std::string singly;
        for (const char c : bytes) decoder.add({&c, 1}, singly);
        decoder.finish(singly);
        EXPECT_EQ(singly, expected);
    }
}

TEST(Tokenizer, NeverGivesOutHalfACharacter) {
    const auto tokenizer = from_bytes(testing::read_file(LLAMA_RUNNER_TEST_TOKENIZER));
    ASSERT_TRUE(tokenizer) << tokenizer.error().message;
    const std::string text = "Once \xF0\x9F\x99\x82 upon \xE6\x97\xA5\xE6\x9C\xAC";
    const auto ids = (*tokenizer)->encode(text);
    ASSERT_TRUE(ids);
    StreamDecoder decoder(**tokenizer);
    std::string whole;
    for (const int64_t id : *ids) {
        std::string piece;
        decoder.add(id, piece);
        Utf8Decoder check;
        std::string valid;
        check.add(piece, valid);
        EXPECT_EQ(valid, piece);
        whole += piece;
    }
    EXPECT_EQ(whole, text);
    EXPECT_EQ(decode(**tokenizer, *ids), text);
}

TEST(Tokenizer, IgnoresIdsThatAreNone) {
    const auto tokenizer = from_bytes(testing::read_file(LLAMA_RUNNER_TEST_TOKENIZER));
    ASSERT_TRUE(tokenizer);
    EXPECT_EQ((*tokenizer)->piece(-1, true), "");
    EXPECT_EQ((*tokenizer)->piece((*tokenizer)->vocab_size(), false), "");
}

TEST(Tokenizer, RefusesDamage) {
    const std::vector<std::pair<std::string, std::string>> cases = {
        {"", "its content is neither SentencePiece, tiktoken ranks nor a tokenizer.json"},
        {"hello", "its content is neither"},
        {"{", "damaged tokenizer.json tokenizer (it is not JSON)"},
        {"{}", "damaged tokenizer.json tokenizer (it has no vocabulary)"},
        {"\n", "damaged sentencepiece tokenizer"},
        {"IQ== 0\nIg==", "line 2 of the tiktoken file is not `base64 rank`"},
        {"IQ== 0\nIg== 2\n", "the tiktoken file's 2 ranks have gaps or repeats"},
        {"IQ== 0\nIQ== 1\n", "ranks have gaps or repeats"},
        {"IQ== 0\n", "the tiktoken file has no rank for byte 0"},
    };
    for (const auto& [data, message] : cases) {
        const auto tokenizer = from_bytes(data);
        ASSERT_FALSE(tokenizer) << message;
        EXPECT_NE(tokenizer.error().message.find(message), std::string::npos) << tokenizer.error().message;
    }
    EXPECT_FALSE(from_bytes("x", "wordpiece"));
}

}  // namespace
}  // namespace llama_runner
