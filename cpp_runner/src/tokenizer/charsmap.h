#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "llama_runner/result.h"

namespace llama_runner {

/// The map of a Precompiled normalizer: a double array of google/sentencepiece (src/normalizer.cc), and the texts to
/// which its values point.
class CharsMap {
  public:
    /// Opens a map in base64 from a tokenizer.json. Fails if it is damaged.
    static Result<CharsMap> open(const std::string& base64);

    /// Normalizes valid UTF-8 like the tokenizers library: a grapheme of at most five bytes whose start is mapped is
    /// replaced as a whole; in other graphemes each character is replaced separately.
    std::string apply(std::string_view text) const;

  private:
    /// Appends the replacement of the shortest mapped start of `part`; returns false if there is none.
    bool append_mapped(std::string_view part, std::string& result) const;

    void append_grapheme(std::string_view grapheme, std::string& result) const;

    std::vector<uint32_t> units_;
    std::string texts_;
};

}  // namespace llama_runner
