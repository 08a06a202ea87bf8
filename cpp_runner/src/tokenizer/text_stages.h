#pragma once

#include <functional>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "llama_runner/result.h"
#include "tokenizer/regex.h"

namespace llama_runner {

/// A part of a text that a tokenizer.json's stages process.
struct Section {
    std::string text;
    /// Number of bytes at its start that come from the first character of the whole text; 0 if it does not begin the
    /// text.
    size_t opening;

    /// Returns the section's bytes `from` to `to`.
    Section part(size_t from, size_t to) const;
};

/// A function that changes a section; fails if a library that it uses fails.
using Normalizer = std::function<Result<void>(Section& section)>;

/// A function that splits a section and appends its non-empty parts to `parts`.
using PreTokenizer = std::function<Result<void>(Section section, std::vector<Section>& parts)>;

/// Returns the error for a tokenizer.json with a feature that is not implemented.
Error unknown_part(const std::string& what);

/// Returns the stages of a tokenizer.json's "normalizer", in order. Fails if one is unknown.
Result<std::vector<Normalizer>> normalizers_from(const nlohmann::json& json);

/// Returns the stages of a tokenizer.json's "pre_tokenizer", in order. Fails if one is unknown.
Result<std::vector<PreTokenizer>> pre_tokenizers_from(const nlohmann::json& json);

/// Returns the members of a Sequence, including nested ones; a single stage itself; or nothing for null.
std::vector<nlohmann::json> stages_of(const nlohmann::json& stage, const char* list);

/// Reads the pattern of a Split or Replace: a regular expression or a literal text.
Result<std::shared_ptr<const Regex>> pattern_from(const nlohmann::json& pattern);

/// Returns GPT-2's printable character for each byte, in UTF-8 (openai/gpt-2, src/encoder.py, bytes_to_unicode).
const std::vector<std::string>& byte_level_alphabet();

/// Returns a text with each byte replaced by GPT-2's printable character.
std::string byte_level(std::string_view text);

/// Returns `text` with every occurrence of `pattern`, which must not be empty, replaced.
std::string replaced(std::string_view text, std::string_view pattern, std::string_view replacement);

}  // namespace llama_runner
