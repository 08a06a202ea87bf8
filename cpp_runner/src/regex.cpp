#define PCRE2_CODE_UNIT_WIDTH 8
#include "regex.h"

#include <pcre2.h>

#include <array>

namespace llama_runner {

namespace {

/// Unicode's White_Space. PCRE2's own \s has U+180E too.
constexpr std::string_view kSpaces =
    R"(\t-\r \x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000})";

/// Letters and numbers that Unicode 15 and 16 added to the 14 of PCRE2 10.42.
constexpr std::string_view kNewLetters =
    R"(\x{1C89}-\x{1C8A}\x{A7CB}-\x{A7CD}\x{A7DA}-\x{A7DC}\x{105C0}-\x{105F3}\x{10D4A}-\x{10D65})"
    R"(\x{10D6F}-\x{10D85}\x{10EC2}-\x{10EC4}\x{1123F}-\x{11240}\x{11380}-\x{11389}\x{1138B}\x{1138E})"
    R"(\x{11390}-\x{113B5}\x{113B7}\x{113D1}\x{113D3}\x{11BC0}-\x{11BE0}\x{11F02}\x{11F04}-\x{11F10})"
    R"(\x{11F12}-\x{11F33}\x{1342F}\x{13441}-\x{13446}\x{13460}-\x{143FA}\x{16100}-\x{1611D}\x{16D40}-\x{16D6C})"
    R"(\x{18CFF}\x{1B132}\x{1B155}\x{1DF25}-\x{1DF2A}\x{1E030}-\x{1E06D}\x{1E4D0}-\x{1E4EB}\x{1E5D0}-\x{1E5ED})"
    R"(\x{1E5F0}\x{2B739}\x{2EBF0}-\x{2EE5D}\x{31350}-\x{323AF})";

constexpr std::string_view kNewNumbers =
    R"(\x{10D40}-\x{10D49}\x{116D0}-\x{116E3}\x{11BF0}-\x{11BF9}\x{11F50}-\x{11F59}\x{16130}-\x{16139})"
    R"(\x{16D70}-\x{16D79}\x{1CCF0}-\x{1CCF9}\x{1D2C0}-\x{1D2D3}\x{1E4F0}-\x{1E4F9}\x{1E5F1}-\x{1E5FA})";
constexpr size_t kJitStackStart = 32 * 1024;
constexpr size_t kJitStackMost = 4 * 1024 * 1024;

/// Rewrites a pattern so that PCRE2 reads it as the tokenizers' engines do, and refuses what the two might read
/// differently.
class Translator {
  public:
    explicit Translator(std::string_view pattern) : rest_(pattern) {}

    Result<std::string> translate() {
        while (!rest_.empty()) {
            const bool known = take("\\s")      ? add(kSpaces)
                               : take("\\p{L}") ? add("\\p{L}", kNewLetters)
                               : take("\\p{N}") ? add("\\p{N}", kNewNumbers)
                               : take("\\S")    ? add_outside("[^", kSpaces)
                                                : plain();
            if (!known)
                return Error{"its pattern has '" + std::string(rest_.substr(0, 12)) +
                             "', which this runner does not know"};
        }
        return std::move(result_);
    }

  private:
    bool take(std::string_view token) {
        if (!rest_.starts_with(token)) return false;
        rest_.remove_prefix(token.size());
        return true;
    }

    bool add(std::string_view members, std::string_view more = {}) {
        if (!in_class_) result_ += '[';
        result_.append(members).append(more);
        if (!in_class_) result_ += ']';
        return true;
    }

    bool add_outside(std::string_view open, std::string_view members) {
        if (in_class_) return false;
        result_.append(open).append(members) += ']';
        return true;
    }

    bool plain() {
        const char c = rest_[0];
        if (c == '\\') {
            constexpr std::string_view kKnown = "rnt.[](){}|*+?^$-/'\"\\";
            if (rest_.size() < 2 || kKnown.find(rest_[1]) == std::string_view::npos) return false;
            return copy(2);
        }
        if (in_class_) {
            if (c == '[' || c == '&') return false;
            in_class_ = c != ']';
            return copy(1);
        }
        if (c == '[') {
            in_class_ = true;
            return copy(rest_.starts_with("[^") ? 2 : 1);
        }
        if (c == '(' && rest_.starts_with("(?")) {
            for (const std::string_view group : {"(?:", "(?i:", "(?=", "(?!"}) {
                if (rest_.starts_with(group)) return copy(group.size());
            }
            return false;
        }
        constexpr std::string_view kOperators = ".^$";  // engines differ in what a line is
        return kOperators.find(c) == std::string_view::npos && copy(1);
    }

    bool copy(size_t count) {
        result_ += rest_.substr(0, count);
        rest_.remove_prefix(count);
        return true;
    }

    std::string_view rest_;
    std::string result_;
    bool in_class_ = false;
};

}  // namespace

struct Regex::Code {
    pcre2_code* pattern;
};

void Regex::Delete::operator()(Code* code) const {
    pcre2_code_free(code->pattern);
    delete code;
}

Result<Regex> Regex::compile(std::string_view pattern) {
    const auto translated = Translator(pattern).translate();
    if (!translated) return translated.error();
    int number = 0;
    size_t offset = 0;
    // Only valid UTF-8 comes in, so that PCRE2 need not check it at every match.
    pcre2_code* const compiled = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated->data()), translated->size(),
                                               PCRE2_UTF | PCRE2_UCP | PCRE2_NO_UTF_CHECK, &number, &offset, nullptr);
    if (compiled == nullptr) {
        std::array<PCRE2_UCHAR, 128> message{};
        pcre2_get_error_message(number, message.data(), message.size());
        return Error{"its pattern is wrong (" + std::string(reinterpret_cast<const char*>(message.data())) + ")"};
    }
    Regex regex;
    regex.code_.reset(new Code{compiled});
    pcre2_jit_compile(compiled, PCRE2_JIT_COMPLETE);  // where it cannot, matching is only slower
    return regex;
}

Result<std::vector<Regex::Match>> Regex::find_all(std::string_view text) const {
    const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> data(pcre2_match_data_create(1, nullptr),
                                                                                   pcre2_match_data_free);
    const std::unique_ptr<pcre2_match_context, decltype(&pcre2_match_context_free)> context(
        pcre2_match_context_create(nullptr), pcre2_match_context_free);
    const std::unique_ptr<pcre2_jit_stack, decltype(&pcre2_jit_stack_free)> stack(
        pcre2_jit_stack_create(kJitStackStart, kJitStackMost, nullptr), pcre2_jit_stack_free);
    if (!data || !context) return Error{"there is not enough memory to split the text"};
    pcre2_jit_stack_assign(context.get(), nullptr, stack.get());

    std::vector<Match> matches;
    const auto try_match = [&](size_t from, uint32_t options) {
        return pcre2_match(code_->pattern, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                           options | PCRE2_NO_UTF_CHECK | PCRE2_NOTEMPTY, data.get(), context.get());
    };
    for (size_t from = 0; from < text.size();) {
        int found = try_match(from, 0);
        if (found == PCRE2_ERROR_JIT_STACKLIMIT) found = try_match(from, PCRE2_NO_JIT);
        if (found == PCRE2_ERROR_NOMATCH) break;
        if (found < 0) return Error{"the text is too long to split; give it in parts"};
        const size_t* const ends = pcre2_get_ovector_pointer(data.get());
        matches.push_back({ends[0], ends[1]});
        from = ends[1];
    }
    return matches;
}

}  // namespace llama_runner
