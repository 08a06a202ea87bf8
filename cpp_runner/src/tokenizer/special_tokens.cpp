#include "tokenizer/special_tokens.h"

#include <algorithm>

#include "tokenizer/whitespace.h"

namespace llama_runner {

void SpecialText::add(std::string text) {
    auto& same_start = by_first_byte_[static_cast<unsigned char>(text.empty() ? 0 : text[0])];
    const size_t index = texts_.size();
    const size_t length = text.size();
    texts_.push_back(std::move(text));
    if (length == 0) return;
    const auto place =
        std::find_if(same_start.begin(), same_start.end(), [&](size_t other) { return texts_[other].size() < length; });
    same_start.insert(place, index);
}

SpecialText::Match SpecialText::find(std::string_view text, size_t from) const {
    for (size_t start = from; start < text.size(); ++start) {
        for (const size_t index : by_first_byte_[static_cast<unsigned char>(text[start])]) {
            if (text.substr(start).starts_with(texts_[index])) return {start, texts_[index].size(), index};
        }
    }
    return {text.size(), 0, size()};
}

void SpecialTokens::add(std::string text, Special special) {
    ids_.emplace(text, special.id);
    texts_.add(std::move(text));
    specials_.push_back(special);
}

Result<void> SpecialTokens::encode(std::span<const Part> parts, std::vector<int64_t>& ids,
                                   const std::function<Result<void>(std::string_view, bool)>& encode_section) const {
    std::string whole;
    for (const Part& part : parts) whole += part.text;
    const std::string_view text = whole;
    size_t done = 0;
    size_t end = 0;
    for (size_t i = 0; i < parts.size();) {
        const bool parse_special = parts[i].parse_special;
        size_t from = end;
        for (; i < parts.size() && parts[i].parse_special == parse_special; ++i) end += parts[i].text.size();
        while (parse_special && from < end) {
            const auto match = texts_.find(text.substr(0, end), from);
            from = match.start + match.length;
            if (match.index == texts_.size() || match.start < done) continue;
            const Special& special = specials_[match.index];
            const size_t spaces = special.strips_left ? spaces_before(text.substr(done, match.start - done)) : 0;
            if (match.start - spaces > done) {
                auto encoded = encode_section(text.substr(done, match.start - spaces - done), done == 0);
                if (!encoded) return encoded;
            }
            ids.push_back(special.id);
            done = from + (special.strips_right ? spaces_after(text.substr(from)) : 0);
        }
    }
    return done < text.size() ? encode_section(text.substr(done), done == 0) : Result<void>();
}

}  // namespace llama_runner
