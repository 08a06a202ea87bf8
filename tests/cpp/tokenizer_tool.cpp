// Runs a tokenizer on requests from stdin, for tests that compare it with other implementations.
//
//     tokenizer_tool FILE < requests > answers
//
// A request is an operation (e: encode, s: encode with special tokens, p: encode parts, d: decode), a length (uint32)
// and so many bytes: a text, or ids (int32 each). Between parts stands the byte 0xFF; the first, third ... may hold
// special tokens. An answer is a length and so many bytes: ids, or a text. Numbers are little-endian.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>

#include "llama_runner/tokenizer.h"

namespace {

using namespace llama_runner;

void answer(const void* data, size_t bytes) {
    const auto length = static_cast<uint32_t>(bytes);
    std::fwrite(&length, sizeof length, 1, stdout);
    if (bytes > 0) std::fwrite(data, 1, bytes, stdout);
}

std::vector<Part> parts_of(std::string_view request) {
    std::vector<Part> parts;
    for (size_t from = 0; from <= request.size();) {
        const size_t end = std::min(request.find('\xFF', from), request.size());
        parts.push_back({std::string(request.substr(from, end - from)), parts.size() % 2 == 0});
        from = end + 1;
    }
    return parts;
}

bool serve(const Tokenizer& tokenizer, char operation, const std::string& request) {
    if (operation == 'd') {
        std::vector<int64_t> ids;
        for (size_t i = 0; i < request.size() / sizeof(int32_t); ++i) {
            ids.push_back(reinterpret_cast<const int32_t*>(request.data())[i]);
        }
        const std::string text = decode(tokenizer, ids);
        answer(text.data(), text.size());
        return true;
    }
    const auto ids =
        operation == 'p' ? tokenizer.encode_parts(parts_of(request)) : tokenizer.encode(request, operation == 's');
    if (!ids) {
        std::fprintf(stderr, "%s\n", ids.error().message.c_str());
        return false;
    }
    const std::vector<int32_t> narrow(ids->begin(), ids->end());
    answer(narrow.data(), narrow.size() * sizeof(int32_t));
    return true;
}

}  // namespace

int main(int count, char** arguments) {
    std::ifstream file(count > 1 ? arguments[1] : "", std::ios::binary);
    const std::string data{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    const auto tokenizer = from_bytes(data);
    if (!tokenizer) {
        std::fprintf(stderr, "%s\n", tokenizer.error().message.c_str());
        return 2;
    }
    std::string request;
    for (int operation = std::getchar(); operation != EOF; operation = std::getchar()) {
        uint32_t length = 0;
        if (std::fread(&length, sizeof length, 1, stdin) != 1) return 1;
        request.resize(length);
        if (std::fread(request.data(), 1, length, stdin) != length) return 1;
        if (!serve(**tokenizer, static_cast<char>(operation), request)) return 1;
    }
    return 0;
}
