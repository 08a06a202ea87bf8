#include <algorithm>
#include <nlohmann/json.hpp>

#include "support/json.h"
#include "tokenizer/text_stages.h"
#include "tokenizer/unicode_sets.h"

namespace llama_runner {

namespace {

using nlohmann::json;

/// The pattern of the tokenizers library's ByteLevel, which splits like GPT-2 (openai/gpt-2, src/encoder.py).
constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

/// A part of a text that matches a pattern, or that is between two matches.
struct Span {
    size_t start;
    size_t end;
    bool is_match;
};

/// Consecutive spans that cover a text.
using Spans = std::vector<Span>;

/// A function that splits a text into spans.
using Finder = std::function<Result<Spans>(std::string_view text)>;

/// The treatment of a match, with the names of the tokenizers library.
enum class Behavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };

Result<Behavior> behavior_from(const json& stage) {
    const std::string name = text_member(stage, "behavior");
    if (name == "Removed") return Behavior::kRemoved;
    if (name == "Isolated") return Behavior::kIsolated;
    if (name == "MergedWithPrevious") return Behavior::kMergedWithPrevious;
    if (name == "MergedWithNext") return Behavior::kMergedWithNext;
    if (name == "Contiguous") return Behavior::kContiguous;
    return unknown_part("a pre_tokenizer " + stage.dump());
}

Finder matches_of(std::shared_ptr<const Regex> pattern, bool invert) {
    return [pattern, invert](std::string_view text) -> Result<Spans> {
        const auto matches = pattern->find_all(text);
        if (!matches) return matches.error();
        Spans spans;
        size_t done = 0;
        for (const auto& [start, end] : *matches) {
            if (start > done) spans.push_back({done, start, invert});
            spans.push_back({start, end, !invert});
            done = end;
        }
        if (done < text.size()) spans.push_back({done, text.size(), invert});
        return spans;
    };
}

/// Returns a finder for which every character of a set is a match.
Finder characters(bool (*is_match)(int32_t)) {
    return [is_match](std::string_view text) -> Result<Spans> {
        Spans spans;
        size_t done = 0;
        for (size_t at = 0; at < text.size();) {
            const auto [code, length] = character_at(text, at);
            if (is_match(code)) {
                if (at > done) spans.push_back({done, at, false});
                spans.push_back({at, at + length, true});
                done = at + length;
            }
            at += length;
        }
        if (done < text.size()) spans.push_back({done, text.size(), false});
        return spans;
    };
}

/// Splits a text so that white space is a match; words, and runs of other characters, are between the matches.
Result<Spans> around_words(std::string_view text) {
    enum class Kind { kNone, kWord, kOther };
    Spans spans;
    Kind last = Kind::kNone;
    for (size_t at = 0; at < text.size();) {
        const auto [code, length] = character_at(text, at);
        const Kind kind = is_word_character(code) ? Kind::kWord : is_white_space(code) ? Kind::kNone : Kind::kOther;
        if (kind == last && !spans.empty()) {
            spans.back().end = at + length;
        } else {
            spans.push_back({at, at + length, kind == Kind::kNone});
        }
        last = kind;
        at += length;
    }
    return spans;
}

/// Joins each match to the span before it, unless that is a match.
Spans merged_with_previous(const Spans& spans) {
    Spans merged;
    bool after_match = false;
    for (const Span& span : spans) {
        if (span.is_match && !after_match && !merged.empty()) {
            merged.back().end = span.end;
        } else {
            merged.push_back(span);
        }
        after_match = span.is_match;
    }
    return merged;
}

/// Joins each match to the span after it, unless that is a match.
Spans merged_with_next(const Spans& spans) {
    Spans merged;
    bool before_match = false;
    for (size_t i = spans.size(); i-- > 0;) {
        if (spans[i].is_match && !before_match && !merged.empty()) {
            merged.back().start = spans[i].start;
        } else {
            merged.push_back(spans[i]);
        }
        before_match = spans[i].is_match;
    }
    std::reverse(merged.begin(), merged.end());
    return merged;
}

/// Joins neighbouring matches, and neighbouring spans that are no matches.
Spans contiguous(const Spans& spans) {
    Spans joined;
    bool after_match = false;
    for (const Span& span : spans) {
        if (span.is_match == after_match && !joined.empty()) {
            joined.back().end = span.end;
        } else {
            joined.push_back(span);
        }
        after_match = span.is_match;
    }
    return joined;
}

Spans kept(Spans spans, Behavior behavior) {
    switch (behavior) {
        case Behavior::kRemoved:
            std::erase_if(spans, [](const Span& span) { return span.is_match; });
            return spans;
        case Behavior::kIsolated:
            return spans;
        case Behavior::kMergedWithPrevious:
            return merged_with_previous(spans);
        case Behavior::kMergedWithNext:
            return merged_with_next(spans);
        case Behavior::kContiguous:
            return contiguous(spans);
    }
    return spans;
}

Result<void> append_split(const Section& section, const Finder& find, Behavior behavior, std::vector<Section>& parts) {
    auto spans = find(section.text);
    if (!spans) return spans.error();
    for (const auto& [start, end, is_match] : kept(*std::move(spans), behavior)) {
        if (end > start) parts.push_back(section.part(start, end));
    }
    return {};
}

PreTokenizer split_at(Finder find, Behavior behavior) {
    return [find = std::move(find), behavior](Section section, std::vector<Section>& parts) {
        return append_split(section, find, behavior, parts);
    };
}

Result<PreTokenizer> split_from(const json& stage) {
    auto pattern = pattern_from(member(stage, "pattern"));
    if (!pattern) return unknown_part("a pre_tokenizer: " + pattern.error().message);
    const auto behavior = behavior_from(stage);
    if (!behavior) return behavior.error();
    return split_at(matches_of(*std::move(pattern), flag_member(stage, "invert", false)), *behavior);
}

/// Returns the stage ByteLevel: an optional space before the text, GPT-2's pattern, then GPT-2's characters for bytes.
Result<PreTokenizer> byte_level_from(const json& stage) {
    const bool adds_space = flag_member(stage, "add_prefix_space", true);
    const bool splits = flag_member(stage, "use_regex", true);
    auto pattern = Regex::compile(kGpt2Pattern);
    if (!pattern) return pattern.error();
    const Finder find = matches_of(std::make_shared<const Regex>(*std::move(pattern)), false);
    return PreTokenizer([=](Section section, std::vector<Section>& parts) -> Result<void> {
        if (adds_space && !section.text.starts_with(' ')) {
            section.text.insert(0, " ");
            if (section.opening > 0) ++section.opening;
        }
        const size_t before = parts.size();
        if (!splits) {
            parts.push_back(std::move(section));
        } else if (auto split = append_split(section, find, Behavior::kIsolated, parts); !split) {
            return split;
        }
        for (size_t i = before; i < parts.size(); ++i) {
            parts[i].opening = byte_level(std::string_view(parts[i].text).substr(0, parts[i].opening)).size();
            parts[i].text = byte_level(parts[i].text);
        }
        return {};
    });
}

Result<PreTokenizer> metaspace_from(const json& stage) {
    const std::string mark = text_member(stage, "replacement");
    const std::string given = text_member(stage, "prepend_scheme");
    const std::string scheme = !flag_member(stage, "add_prefix_space", true) ? "never"
                               : given.empty()                               ? "always"
                                                                             : given;
    if (mark.empty() || (scheme != "always" && scheme != "first" && scheme != "never")) {
        return unknown_part("a pre_tokenizer " + stage.dump());
    }
    auto literal = Regex::literal(mark);
    if (!literal) return literal.error();
    const Finder find = matches_of(std::make_shared<const Regex>(*std::move(literal)), false);
    const bool splits = flag_member(stage, "split", true);
    return PreTokenizer([=](Section section, std::vector<Section>& parts) -> Result<void> {
        section.opening = replaced(section.text.substr(0, section.opening), " ", mark).size();
        section.text = replaced(section.text, " ", mark);
        const bool wanted = scheme == "always" || (scheme == "first" && section.opening > 0);
        if (wanted && !section.text.starts_with(mark)) {
            section.text.insert(0, mark);
            if (section.opening > 0) section.opening += mark.size();
        }
        if (splits) return append_split(section, find, Behavior::kMergedWithNext, parts);
        parts.push_back(std::move(section));
        return {};
    });
}

/// Returns a stage that splits into parts of a fixed number of characters.
Result<PreTokenizer> fixed_length_from(const json& stage) {
    const json& given = member(stage, "length");
    const uint64_t count = given.is_number_unsigned() ? given.get<uint64_t>() : 5;
    if (count == 0) return unknown_part("a pre_tokenizer " + stage.dump());
    return PreTokenizer([count](Section section, std::vector<Section>& parts) -> Result<void> {
        for (size_t from = 0; from < section.text.size();) {
            size_t to = from;
            for (uint64_t i = 0; i < count && to < section.text.size(); ++i) {
                to += character_at(section.text, to).length;
            }
            parts.push_back(section.part(from, to));
            from = to;
        }
        return {};
    });
}

Result<PreTokenizer> delimiter_from(const json& stage) {
    auto literal = Regex::literal(text_member(stage, "delimiter"));
    if (!literal) return literal.error();
    return split_at(matches_of(std::make_shared<const Regex>(*std::move(literal)), false), Behavior::kRemoved);
}

Result<PreTokenizer> punctuation_from(const json& stage) {
    const bool is_given = !member(stage, "behavior").is_null();
    const auto behavior = is_given ? behavior_from(stage) : Result<Behavior>(Behavior::kIsolated);
    if (!behavior) return behavior.error();
    return split_at(characters(is_punctuation), *behavior);
}

Result<PreTokenizer> digits_from(const json& stage) {
    const bool singly = flag_member(stage, "individual_digits", false);
    return split_at(characters(is_number), singly ? Behavior::kIsolated : Behavior::kContiguous);
}

Result<PreTokenizer> pre_tokenizer_from(const json& stage) {
    const std::string type = text_member(stage, "type");
    if (type == "Split") return split_from(stage);
    if (type == "ByteLevel") return byte_level_from(stage);
    if (type == "Metaspace") return metaspace_from(stage);
    if (type == "Punctuation") return punctuation_from(stage);
    if (type == "Digits") return digits_from(stage);
    if (type == "Whitespace") return split_at(around_words, Behavior::kRemoved);
    if (type == "WhitespaceSplit") return split_at(characters(is_white_space), Behavior::kRemoved);
    if (type == "CharDelimiterSplit") return delimiter_from(stage);
    if (type == "FixedLength") return fixed_length_from(stage);
    return unknown_part("a pre_tokenizer " + stage.dump());
}

}  // namespace

Result<std::vector<PreTokenizer>> pre_tokenizers_from(const json& json) {
    std::vector<PreTokenizer> stages;
    for (const auto& stage : stages_of(json, "pretokenizers")) {
        if (text_member(stage, "type") == "BertPreTokenizer") {
            stages.push_back(split_at(characters(is_white_space), Behavior::kRemoved));
            stages.push_back(split_at(characters(is_punctuation), Behavior::kIsolated));
            continue;
        }
        auto made = pre_tokenizer_from(stage);
        if (!made) return made.error();
        stages.push_back(*std::move(made));
    }
    return stages;
}

}  // namespace llama_runner
