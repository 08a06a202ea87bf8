#include "support/json.h"

#include <nlohmann/json.hpp>

namespace llama_runner {

using nlohmann::json;

const json& member(const json& object, const char* key) {
    static const json null;
    const auto found = object.is_object() ? object.find(key) : object.end();
    return found == object.end() ? null : *found;
}

std::string text_member(const json& object, const char* key) {
    const auto& value = member(object, key);
    return value.is_string() ? value.get<std::string>() : "";
}

bool flag_member(const json& object, const char* key, bool otherwise) {
    const auto& value = member(object, key);
    return value.is_boolean() ? value.get<bool>() : otherwise;
}

}  // namespace llama_runner
