#include "llama_runner/tokenizer.h"

namespace llama_runner {

namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

}  // namespace

void Utf8Decoder::add(std::string_view bytes, std::string& text) {
    for (const char c : bytes) {
        const auto byte = static_cast<unsigned char>(c);
        if (missing_ > 0) {
            if (byte >= low_ && byte <= high_) {
                held_[count_++] = c;
                low_ = 0x80, high_ = 0xBF;
                if (--missing_ == 0) text.append(held_, static_cast<size_t>(count_));
                continue;
            }
            finish(text);
        }
        if (byte < 0x80) {
            text += c;
            continue;
        }
        // The second byte's range excludes overlong forms, surrogates and characters above U+10FFFF.
        missing_ = byte < 0xC2 || byte > 0xF4 ? 0 : byte < 0xE0 ? 1 : byte < 0xF0 ? 2 : 3;
        low_ = byte == 0xE0 ? 0xA0 : byte == 0xF0 ? 0x90 : 0x80;
        high_ = byte == 0xED ? 0x9F : byte == 0xF4 ? 0x8F : 0xBF;
        held_[0] = c;
        count_ = 1;
        if (missing_ == 0) text += kReplacement;
    }
}

void Utf8Decoder::finish(std::string& text) {
    if (missing_ > 0) text += kReplacement;
    missing_ = 0;
    low_ = 0x80, high_ = 0xBF;
}

std::string valid_utf8(std::string_view text) {
    std::string found;
    found.reserve(text.size());
    Utf8Decoder utf8;
    utf8.add(text, found);
    utf8.finish(found);
    return found;
}

}  // namespace llama_runner
