#pragma once

#include <array>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <string_view>

namespace llama_runner {

struct CloseFile {
    void operator()(std::FILE* file) const { std::fclose(file); }
};

using File = std::unique_ptr<std::FILE, CloseFile>;

/// XXH3-64 of the bytes that are added.
class Checksum {
  public:
    Checksum();
    ~Checksum();

    void add(const void* data, size_t size);
    uint64_t digest() const;

  private:
    struct State;

    std::unique_ptr<State> state_;
};

/// Returns XXH3-64 of a file's first `length` bytes; nothing if they cannot be read.
std::optional<uint64_t> checksum_of(std::FILE* file, uint64_t length);

/// Returns XXH3-128 of a text, in canonical byte order.
std::array<unsigned char, 16> digest_of(std::string_view text);

/// Reads an unsigned number of `count` bytes.
uint64_t little_endian(const unsigned char* bytes, int count);

}  // namespace llama_runner
