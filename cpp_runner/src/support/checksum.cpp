#include "support/checksum.h"

#include <algorithm>
#include <vector>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace llama_runner {

struct Checksum::State {
    XXH3_state_t xxh3;
};

Checksum::Checksum() : state_(std::make_unique<State>()) { XXH3_64bits_reset(&state_->xxh3); }

Checksum::~Checksum() = default;

void Checksum::add(const void* data, size_t size) { XXH3_64bits_update(&state_->xxh3, data, size); }

uint64_t Checksum::digest() const { return XXH3_64bits_digest(&state_->xxh3); }

std::optional<uint64_t> checksum_of(std::FILE* file, uint64_t length) {
    constexpr size_t kPiece = 1 << 20;
    std::vector<unsigned char> piece(kPiece);
    Checksum checksum;
    std::rewind(file);
    while (length > 0) {
        const size_t count = std::fread(piece.data(), 1, std::min<uint64_t>(length, kPiece), file);
        if (count == 0) return std::nullopt;
        checksum.add(piece.data(), count);
        length -= count;
    }
    return checksum.digest();
}

std::array<unsigned char, 16> digest_of(std::string_view text) {
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits(text.data(), text.size()));
    return std::to_array(canonical.digest);
}

uint64_t little_endian(const unsigned char* bytes, int count) {
    uint64_t value = 0;
    for (int i = count - 1; i >= 0; --i) value = value << 8 | bytes[i];
    return value;
}

}  // namespace llama_runner
