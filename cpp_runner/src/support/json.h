#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

namespace llama_runner {

/// Returns a member of a JSON object, or null.
const nlohmann::json& member(const nlohmann::json& json, const char* key);

/// Returns a text member of a JSON object, or an empty text.
std::string text_member(const nlohmann::json& json, const char* key);

/// Returns a boolean member of a JSON object, or `otherwise`.
bool flag_member(const nlohmann::json& json, const char* key, bool otherwise);

}  // namespace llama_runner
