#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "llama_runner/result.h"

namespace llama_runner {

/// The map of a Precompiled normalizer: a double array of google/sentencepiece (src/normalizer.cc), and the texts its
/// values point to.
class CharsMap {
  public:
    /// Opens the map in base64 that a tokenizer.json has. Fails where it is damaged.
    static Result<CharsMap> open(const std::string& base64);

    /// Normalizes valid UTF-8 as tokenizers does: a grapheme of up to five bytes that starts with something mapped
    /// turns into that alone; of others, each character by itself.
    std::string apply(std::string_view text) const;

  private:
    /// Appends what the shortest mapped start of `part` turns into; false where none is.
    bool append_mapped(std::string_view part, std::string& result) const;

    void append_grapheme(std::string_view grapheme, std::string& result) const;

    std::vector<uint32_t> units_;
    std::string texts_;
};

}  // namespace llama_runner
