#include "llama_runner/trailer.h"

#include <array>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>

#include "llama_runner/metadata.h"
#include "support/checksum.h"

namespace llama_runner {

namespace {

/// The 32 bytes after the program, little-endian: magic "llamapte", format version (uint32), zero (uint32),
/// length of the program in bytes (uint64), XXH3-64 of the program (uint64).
struct Trailer {
    static constexpr size_t kSize = 32;

    bool is_ours = false;
    uint32_t version = 0;
    uint64_t length = 0;
    uint64_t digest = 0;
};

Trailer parse(const std::array<unsigned char, Trailer::kSize>& bytes) {
    return {std::memcmp(bytes.data(), "llamapte", 8) == 0, static_cast<uint32_t>(little_endian(&bytes[8], 4)),
            little_endian(&bytes[16], 8), little_endian(&bytes[24], 8)};
}

}  // namespace

Result<void> check_file(const std::string& path, bool checksum) {
    std::error_code failure;
    if (!std::filesystem::is_regular_file(path, failure)) {
        return Error{path + " does not exist; export one with `python -m export.llama --output " + path + "`"};
    }
    const uint64_t size = std::filesystem::file_size(path, failure);
    const File file(std::fopen(path.c_str(), "rb"));
    if (failure || !file) return Error{path + " cannot be read (" + std::strerror(errno) + ")"};

    std::array<unsigned char, 8> head{};
    const bool is_program =
        std::fread(head.data(), 1, head.size(), file.get()) == head.size() && std::memcmp(&head[4], "ET12", 4) == 0;
    std::array<unsigned char, Trailer::kSize> tail{};
    Trailer trailer;
    if (size >= Trailer::kSize && std::fseek(file.get(), -static_cast<long>(Trailer::kSize), SEEK_END) == 0 &&
        std::fread(tail.data(), 1, tail.size(), file.get()) == tail.size()) {
        trailer = parse(tail);
    }
    if (!trailer.is_ours) {
        if (is_program) {
            return Error{path + " is truncated or was not made by llama-pte; copy or export it again"};
        }
        return Error{path + " is not a .pte file; export one with `python -m export.llama`"};
    }
    if (trailer.version < kFormatVersion) {
        return Error{path + " has format version " + std::to_string(trailer.version) + ", but this version reads " +
                     std::to_string(kFormatVersion) + "; export it again"};
    }
    if (trailer.version > kFormatVersion) {
        return Error{path + " has format version " + std::to_string(trailer.version) + ", newer than this version's " +
                     std::to_string(kFormatVersion) + "; update llama-pte or export the file again"};
    }
    const uint64_t length = size - Trailer::kSize;
    if (trailer.length != length) {
        return Error{path + " is damaged: it has " + std::to_string(length) + " of " + std::to_string(trailer.length) +
                     " bytes; copy it again"};
    }
    if (checksum && checksum_of(file.get(), length) != trailer.digest) {
        return Error{path + " is damaged: its checksum does not match; copy or export it again"};
    }
    return {};
}

}  // namespace llama_runner
