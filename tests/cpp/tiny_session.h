#pragma once

#include "llama_runner/program.h"
#include "llama_runner/session.h"
#include "support.h"

/// Sessions of tiny.pte, whose path is set by REQUIRE_TINY.
namespace llama_runner::testing {

/// Returns a session of tiny.pte in which a text has been prefilled.
inline Session session_of(Program& program, const std::vector<int64_t>& text) {
    auto session = Session::create(program);
    if (!text.empty()) EXPECT_TRUE(session->prefill(text));
    return *std::move(session);
}

inline std::vector<float> logits_after(Program& program, const std::vector<int64_t>& text) {
    Session session = session_of(program, {});
    const auto logits = session.prefill(text);
    return {logits->begin(), logits->end()};
}

inline void expect_close(std::span<const float> found, const std::vector<float>& expected) {
    ASSERT_EQ(found.size(), expected.size());
    for (size_t i = 0; i < found.size(); ++i) ASSERT_NEAR(found[i], expected[i], 1e-3) << i;
}

inline std::unique_ptr<Program> tiny(const std::string& path) {
    auto program = Program::open(path, {});
    EXPECT_TRUE(program) << program.error().message;
    return *std::move(program);
}

}  // namespace llama_runner::testing
