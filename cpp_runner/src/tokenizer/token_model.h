#pragma once

#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <unordered_map>
#include <vector>

#include "llama_runner/result.h"

namespace llama_runner {

/// The "model" of a tokenizer.json, which turns a word into ids.
class TokenModel {
  public:
    virtual ~TokenModel() = default;

    /// Appends the ids of a non-empty word. Fails if it has a character for which there is no token.
    virtual Result<void> encode(const std::string& word, std::vector<int64_t>& ids) const = 0;

    /// Token -> id.
    const std::unordered_map<std::string, uint32_t>& vocab() const { return vocab_; }

    /// Number of tokens; added tokens that are not in the model get the ids from here on.
    virtual int64_t size() const { return static_cast<int64_t>(vocab_.size()); }

  protected:
    /// Reads the vocabulary, a JSON object of tokens and ids.
    Result<void> read_vocab(const nlohmann::json& model);

    /// Appends the ids of byte tokens, such as "<0x0A>", for the bytes of `text`; returns false if one is missing.
    bool append_bytes(const std::string& text, std::vector<uint32_t>& ids) const;

    std::unordered_map<std::string, uint32_t> vocab_;
};

/// Returns the model of a tokenizer.json. Fails if it is damaged or unknown.
Result<std::unique_ptr<TokenModel>> model_from(const nlohmann::json& model);

/// Opens a BPE model, which merges the characters of a word by the ranks of pairs.
Result<std::unique_ptr<TokenModel>> bpe_from(const nlohmann::json& model);

/// Opens a Unigram model, which takes the tokens with the highest sum of scores.
Result<std::unique_ptr<TokenModel>> unigram_from(const nlohmann::json& model);

/// Creates a model and reads it with its `open`.
template <typename Model>
Result<std::unique_ptr<TokenModel>> opened(const nlohmann::json& model) {
    auto made = std::make_unique<Model>();
    if (auto done = made->open(model); !done) return done.error();
    return std::unique_ptr<TokenModel>(std::move(made));
}

/// Returns the name of a byte's token, such as "<0x0A>".
std::string byte_name(unsigned char byte);

/// Returns the error for a damaged file.
Error damaged_json(const std::string& detail);

}  // namespace llama_runner
