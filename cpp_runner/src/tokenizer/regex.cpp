#define PCRE2_CODE_UNIT_WIDTH 8
#include "tokenizer/regex.h"

#include <pcre2.h>

#include <array>
#include <optional>

#include "tokenizer/regex_pattern.h"
#include "tokenizer/unicode_sets.h"

namespace llama_runner {

namespace {

constexpr size_t kJitStackStart = 32 * 1024;
constexpr size_t kJitStackMost = 4 * 1024 * 1024;

}  // namespace

struct Regex::Code {
    pcre2_code* pattern;
};

void Regex::Delete::operator()(Code* code) const {
    pcre2_code_free(code->pattern);
    delete code;
}

Result<Regex> Regex::compile(std::string_view pattern) {
    const auto translated = pcre2_pattern(pattern);
    if (!translated) return translated.error();
    return compile_as(*translated, PCRE2_UCP | PCRE2_MULTILINE);
}

Result<Regex> Regex::literal(std::string_view text) { return compile_as(text, PCRE2_LITERAL); }

Result<Regex> Regex::compile_as(std::string_view pattern, uint32_t options) {
    const std::unique_ptr<pcre2_compile_context, decltype(&pcre2_compile_context_free)> context(
        pcre2_compile_context_create(nullptr), pcre2_compile_context_free);
    if (!context) return Error{"there is not enough memory for its pattern"};
    pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
    int number = 0;
    size_t offset = 0;
    // The text is always valid UTF-8, so PCRE2 need not check it at every match.
    pcre2_code* const compiled =
        pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                      options | PCRE2_UTF | PCRE2_NO_UTF_CHECK, &number, &offset, context.get());
    if (compiled == nullptr) {
        std::array<PCRE2_UCHAR, 128> message{};
        pcre2_get_error_message(number, message.data(), message.size());
        return Error{"its pattern is invalid (" + std::string(reinterpret_cast<const char*>(message.data())) + ")"};
    }
    Regex regex;
    regex.code_.reset(new Code{compiled});
    pcre2_jit_compile(compiled, PCRE2_JIT_COMPLETE);  // a failure only makes matching slower
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
                           options | PCRE2_NO_UTF_CHECK, data.get(), context.get());
    };
    for (size_t from = 0; from <= text.size() && !text.empty();) {
        int found = try_match(from, 0);
        if (found == PCRE2_ERROR_JIT_STACKLIMIT) found = try_match(from, PCRE2_NO_JIT);
        if (found == PCRE2_ERROR_NOMATCH) break;
        if (found < 0) return Error{"the text is too long to split; give it in parts"};
        const size_t* const ends = pcre2_get_ovector_pointer(data.get());
        const bool repeats = ends[0] == ends[1] && !matches.empty() && matches.back().end == ends[1];
        if (!repeats) matches.push_back({ends[0], ends[1]});
        from = !repeats ? ends[1] : from < text.size() ? from + character_at(text, from).length : from + 1;
    }
    return matches;
}

}  // namespace llama_runner
