#include "special_text.h"

#include <algorithm>

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

Result<void> SpecialText::cut(std::string_view text, const std::function<Result<void>(std::string_view)>& plain,
                              const std::function<void(size_t)>& special) const {
    for (size_t from = 0; from < text.size();) {
        const auto [start, length, index] = find(text, from);
        if (start > from) {
            if (auto done = plain(text.substr(from, start - from)); !done) return done;
        }
        if (index < size()) special(index);
        from = start + length;
    }
    return {};
}

}  // namespace llama_runner
