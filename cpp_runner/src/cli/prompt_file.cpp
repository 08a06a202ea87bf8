#include "cli/prompt_file.h"

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "support/checksum.h"

namespace llama_runner {

namespace {

constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";

}  // namespace

Result<std::string> read_prompt(const std::string& path) {
    const File opened(path == "-" ? nullptr : std::fopen(path.c_str(), "rb"));
    std::FILE* const file = path == "-" ? stdin : opened.get();
    std::string text;
    std::array<char, 1 << 16> piece{};
    while (file != nullptr && std::feof(file) == 0 && std::ferror(file) == 0) {
        text.append(piece.data(), std::fread(piece.data(), 1, piece.size(), file));
    }
    if (file == nullptr || std::ferror(file) != 0) {
        return Error{path + " cannot be read (" + std::strerror(errno) + "); give a text file"};
    }
    if (text.starts_with(kByteOrderMark)) text.erase(0, kByteOrderMark.size());
    if (text.ends_with('\n')) text.pop_back();
    if (text.ends_with('\r')) text.pop_back();
    return text;
}

}  // namespace llama_runner
