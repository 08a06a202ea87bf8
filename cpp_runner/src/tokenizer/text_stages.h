#pragma once

#include <functional>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "llama_runner/result.h"
#include "tokenizer/regex.h"

namespace llama_runner {

/// A part of a text on its way through a tokenizer.json's stages.
struct Section {
    std::string text;
    /// Bytes at its front that came of the whole text's first character; where there are any, it opens the text.
    size_t opening;

    /// Bytes `from` to `to` of it.
    Section part(size_t from, size_t to) const;
};

/// Changes a section; fails where a library below does.
using Normalizer = std::function<Result<void>(Section& section)>;

/// Splits a section and appends the parts to `parts`, of which none is empty.
using PreTokenizer = std::function<Result<void>(Section section, std::vector<Section>& parts)>;

/// The refusal of a tokenizer.json that asks for what is not implemented.
Error unknown_part(const std::string& what);

/// The stages of a tokenizer.json's "normalizer", in order. Fails where one is unknown.
Result<std::vector<Normalizer>> normalizers_from(const nlohmann::json& json);

/// The stages of a tokenizer.json's "pre_tokenizer", in order. Fails where one is unknown.
Result<std::vector<PreTokenizer>> pre_tokenizers_from(const nlohmann::json& json);

/// The members of a Sequence, also of those inside it, the one stage itself, or nothing for null.
std::vector<nlohmann::json> stages_of(const nlohmann::json& stage, const char* list);

/// A pattern of a Split or Replace: a regex, or a text that stands for itself.
Result<std::shared_ptr<const Regex>> pattern_from(const nlohmann::json& pattern);

/// GPT-2's printable character for every byte, in UTF-8 (openai/gpt-2, src/encoder.py, bytes_to_unicode).
const std::vector<std::string>& byte_level_alphabet();

/// A text with every byte as GPT-2's printable character.
std::string byte_level(std::string_view text);

/// `text` with every `pattern`, which is not empty, replaced.
std::string replaced(std::string_view text, std::string_view pattern, std::string_view replacement);

}  // namespace llama_runner
