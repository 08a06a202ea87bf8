#include "tokenizer/regex_pattern.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "tokenizer/regex_characters.h"
#include "tokenizer/unicode_sets.h"

namespace llama_runner {

namespace {

constexpr int kMostNesting = 64;

/// Pairs of letters that match a single character if case is ignored, such as "ss" and U+00DF.
constexpr std::string_view kFoldedPairs[] = {"ss", "st", "ff", "fi", "fl"};

class Translator {
  public:
    explicit Translator(std::string_view pattern) : whole_(pattern), rest_(pattern) {}

    Result<std::string> translate() {
        groups_.push_back({0, false, 0, false, true});
        while (!rest_.empty()) {
            const std::string_view here = rest_;
            if (!next() || groups_.size() > kMostNesting) {
                return Error{"its pattern has '" + std::string(here.substr(0, 12)) +
                             "', which this runner does not support"};
            }
        }
        if (groups_.size() != 1) return Error{"its pattern '" + std::string(whole_) + "' has an unclosed group"};
        result_.append(groups_.back().closers, ')');
        return std::move(result_);
    }

  private:
    struct Group {
        size_t start;
        bool is_caseless;
        size_t closers;
        bool is_lookbehind;
        bool may_repeat;
    };

    bool take(std::string_view token) {
        if (!rest_.starts_with(token)) return false;
        rest_.remove_prefix(token.size());
        return true;
    }

    Group& group() { return groups_.back(); }

    /// Appends an expression that a quantifier may repeat.
    bool add_atom(std::string_view expression) {
        atom_ = result_.size();
        result_ += expression;
        literal_ = 0;
        return true;
    }

    bool add_anchor(std::string_view expression) {
        result_ += expression;
        atom_.reset();
        literal_ = 0;
        return true;
    }

    bool next() {
        if (take("^")) return add_anchor("^");
        if (take("$")) return add_anchor("$");
        if (take(".")) return add_atom(R"([^\n])");
        if (take("|")) return add_anchor("|");
        if (take("\\b")) return add_anchor(boundary(false));
        if (take("\\B")) return add_anchor(boundary(true));
        if (take("\\A")) return add_anchor("\\A");
        if (take("\\z")) return add_anchor("\\z");
        if (take(")")) return close();
        switch (rest_[0]) {
            case '(':
                return open();
            case '*':
            case '+':
            case '?':
                return repeat();
            case '{':
                return repeat();
            case '[': {
                const auto found = read_class(rest_, group().is_caseless);
                return found && add_atom(*found);
            }
            default:
                break;
        }
        if (const auto set = read_set(rest_, group().is_caseless)) return add_atom(*set);
        return add_literal();
    }

    bool add_literal() {
        const auto found = read_literal(rest_);
        if (!found) return false;
        if (!group().is_caseless) return add_atom(*found);
        const char c = lower(found->back());
        const bool is_letter = c >= 'a' && c <= 'z' && found->size() == 1;
        if (!is_letter && (!is_ascii(found->front()) || found->starts_with("\\x"))) return false;
        const std::string pair{literal_, c};
        if (std::find(std::begin(kFoldedPairs), std::end(kFoldedPairs), pair) != std::end(kFoldedPairs)) return false;
        add_atom(*found);
        literal_ = is_letter ? c : '\0';
        return true;
    }

