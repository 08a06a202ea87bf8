#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "llama_runner/tokenizer.h"

namespace llama_runner {

/// What SentencePiece writes for a space: U+2581.
inline constexpr std::string_view kSpaceMark = "\xE2\x96\x81";

/// SentencePiece's own model file, as of Llama 1 and 2 (google/sentencepiece).
Result<std::unique_ptr<Tokenizer>> open_sentencepiece(std::string_view data);

/// Llama 3's ranks file: one `base64 rank` a line, with the 256 special tokens after them.
Result<std::unique_ptr<Tokenizer>> open_tiktoken(std::string_view data);

/// How Llama 3 splits text before merging (meta-llama/llama-models, models/llama3/tokenizer.py).
inline constexpr std::string_view kLlama3Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|)"
    R"(\s*[\r\n]+|\s+(?!\S)|\s+)";

/// The 256 special tokens that follow Llama 3's ranks, in the order of their ids.
std::vector<std::string> llama3_specials();

/// A Hugging Face tokenizer.json, with any model.
Result<std::unique_ptr<Tokenizer>> open_tokenizer_json(std::string_view data);

}  // namespace llama_runner
