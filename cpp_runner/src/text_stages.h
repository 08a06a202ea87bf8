#pragma once

#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "llama_runner/result.h"

namespace llama_runner {

/// A part of a text on its way through a tokenizer.json's stages.
struct Section {
    std::string text;
    /// Whether it opens the whole text.
    bool first;
};

/// Changes a section's text; nothing where a library below failed.
using Normalizer = std::function<Result<void>(std::string& text)>;

/// Splits a section and appends the parts to `parts`.
using PreTokenizer = std::function<Result<void>(Section section, std::vector<Section>& parts)>;

/// The refusal of a tokenizer.json that asks for what is not implemented.
Error unknown_part(const std::string& what);

/// The stages of a tokenizer.json's "normalizer", in order. Fails where one is unknown.
Result<std::vector<Normalizer>> normalizers_from(const nlohmann::json& json);

/// The stages of a tokenizer.json's "pre_tokenizer", in order. Fails where one is unknown.
Result<std::vector<PreTokenizer>> pre_tokenizers_from(const nlohmann::json& json);

/// GPT-2's printable character for every byte, in UTF-8 (openai/gpt-2, src/encoder.py, bytes_to_unicode).
const std::vector<std::string>& byte_level_alphabet();

/// A member of a JSON object, or null.
const nlohmann::json& member(const nlohmann::json& json, const char* key);

/// A text member of a JSON object, or an empty text.
std::string text_member(const nlohmann::json& json, const char* key);

/// A true or false member of a JSON object, or `otherwise`.
bool flag_member(const nlohmann::json& json, const char* key, bool otherwise);

/// `text` with every `pattern`, which is not empty, replaced.
std::string replaced(std::string_view text, std::string_view pattern, std::string_view replacement);

}  // namespace llama_runner