    bool open() {
        const bool in_lookbehind = group().is_lookbehind;
        const bool is_caseless = group().is_caseless;
        if (in_lookbehind) return false;
        if (take("(?i)")) {  // applies until the end of the group, including later alternatives
            group().is_caseless = true;
            ++group().closers;
            return add_anchor("(?i:");
        }
        struct Opener {
            std::string_view text;
            bool is_lookbehind;
            bool may_repeat;
            bool sets_caseless;
        };
        constexpr Opener kOpeners[] = {{"(?:", false, true, false},  {"(?i:", false, true, true},
                                       {"(?>", false, true, false},  {"(?=", false, false, false},
                                       {"(?!", false, false, false}, {"(?<=", true, false, false},
                                       {"(?<!", true, false, false}};
        for (const auto& [text, is_lookbehind, may_repeat, sets_caseless] : kOpeners) {
            if (!take(text)) continue;
            groups_.push_back({result_.size(), is_caseless || sets_caseless, 0, is_lookbehind, may_repeat});
            return add_anchor(text);
        }
        if (rest_.starts_with("(?") || !take("(")) return false;
        groups_.push_back({result_.size(), is_caseless, 0, false, true});
        return add_anchor("(?:");
    }

    bool close() {
        if (groups_.size() == 1) return false;
        const Group ended = group();
        groups_.pop_back();
        result_.append(ended.closers + 1, ')');
        literal_ = 0;
        ended.may_repeat ? void(atom_ = ended.start) : atom_.reset();
        return true;
    }

    /// Translates a quantifier, or a brace that begins none and is literal.
    bool repeat() {
        std::string quantifier(1, rest_[0]);
        bool is_interval = rest_[0] == '{';
        bool is_fixed = false;
        size_t length = 1;
        if (is_interval) {
            const size_t end = rest_.find('}');
            const std::string_view inside = end == std::string_view::npos ? "" : rest_.substr(1, end - 1);
            const auto found = interval(inside);
            if (!found) return take("{") && add_atom("\\{");
            quantifier = *found;
            is_fixed = inside.find(',') == std::string_view::npos;
            length = end + 1;
        }
        if (!atom_ || group().is_lookbehind) return false;
        rest_.remove_prefix(length);
        result_ += quantifier;
        if (rest_.starts_with('?')) {
            if (is_fixed) return false;  // {3}? is lazy in PCRE2, and optional in Oniguruma
            copy(1);
        } else if (rest_.starts_with('+')) {
            if (is_interval) {  // a repetition in Oniguruma, possessive in PCRE2
                result_.insert(*atom_, "(?:");
                result_ += ')';
            }
            copy(1);
        }
        atom_.reset();
        literal_ = 0;
        return true;
    }

    static std::optional<std::string> interval(std::string_view inside) {
        const size_t comma = std::min(inside.find(','), inside.size());
        const std::string_view least = inside.substr(0, comma);
        const std::string_view most = comma < inside.size() ? inside.substr(comma + 1) : least;
        const auto is_number = [](std::string_view text) {
            return text.size() <= 4 && text.find_first_not_of("0123456789") == std::string_view::npos;
        };
        if (!is_number(least) || !is_number(most) || (least.empty() && most.empty())) return std::nullopt;
        const std::string from = least.empty() ? "0" : std::string(least);
        return comma < inside.size() ? "{" + from + "," + std::string(most) + "}" : "{" + from + "}";
    }

    static std::string boundary(bool negated) {
        const std::string word = "[" + word_members() + "]";
        const std::string ahead = "(?=" + word + ")";
        const std::string behind = "(?<=" + word + ")";
        const std::string not_ahead = "(?!" + word + ")";
        const std::string not_behind = "(?<!" + word + ")";
        return negated ? "(?:" + behind + ahead + "|" + not_behind + not_ahead + ")"
                       : "(?:" + behind + not_ahead + "|" + not_behind + ahead + ")";
    }

    void copy(size_t count) {
        result_ += rest_.substr(0, count);
        rest_.remove_prefix(count);
    }

    std::string_view whole_;
    std::string_view rest_;
    std::string result_;
    std::vector<Group> groups_;
    std::optional<size_t> atom_;  // start of the expression that a quantifier would repeat
    char literal_ = '\0';         // the previous letter, if case is ignored
};

}  // namespace

Result<std::string> pcre2_pattern(std::string_view pattern) { return Translator(pattern).translate(); }

}  // namespace llama_runner
