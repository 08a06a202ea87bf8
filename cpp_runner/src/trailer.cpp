#include <array>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "llama_runner/metadata.h"

namespace llama_runner {

namespace {

/// The 32 bytes that follow the program, little-endian: magic "llamapte", format version (uint32), zero (uint32),
/// length of the program in bytes (uint64), XXH3-64 of the program (uint64).
struct Trailer {
    static constexpr size_t kSize = 32;

    bool is_ours = false;
    uint32_t version = 0;
    uint64_t length = 0;
    uint64_t digest = 0;
};

uint64_t little_endian(const unsigned char* bytes, int count) {
    uint64_t value = 0;
    for (int i = count - 1; i >= 0; --i) value = value << 8 | bytes[i];
    return value;
}

Trailer parse(const std::array<unsigned char, Trailer::kSize>& bytes) {
    return {std::memcmp(bytes.data(), "llamapte", 8) == 0, static_cast<uint32_t>(little_endian(&bytes[8], 4)),
            little_endian(&bytes[16], 8), little_endian(&bytes[24], 8)};
}

struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, Close>;

/// XXH3-64 of the first `length` bytes; nothing where they cannot be read.
std::optional<uint64_t> checksum_of(std::FILE* file, uint64_t length) {
    constexpr size_t kPiece = 1 << 20;
    std::vector<unsigned char> piece(kPiece);
    std::unique_ptr<XXH3_state_t, XXH_errorcode (*)(XXH3_state_t*)> state(XXH3_createState(), XXH3_freeState);
    if (!state || XXH3_64bits_reset(state.get()) != XXH_OK) return std::nullopt;
    std::rewind(file);
    while (length > 0) {
        const size_t count = std::fread(piece.data(), 1, std::min<uint64_t>(length, kPiece), file);
        if (count == 0) return std::nullopt;
        XXH3_64bits_update(state.get(), piece.data(), count);
        length -= count;
    }
    return XXH3_64bits_digest(state.get());
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
            return Error{path + " is truncated or was not made by llama-pte; copy it again or export it anew"};
        }
        return Error{path + " is no .pte file; export one with `python -m export.llama`"};
    }
    if (trailer.version > kFormatVersion) {
        return Error{path + " has format version " + std::to_string(trailer.version) + ", newer than this version's " +
                     std::to_string(kFormatVersion) + "; update llama-pte or export the file again"};
    }
    const uint64_t length = size - Trailer::kSize;
    if (trailer.length != length) {
        return Error{path + " is damaged: " + std::to_string(length) + " bytes of " + std::to_string(trailer.length) +
                     " are there; copy it again"};
    }
    if (checksum && checksum_of(file.get(), length) != trailer.digest) {
        return Error{path + " is damaged: its checksum does not match; copy it again or export it anew"};
    }
    return {};
}

}  // namespace llama_runner
