#include "tokenizer/regex_pattern.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "tokenizer/unicode_tables.h"

namespace llama_runner {

namespace {

/// The members of Unicode's White_Space. PCRE2's own \s also has U+180E.
constexpr std::string_view kSpaceMembers =
    R"(\t-\r \x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000})";

constexpr int kMostNesting = 64;

/// Pairs of letters that match a single character if case is ignored, such as "ss" and U+00DF.
constexpr std::string_view kFoldedPairs[] = {"ss", "st", "ff", "fi", "fl"};

bool is_hex(char c) { return std::string_view("0123456789abcdefABCDEF").find(c) != std::string_view::npos; }

bool is_letter_or_digit(char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }

bool is_ascii(char c) { return static_cast<unsigned char>(c) < 0x80; }

char lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; }

std::string classes(std::string_view members, bool negated) {
    return (negated ? "[^" : "[") + std::string(members) + "]";
}

/// The contents of a class: members to write between brackets, and expressions for one character each.
struct Members {
    std::string plain;
    std::vector<std::string> others;

    std::string expression() const {
        if (others.empty()) return classes(plain, false);
        std::string result = "(?:";
        if (!plain.empty()) result += classes(plain, false) + "|";
        for (const std::string& other : others) result += other + "|";
        result.back() = ')';
        return result;
    }
};

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
                const auto found = bracket(0);
                return found && add_atom(*found);
            }
            default:
                break;
        }
        if (const auto set = one_of_set()) return add_atom(*set);
        return add_literal();
    }

    bool add_literal() {
        const auto found = literal();
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
        const std::string word = classes(word_members(), false);
        const std::string ahead = "(?=" + word + ")";
        const std::string behind = "(?<=" + word + ")";
        const std::string not_ahead = "(?!" + word + ")";
        const std::string not_behind = "(?<!" + word + ")";
        return negated ? "(?:" + behind + ahead + "|" + not_behind + not_ahead + ")"
                       : "(?:" + behind + not_ahead + "|" + not_behind + ahead + ")";
    }

    /// Translates \s, \p{L} and similar outside of classes.
    std::optional<std::string> one_of_set() {
        bool negated = false;
        const auto members = set(negated);
        if (!members) return std::nullopt;
        return classes(*members, negated);
    }

    /// Returns the members of \s, \p{L} and similar.
    std::optional<std::string> set(bool& negated) {
        if (rest_.size() < 2 || rest_[0] != '\\') return std::nullopt;
        const char name = lower(rest_[1]);
        negated = rest_[1] != name;
        if (name == 's' || name == 'w' || name == 'd') {
            rest_.remove_prefix(2);
            if (name == 's') return std::string(kSpaceMembers);
            return name == 'w' ? word_members() : members_of("Nd");
        }
        if (name != 'p' || rest_.size() < 3 || rest_[2] != '{') return std::nullopt;
        const size_t end = rest_.find('}');
        if (end == std::string_view::npos) return std::nullopt;
        std::string_view property = rest_.substr(3, end - 3);
        if (property.starts_with('^')) {
            negated = !negated;
            property.remove_prefix(1);
        }
        const bool has_case = property == "Lu" || property == "Ll" || property == "Lt";
        if (has_case && group().is_caseless) return std::nullopt;
        auto members = members_of(property);
        if (members) rest_.remove_prefix(end + 1);
        return members;
    }

    static std::optional<std::string> members_of(std::string_view name) {
        for (const auto& [property, pcre2, added] : kProperties) {
            if (property == name) return std::string(pcre2).append(added);
        }
        return std::nullopt;
    }

    /// Returns a literal character, escaped for use inside and outside of classes.
    std::optional<std::string> literal() {
        if (rest_[0] != '\\') {
            const char c = rest_[0];
            rest_.remove_prefix(1);
            std::string text(1, c);
            while (!rest_.empty() && !is_ascii(c) && (static_cast<unsigned char>(rest_[0]) & 0xC0) == 0x80) {
                text += rest_[0];
                rest_.remove_prefix(1);
            }
            const bool is_plain = !is_ascii(c) || is_letter_or_digit(c) || static_cast<unsigned char>(c) <= ' ';
            return is_plain ? text : "\\" + text;
        }
        if (rest_.size() < 2 || !is_ascii(rest_[1])) return std::nullopt;
        const char c = rest_[1];
        if (c == 'x' || c == 'u') return code();
        constexpr std::string_view kControls = "nrtf";
        if (is_letter_or_digit(c) && kControls.find(c) == std::string_view::npos && c != 'v') return std::nullopt;
        rest_.remove_prefix(2);
        if (c == 'v') return "\\x{0B}";
        return static_cast<unsigned char>(c) <= ' ' ? std::string(1, c) : std::string("\\") + c;
    }

    /// Translates \xHH, \x{H...} or \uHHHH.
    std::optional<std::string> code() {
        std::string_view digits;
        size_t length = 0;
        if (rest_.starts_with("\\x{")) {
            const size_t end = std::min(rest_.find('}'), rest_.size());
            digits = rest_.substr(3, end - 3);
            length = end + 1;
        } else {
            digits = rest_.substr(2, rest_[1] == 'x' ? 2 : 4);
            if (digits.size() != (rest_[1] == 'x' ? 2u : 4u)) return std::nullopt;
            // In Oniguruma two digits are a byte, which beyond ASCII is no character.
            if (rest_[1] == 'x' && digits[0] > '7') return std::nullopt;
            length = 2 + digits.size();
        }
        if (digits.empty() || digits.size() > 6 || length > rest_.size()) return std::nullopt;
        if (!std::all_of(digits.begin(), digits.end(), is_hex)) return std::nullopt;
        rest_.remove_prefix(length);
        return "\\x{" + std::string(digits) + "}";
    }

    /// Translates [...] to an expression for one character.
    std::optional<std::string> bracket(int depth) {
        if (depth > kMostNesting || !take("[")) return std::nullopt;
        const bool negated = take("^");
        if (rest_.starts_with(']')) return std::nullopt;
        std::vector<Members> all(1);
        bool may_start_range = false;  // whether the last item was a literal, which may start a range
        bool after_set = false;
        while (!take("]")) {
            if (rest_.empty() || rest_.starts_with("[:")) return std::nullopt;
            Members& members = all.back();
            if (take("&&")) {
                if (members.plain.empty() && members.others.empty()) return std::nullopt;
                if (rest_.starts_with(']') || rest_.starts_with("&")) return std::nullopt;
                all.emplace_back();
                may_start_range = after_set = false;
            } else if (rest_[0] == '[') {
                const auto inner = bracket(depth + 1);
                if (!inner) return std::nullopt;
                members.others.push_back(*inner);
                may_start_range = false, after_set = true;
            } else if (rest_[0] == '-') {
                rest_.remove_prefix(1);
                if (rest_.starts_with(']')) {
                    members.plain += "\\-";
                } else if (!range(members, may_start_range, after_set)) {
                    return std::nullopt;
                }
                may_start_range = false, after_set = true;
            } else if (!member(members, may_start_range)) {
                return std::nullopt;
            } else {
                after_set = !may_start_range;
            }
        }
        return combined(all, negated);
    }

    /// Translates what follows a "-": the end of a range, or the next item if the "-" is literal.
    bool range(Members& members, bool is_range, bool after_set) {
        if (after_set) return false;
        if (!is_range) {
            members.plain += "\\-";
            return true;
        }
        if (rest_.empty() || rest_[0] == '[' || rest_.starts_with("&&")) return false;
        const auto end = class_literal();
        if (!end) return false;
        members.plain += "-" + *end;
        return true;
    }

    bool member(Members& members, bool& is_literal) {
        bool negated = false;
        if (const auto found = set(negated)) {
            negated ? members.others.push_back(classes(*found, true)) : void(members.plain += *found);
            is_literal = false;
            return true;
        }
        const auto found = class_literal();
        if (!found) return false;
        members.plain += *found;
        is_literal = true;
        return true;
    }

    std::optional<std::string> class_literal() {
        auto found = literal();
        const bool is_wide = found && (!is_ascii(found->front()) || found->starts_with("\\x"));
        if (is_wide && group().is_caseless) return std::nullopt;
        return found;
    }

    static std::string combined(const std::vector<Members>& all, bool negated) {
        if (all.size() == 1 && all[0].others.empty()) return classes(all[0].plain, negated);
        std::string result;
        for (size_t i = 0; i + 1 < all.size(); ++i) result += "(?=" + all[i].expression() + ")";
        result += all.back().expression();
        return negated ? "(?:(?!" + result + ")(?s:.))" : "(?:" + result + ")";
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
