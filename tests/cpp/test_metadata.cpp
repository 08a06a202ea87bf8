#include <map>

#include "llama_runner/metadata.h"
#include "llama_runner/trailer.h"
#include "support.h"

namespace llama_runner {
namespace {

using testing::read_file;
using testing::TemporaryFile;

const std::vector<float> kTable = {1, 2, 3, 4, 5, 6};

std::map<std::string, std::vector<Constant>> good() {
    const ConstantTensor table{true, {3, 2}, kTable.data(), kTable.size() * sizeof(float)};
    return {
        {"get_max_seq_len", {int64_t{8}}},
        {"get_vocab_size", {int64_t{16}}},
        {"get_n_layers", {int64_t{1}}},
        {"get_batch_size", {int64_t{1}}},
        {"get_bos_id", {int64_t{-1}}},
        {"get_eos_ids", {int64_t{2}, int64_t{5}}},
        {"get_methods",
         {std::string(R"([{"name": "decode", "min_length": 1, "max_length": 4, "max_rows": 2, "start_layer": 0,
                           "end_layer": 1, "inputs": [{"name": "mask", "shape": [1, "L", 9], "dtype": "float32"}],
                           "outputs": [{"name": "logits", "shape": [1, "R", 16], "dtype": "float32"}]}])")}},
        {"get_config",
         {std::string(R"({"positions": "rope", "nope_layers": [1], "local_rope_theta": 100.0, "local_layers": [0]})")}},
        {"get_provenance", {std::string("{}")}},
        {"get_requirements", {std::string(R"({"executorch": "1.5.1", "backends": ["B"], "operators": []})")}},
        {"get_rope_cos", {table}},
        {"get_rope_sin", {table}},
        {"get_alibi_slopes", {ConstantTensor{true, {3}, kTable.data(), 3 * sizeof(float)}}},
        {"get_sliding_window", {int64_t{4}}},
        {"get_matrix_bytes", {int64_t{1024}}},
        {"get_activation_bytes", {int64_t{512}}},
        {"get_tokenizer_kind", {std::string("none")}},
        {"get_chat_template", {std::string("{}")}},
        {"get_sampling", {std::string(R"({"temperature": 0.25, "top_k": 40})")}},
    };
}

Result<Metadata> read(const std::map<std::string, std::vector<Constant>>& constants) {
    return from_constants([&](const char* name, const auto& take) -> Result<void> {
        const auto found = constants.find(name);
        if (found == constants.end()) return Error{std::string("the file carries no ") + name};
        take(found->second);
        return {};
    });
}

TEST(Metadata, ReadsEveryField) {
    const auto metadata = read(good());
    ASSERT_TRUE(metadata) << metadata.error().message;
    EXPECT_EQ(metadata->max_seq_len, 8);
    EXPECT_EQ(metadata->bos_id, std::nullopt);
    EXPECT_EQ(metadata->stop_ids, (std::vector<int64_t>{2, 5}));
    EXPECT_EQ(metadata->methods[0].inputs[0].shape, (std::vector<int64_t>{1, kLength, 9}));
    EXPECT_EQ(metadata->methods[0].inputs[0].elements(4), 36);
    EXPECT_EQ(metadata->methods[0].outputs[0].elements({4, 2}), 32);
    EXPECT_EQ(metadata->nope_layers, (std::vector<int64_t>{1}));
    EXPECT_EQ(metadata->locally_rotated_layers, (std::vector<int64_t>{0}));
    EXPECT_EQ(metadata->positions, "rope");
    EXPECT_EQ(metadata->identity[0], 0xdc) << "XXH3-128 of {}";
    EXPECT_EQ(metadata->rope.rows(), 3);
    EXPECT_EQ(metadata->alibi_slopes, (std::vector<float>{1, 2, 3}));
    EXPECT_EQ(metadata->sliding_window, 4);
    EXPECT_EQ(metadata->tokenizer, "");
    EXPECT_EQ(metadata->chat_template, "{}");
    EXPECT_EQ(metadata->sampling.temperature, 0.25);
    EXPECT_EQ(metadata->sampling.top_k, 40);
    EXPECT_EQ(metadata->sampling.top_p, 1);
}

TEST(TensorSpec, NamesSayRoleAndLayer) {
    const TensorSpec cache{"v_cache.12", {1}, Dtype::kFloat32};
    EXPECT_TRUE(cache.is_cache());
    EXPECT_EQ(role_of(cache.name), kVCache);
    EXPECT_EQ(layer_of(cache.name), 12);
    EXPECT_EQ(rows_of(cache.name), "v_rows.12");
    EXPECT_EQ(rows_of("k_cache.0"), "k_rows.0");
    EXPECT_FALSE((TensorSpec{"k_rows.0", {1}, Dtype::kFloat32}.is_cache()));
    EXPECT_EQ(role_of("tokens"), "tokens");
    EXPECT_EQ(layer_of("tokens"), std::nullopt);
    EXPECT_EQ(layer_of("k_cache.x"), std::nullopt);
}

TEST(Metadata, SlopesOfZeroAreNone) {
    static const std::vector<float> kZeros(3);
    auto constants = good();
    constants["get_alibi_slopes"] = {ConstantTensor{true, {3}, kZeros.data(), 3 * sizeof(float)}};
    const auto metadata = read(constants);
    ASSERT_TRUE(metadata);
    EXPECT_TRUE(metadata->alibi_slopes.empty());
}

TEST(Metadata, RefusesWhatHasTheWrongForm) {
    const std::map<std::string, std::vector<Constant>> wrong = {
        {"get_max_seq_len", {int64_t{0}}},
        {"get_sliding_window", {int64_t{-1}}},
        {"get_alibi_slopes", {ConstantTensor{false, {3}, kTable.data(), 12}}},
        {"get_vocab_size", {std::string("16")}},
        {"get_matrix_bytes", {int64_t{0}}},
        {"get_batch_size", {int64_t{2}}},
        {"get_bos_id", {}},
        {"get_eos_ids", {std::string("2")}},
        {"get_methods", {std::string("[]")}},
        {"get_requirements", {std::string("{")}},
        {"get_rope_cos", {ConstantTensor{true, {6}, kTable.data(), 24}}},
        {"get_rope_sin", {ConstantTensor{true, {2, 3}, kTable.data(), 24}}},
        {"get_tokenizer_kind", {int64_t{0}}},
    };
    for (const auto& [name, value] : wrong) {
        auto constants = good();
        constants[name] = value;
        const auto metadata = read(constants);
        ASSERT_FALSE(metadata) << name;
        EXPECT_NE(metadata.error().message.find("the file's metadata cannot be read"), std::string::npos) << name;
        constants.erase(name);
        EXPECT_FALSE(read(constants)) << name;
    }
}

TEST(Metadata, RefusesImpossibleMethods) {
    for (const char* change :
         {R"("name": 3)", R"("min_length": 0)", R"("min_length": 9)", R"("max_length": "x")", R"("max_rows": 5)",
          R"("start_layer": -1)", R"("end_layer": 0)", R"("inputs": [{"name": "a", "shape": [0], "dtype": "float32"}])",
          R"("inputs": [{"name": "a", "shape": [9999999999, 9999999999], "dtype": "float32"}])",
          R"("outputs": [{"name": "a", "shape": [1], "dtype": "bfloat16"}])"}) {
        auto methods = nlohmann::json::parse(std::get<std::string>(good()["get_methods"][0]));
        methods[0].update(nlohmann::json::parse("{" + std::string(change) + "}"));
        auto constants = good();
        constants["get_methods"] = {methods.dump()};
        EXPECT_FALSE(read(constants)) << change;
    }
}

TEST(CheckFile, ToldApart) {
    REQUIRE_TINY(path);
    const std::string whole = read_file(path);
    ASSERT_TRUE(check_file(path, true));
    std::string newer = whole;
    newer[newer.size() - 24] = 9;
    std::string older = whole;
    older[older.size() - 24] = 1;
    std::string longer = whole;
    longer.insert(1000, "x");
    std::string damaged = whole;
    damaged[damaged.size() / 2] ^= 1;
    const std::vector<std::pair<std::string, std::string>> cases = {
        {"", "is not a .pte file"},
        {"hello", "is not a .pte file"},
        {whole.substr(0, whole.size() - 1), "is truncated or was not made by llama-pte"},
        {whole.substr(0, 100), "is truncated or was not made by llama-pte"},
        {newer, "has format version 9, newer than this version's 4"},
        {older, "has format version 1, but this version reads 4; export it again"},
        {longer, "is damaged: "},
        {damaged, "is damaged: its checksum does not match"},
    };
    for (const auto& [content, message] : cases) {
        const TemporaryFile file(content);
        const auto checked = check_file(file.path(), true);
        ASSERT_FALSE(checked) << message;
        EXPECT_NE(checked.error().message.find(message), std::string::npos) << checked.error().message;
    }
    const TemporaryFile unchecked(damaged);
    EXPECT_TRUE(check_file(unchecked.path(), false));
    EXPECT_NE(check_file("nowhere.pte", true).error().message.find("nowhere.pte does not exist"), std::string::npos);
}

}  // namespace
}  // namespace llama_runner
