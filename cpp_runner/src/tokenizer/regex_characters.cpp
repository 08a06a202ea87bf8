#include "tokenizer/regex_characters.h"

#include <algorithm>
#include <vector>

#include "tokenizer/unicode_tables.h"

namespace llama_runner {

namespace {

/// The members of Unicode's White_Space. PCRE2's own \s also has U+180E.
constexpr std::string_view kSpaceMembers =
    R"(\t-\r \x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000})";

constexpr int kMostNesting = 64;

bool is_hex(char c) { return std::string_view("0123456789abcdefABCDEF").find(c) != std::string_view::npos; }

bool is_letter_or_digit(char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }

std::string classes(std::string_view members, bool negated) {
    return (negated ? "[^" : "[") + std::string(members) + "]";
}

/// Reads \xHH, \x{H...} or \uHHHH.
std::optional<std::string> read_code(std::string_view& rest) {
    std::string_view digits;
    size_t length = 0;
    if (rest.starts_with("\\x{")) {
        const size_t end = std::min(rest.find('}'), rest.size());
        digits = rest.substr(3, end - 3);
        length = end + 1;
    } else {
        digits = rest.substr(2, rest[1] == 'x' ? 2 : 4);
        if (digits.size() != (rest[1] == 'x' ? 2u : 4u)) return std::nullopt;
        // In Oniguruma two digits are a byte, which beyond ASCII is no character.
        if (rest[1] == 'x' && digits[0] > '7') return std::nullopt;
        length = 2 + digits.size();
    }
    if (digits.empty() || digits.size() > 6 || length > rest.size()) return std::nullopt;
    if (!std::all_of(digits.begin(), digits.end(), is_hex)) return std::nullopt;
    rest.remove_prefix(length);
    return "\\x{" + std::string(digits) + "}";
}

std::optional<std::string> members_of(std::string_view name) {
    for (const auto& [property, pcre2, added] : kProperties) {
        if (property == name) return std::string(pcre2).append(added);
    }
    return std::nullopt;
}

/// Reads \s, \p{L} and similar, and returns the members; `negated` becomes whether all others are meant.
std::optional<std::string> read_members(std::string_view& rest, bool is_caseless, bool& negated) {
    if (rest.size() < 2 || rest[0] != '\\') return std::nullopt;
    const char name = lower(rest[1]);
    negated = rest[1] != name;
    if (name == 's' || name == 'w' || name == 'd') {
        rest.remove_prefix(2);
        if (name == 's') return std::string(kSpaceMembers);
        return name == 'w' ? word_members() : members_of("Nd");
    }
    if (name != 'p' || rest.size() < 3 || rest[2] != '{') return std::nullopt;
    const size_t end = rest.find('}');
    if (end == std::string_view::npos) return std::nullopt;
    std::string_view property = rest.substr(3, end - 3);
    if (property.starts_with('^')) {
        negated = !negated;
        property.remove_prefix(1);
    }
    const bool has_case = property == "Lu" || property == "Ll" || property == "Lt";
    if (has_case && is_caseless) return std::nullopt;
    auto members = members_of(property);
    if (members) rest.remove_prefix(end + 1);
    return members;
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

std::string combined(const std::vector<Members>& all, bool negated) {
    if (all.size() == 1 && all[0].others.empty()) return classes(all[0].plain, negated);
    std::string result;
    for (size_t i = 0; i + 1 < all.size(); ++i) result += "(?=" + all[i].expression() + ")";
    result += all.back().expression();
    return negated ? "(?:(?!" + result + ")(?s:.))" : "(?:" + result + ")";
}

class ClassReader {
  public:
    ClassReader(std::string_view& rest, bool is_caseless) : rest_(rest), is_caseless_(is_caseless) {}

    /// Reads [...], inside `depth` others.
    std::optional<std::string> read(int depth) {
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
                const auto inner = read(depth + 1);
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

  private:
    bool take(std::string_view token) {
        if (!rest_.starts_with(token)) return false;
        rest_.remove_prefix(token.size());
        return true;
    }

    /// Reads what follows a "-": the end of a range, or the next item if the "-" is literal.
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
        if (const auto found = read_members(rest_, is_caseless_, negated)) {
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
        auto found = read_literal(rest_);
        const bool is_wide = found && (!is_ascii(found->front()) || found->starts_with("\\x"));
        if (is_wide && is_caseless_) return std::nullopt;
        return found;
    }

    std::string_view& rest_;
    bool is_caseless_;
};

}  // namespace

std::optional<std::string> read_literal(std::string_view& rest) {
    if (rest[0] != '\\') {
        const char c = rest[0];
        rest.remove_prefix(1);
        std::string text(1, c);
        while (!rest.empty() && !is_ascii(c) && (static_cast<unsigned char>(rest[0]) & 0xC0) == 0x80) {
            text += rest[0];
            rest.remove_prefix(1);
        }
        const bool is_plain = !is_ascii(c) || is_letter_or_digit(c) || static_cast<unsigned char>(c) <= ' ';
        return is_plain ? text : "\\" + text;
    }
    if (rest.size() < 2 || !is_ascii(rest[1])) return std::nullopt;
    const char c = rest[1];
    if (c == 'x' || c == 'u') return read_code(rest);
    constexpr std::string_view kControls = "nrtf";
    if (is_letter_or_digit(c) && kControls.find(c) == std::string_view::npos && c != 'v') return std::nullopt;
    rest.remove_prefix(2);
    if (c == 'v') return "\\x{0B}";
    return static_cast<unsigned char>(c) <= ' ' ? std::string(1, c) : std::string("\\") + c;
}

std::optional<std::string> read_set(std::string_view& rest, bool is_caseless) {
    bool negated = false;
    const auto members = read_members(rest, is_caseless, negated);
    if (!members) return std::nullopt;
    return classes(*members, negated);
}

std::optional<std::string> read_class(std::string_view& rest, bool is_caseless) {
    return ClassReader(rest, is_caseless).read(0);
}

}  // namespace llama_runner
