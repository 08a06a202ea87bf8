#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>

namespace llama_runner::testing {

/// Returns the folder of test models: LLAMA_RUNNER_MODELS in the environment, or build/models.
inline std::filesystem::path models() {
    const char* given = std::getenv("LLAMA_RUNNER_MODELS");
    return given != nullptr ? given : LLAMA_RUNNER_TEST_MODELS;
}

/// Returns the folder of real weights and tokenizers, which a user's clone does not have.
inline std::filesystem::path shared() { return LLAMA_RUNNER_TEST_SHARED; }

inline std::string read_file(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

inline nlohmann::json golden(const char* name) {
    return nlohmann::json::parse(read_file(std::filesystem::path(LLAMA_RUNNER_TEST_GOLDEN) / name));
}

/// A temporary file that is deleted at the end of the test.
class TemporaryFile {
  public:
    explicit TemporaryFile(const std::string& content)
        : path_(std::filesystem::temp_directory_path() /
                ("llama_runner_" + std::to_string(reinterpret_cast<uintptr_t>(this)) + ".pte")) {
        std::ofstream(path_, std::ios::binary) << content;
    }
    ~TemporaryFile() {
        std::error_code ignored;
        std::filesystem::remove(path_, ignored);
    }

    std::string path() const { return path_.string(); }

  private:
    std::filesystem::path path_;
};

}  // namespace llama_runner::testing

/// Sets `variable` to the path of tiny.pte, which must have been exported.
#define REQUIRE_TINY(variable)                                                                               \
    const std::string variable = (::llama_runner::testing::models() / "tiny.pte").string();                  \
    ASSERT_TRUE(std::filesystem::exists(variable))                                                           \
        << variable << " does not exist; export it with `python -m export.llama --max-seq-len 512 --output " \
        << variable << "`"

/// Sets `variable` to the path of stories260K.pte; skips the test where its weights do not exist.
#define REQUIRE_STORIES(variable)                                                                  \
    if (!std::filesystem::exists(::llama_runner::testing::shared() / "stories260K")) {             \
        GTEST_SKIP() << "needs ../shared/data/stories260K, which is not part of the repository";   \
    }                                                                                              \
    const std::string variable = (::llama_runner::testing::models() / "stories260K.pte").string(); \
    ASSERT_TRUE(std::filesystem::exists(variable)) << variable << " does not exist; run python -m tests.golden.generate"
