#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "llama_runner/tokenizer.h"

namespace llama_runner {

/// SentencePiece's character for a space: U+2581.
inline constexpr std::string_view kSpaceMark = "\xE2\x96\x81";

/// Opens SentencePiece's own model file, which Llama 1 and 2 have (google/sentencepiece).
Result<std::unique_ptr<Tokenizer>> open_sentencepiece(std::string_view data);

/// Opens Llama 3's ranks file: one `base64 rank` in each line; the 256 special tokens follow the ranks.
Result<std::unique_ptr<Tokenizer>> open_tiktoken(std::string_view data);

/// The pattern by which Llama 3 splits text before merging (meta-llama/llama-models, models/llama3/tokenizer.py).
inline constexpr std::string_view kLlama3Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|)"
    R"(\s*[\r\n]+|\s+(?!\S)|\s+)";

/// The 256 special tokens that follow Llama 3's ranks, in the order of their ids.
std::vector<std::string> llama3_specials();

/// Opens a Hugging Face tokenizer.json, with any model.
Result<std::unique_ptr<Tokenizer>> open_tokenizer_json(std::string_view data);

}  // namespace llama_runner
