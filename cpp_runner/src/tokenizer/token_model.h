#pragma once

#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <unordered_map>
#include <vector>

#include "llama_runner/result.h"

namespace llama_runner {

/// What turns a word into ids: the "model" of a tokenizer.json.
class TokenModel {
  public:
    virtual ~TokenModel() = default;

    /// Appends the ids of a word, which is not empty. Fails where it has a character that no token stands for.
    virtual Result<void> encode(const std::string& word, std::vector<int64_t>& ids) const = 0;

    /// Token -> id.
    const std::unordered_map<std::string, uint32_t>& vocab() const { return vocab_; }

    /// The number of tokens, which the ids of added ones follow.
    virtual int64_t size() const { return static_cast<int64_t>(vocab_.size()); }

  protected:
    /// Reads an object of tokens and ids.
    Result<void> read_vocab(const nlohmann::json& model);

    /// Appends the ids of the bytes of `text`, "<0x0A>" and its like; false where one has no token.
    bool append_bytes(const std::string& text, std::vector<uint32_t>& ids) const;

    std::unordered_map<std::string, uint32_t> vocab_;
};

/// The model that a tokenizer.json has. Fails where it is damaged or unknown.
Result<std::unique_ptr<TokenModel>> model_from(const nlohmann::json& model);

/// A model of its kind: BPE merges the characters of a word by the ranks of pairs.
Result<std::unique_ptr<TokenModel>> bpe_from(const nlohmann::json& model);

/// Unigram takes the tokens whose scores add up to the most.
Result<std::unique_ptr<TokenModel>> unigram_from(const nlohmann::json& model);

/// A model that its `open` fills.
template <typename Model>
Result<std::unique_ptr<TokenModel>> opened(const nlohmann::json& model) {
    auto made = std::make_unique<Model>();
    if (auto done = made->open(model); !done) return done.error();
    return std::unique_ptr<TokenModel>(std::move(made));
}

/// "<0x0A>" and its like.
std::string byte_name(unsigned char byte);

/// The refusal of a damaged file.
Error damaged_json(const std::string& detail);

}  // namespace llama_runner
