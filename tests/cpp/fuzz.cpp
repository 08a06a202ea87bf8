// Runs the tokenizers, the metadata reader and Program::open on damaged input for some seconds: each must return an
// error or a working object. In the sanitizer build, undefined behaviour is a crash.
//
//     fuzz SECONDS PTE TOKENIZER...

#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>

#include "llama_runner/conversation.h"
#include "llama_runner/metadata.h"
#include "llama_runner/program.h"
#include "llama_runner/sampler.h"
#include "llama_runner/tokenizer.h"

namespace {

using namespace llama_runner;

class Mutator {
  public:
    explicit Mutator(uint64_t seed) : rng_(seed) {}

    size_t below(size_t limit) { return static_cast<size_t>(rng_.coin() * static_cast<double>(limit)); }

    /// Returns the data with a few bytes changed, removed, repeated, or replaced by difficult ones.
    std::string operator()(std::string data) {
        static const std::vector<std::string> kTelling = {"\xFF\xFF\xFF\xFF",
                                                          std::string(8, '\0'),
                                                          "\x80",
                                                          "[",
                                                          "{",
                                                          "\"",
                                                          "null",
                                                          "-1",
                                                          "99999999999999999999",
                                                          "\\u0000",
                                                          "\n",
                                                          " ",
                                                          "L"};
        for (size_t i = 0, count = 1 + below(6); i < count && !data.empty(); ++i) {
            const size_t at = below(data.size());
            switch (below(5)) {
                case 0:
                    data[at] = static_cast<char>(below(256));
                    break;
                case 1:
                    data.erase(at, 1 + below(std::min<size_t>(64, data.size() - at)));
                    break;
                case 2:
                    data.insert(at, data.substr(below(data.size()), 1 + below(64)));
                    break;
                case 3:
                    data.insert(at, kTelling[below(kTelling.size())]);
                    break;
                default:
                    data.resize(below(8) == 0 ? at : data.size());
            }
        }
        return data;
    }

  private:
    Rng rng_;
};

std::string read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

/// Encodes and decodes a text if the damaged tokenizer still opens.
bool try_tokenizer(const std::string& data, const std::string& text, Mutator& mutate) {
    const auto tokenizer = from_bytes(data);
    if (!tokenizer) return false;
    const auto encoded = (*tokenizer)->encode(text, mutate.below(2) == 0);
    std::vector<int64_t> ids = encoded ? *encoded : std::vector<int64_t>{};
    for (int i = 0; i < 16; ++i) {
        ids.push_back(static_cast<int64_t>(mutate.below(static_cast<size_t>((*tokenizer)->vocab_size()) + 8)) - 4);
    }
    return !decode(**tokenizer, ids).empty();
}

bool try_metadata(Mutator& mutate) {
    static const std::string kMethods =
        R"([{"name": "decode", "min_length": 1, "max_length": 4, "rows": 1, "start_layer": 0, "end_layer": 1,)"
        R"("inputs": [{"name": "mask", "shape": [1, "L", 9], "dtype": "float32"}],)"
        R"("outputs": [{"name": "logits", "shape": [1, 16], "dtype": "float32"}]}])";
    static const std::string kRequirements = R"({"executorch": "1.5.1", "backends": ["B"], "operators": []})";
    static const std::vector<float> kTable(8, 1);
    const auto constants = [&](const char* name, const auto& take) -> Result<void> {
        const std::string key = name;
        const ConstantTensor table{true, {4, 2}, kTable.data(), kTable.size() * sizeof(float)};
        if (key == "get_methods") return take({mutate(kMethods)}), Result<void>();
        if (key == "get_requirements") return take({mutate(kRequirements)}), Result<void>();
        if (key == "get_tokenizer_kind") return take({mutate("tokenizer.json")}), Result<void>();
        if (key == "get_rope_cos" || key == "get_rope_sin") return take({table}), Result<void>();
        if (key == "get_alibi_slopes") return take({ConstantTensor{true, {8}, kTable.data(), 32}}), Result<void>();
        if (key == "get_chat_template") return take({std::string("{}")}), Result<void>();
        if (key == "get_sampling") return take({mutate(R"({"temperature": 0.25, "top_k": 40})")}), Result<void>();
        if (key == "get_tokenizer") return take({table}), Result<void>();
        return take({static_cast<int64_t>(mutate.below(100) == 0 ? -1 : 1)}), Result<void>();
    };
    return static_cast<bool>(from_constants(constants));
}

bool try_template(Mutator& mutate) {
    static const std::string kTemplate =
        R"({"data": {"opening": "<s>", "answer": "a", "again": "</s><s>", "ask": "", "strips_user": true, )"
        R"("thought_end": "</t>", "thought_strips": "\n", "strips_assistant": true, "system": {"before": )"
        "\"<s>\xEE\x80\x80%d %B\xEE\x80\x81\", "
        R"("behind": "\n", "joins": true, "is_late": true, "skips_empty": true}}})";
    const auto made = ChatTemplate::from_json(mutate(kTemplate));
    const std::vector<Message> messages = {{Role::kSystem, mutate(" \xC2\xA0\n")},
                                           {Role::kUser, mutate(" \x1C")},
                                           {Role::kAssistant, mutate("a \xE2\x80\xA8")},
                                           {Role::kUser, mutate(" ")}};
    return made && made->text(messages);
}

/// Checks that a damaged file is refused.
bool try_file(const std::string& whole, const std::string& path, Mutator& mutate) {
    const std::string damaged = mutate(whole);
    std::ofstream(path, std::ios::binary) << damaged;
    return damaged != whole && static_cast<bool>(Program::open(path, {}));
}

}  // namespace

int main(int count, char** arguments) {
    if (count < 4) return std::puts("fuzz SECONDS PTE TOKENIZER..."), 2;
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(std::atoi(arguments[1]));
    const std::string program = read_file(arguments[2]);
    std::vector<std::string> tokenizers;
    for (int i = 3; i < count; ++i) tokenizers.push_back(read_file(arguments[i]));
    const std::string path =
        (std::filesystem::temp_directory_path() / ("fuzz_" + std::to_string(getpid()) + ".pte")).string();
    Mutator mutate(1);
    size_t rounds = 0;
    size_t opened = 0;
    bool passed = program.size() > 1000;
    for (; passed && std::chrono::steady_clock::now() < end; ++rounds) {
        for (const std::string& tokenizer : tokenizers) {
            opened += try_tokenizer(mutate(tokenizer), mutate("Once upon 12 \xF0\x9F\x99\x82 <s>"), mutate);
        }
        for (int i = 0; i < 20; ++i) opened += try_metadata(mutate) + try_template(mutate);
        passed = rounds % 8 != 0 || !try_file(program, path, mutate);
    }
    std::filesystem::remove(path);
    std::printf("%zu rounds, %zu damaged inputs still usable: %s\n", rounds, opened, passed ? "passed" : "FAILED");
    return passed ? 0 : 1;
}
