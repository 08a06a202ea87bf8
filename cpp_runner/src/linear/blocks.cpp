#include "linear/blocks.h"

#include <algorithm>
#include <cstring>

namespace llama_runner {

namespace {

constexpr size_t kRows = kGroupRows;
constexpr size_t kColumns = kBlockColumns;
constexpr size_t kMostColumns = 8 * kColumns;

/// One row's block as GGUF stores it, or as GGUF's types of 32 columns are laid out, taken apart.
struct Parts {
    const std::byte* head[2]{};  // consecutive pieces of what is stored in front of the codes
    size_t head_bytes[2]{};
    std::array<uint8_t, kMostColumns> codes{};
};

uint8_t at(const std::byte* from, size_t i) { return static_cast<uint8_t>(from[i]); }

/// Takes apart a block of 32 columns: its head, what codes have above 4 bits, and nibbles.
Parts take_block(const BlockForm& form, const std::byte* from) {
    Parts parts;
    parts.head[0] = from;
    parts.head_bytes[0] = head_bytes(form.head);
    from += parts.head_bytes[0];
    if (form.bits == 8) {
        std::memcpy(parts.codes.data(), from, kColumns);
        return parts;
    }
    const auto above = static_cast<size_t>(form.bits - 4);
    const std::byte* nibbles = from + kColumns * above / 8;
    for (size_t c = 0; c < kColumns; ++c) {
        const int low = at(nibbles, c % 16) >> (c < 16 ? 0 : 4) & 15;
        const int high = above == 0 ? 0 : at(from, c * above / 8) >> (c * above % 8) & ((1 << above) - 1);
        parts.codes[c] = static_cast<uint8_t>(low | high << 4);
    }
    return parts;
}

/// Takes apart a block of Q4_K or Q5_K.
Parts take_six_bits(const BlockForm& form, const std::byte* from) {
    Parts parts;
    parts.head[0] = from;
    parts.head_bytes[0] = head_bytes(form.head);
    from += parts.head_bytes[0];
    const std::byte* nibbles = form.bits == 5 ? from + kColumns : from;
    for (size_t c = 0; c < kMostColumns; ++c) {
        const size_t block = c / kColumns;
        const int low = at(nibbles, block / 2 * kColumns + c % kColumns) >> (block % 2 == 0 ? 0 : 4) & 15;
        const int high = form.bits == 5 ? at(from, c % kColumns) >> block & 1 : 0;
        parts.codes[c] = static_cast<uint8_t>(low | high << 4);
    }
    return parts;
}

/// Takes apart a block of Q6_K, whose head stands at its end, with D last.
Parts take_bytes(const std::byte* from) {
    const std::byte* highs = from + kMostColumns / 2;
    Parts parts;
    parts.head[1] = highs + kMostColumns / 4;
    parts.head_bytes[1] = kMostColumns / 16;
    parts.head[0] = parts.head[1] + parts.head_bytes[1];
    parts.head_bytes[0] = sizeof(uint16_t);
    for (size_t c = 0; c < kMostColumns; ++c) {
        const size_t half = c / 128;
        const int low = at(from, half * 64 + c % 64) >> (c % 128 < 64 ? 0 : 4) & 15;
        const int high = at(highs, half * 32 + c % 32) >> (c % 128 / 32 * 2) & 3;
        parts.codes[c] = static_cast<uint8_t>(low | high << 4);
    }
    return parts;
}

Parts take(const BlockForm& form, const std::byte* from) {
    switch (form.head) {
        case BlockHead::kSixBits:
            return take_six_bits(form, from);
        case BlockHead::kBytes:
            return take_bytes(from);
        default:
            return take_block(form, from);
    }
}

/// Puts a row's head among those of the group: float16 numbers first, then single bytes.
void put_head(const BlockForm& form, const Parts& parts, size_t row, std::byte* group) {
    std::array<std::byte, 18> bytes;
    std::memcpy(bytes.data(), parts.head[0], parts.head_bytes[0]);
    if (parts.head_bytes[1] > 0) std::memcpy(bytes.data() + parts.head_bytes[0], parts.head[1], parts.head_bytes[1]);
    constexpr size_t kHalves[] = {1, 2, 0, 2, 1};
    const size_t halves = kHalves[static_cast<size_t>(form.head)];
    for (size_t i = 0; i < head_bytes(form.head); ++i) {
        const size_t to = i < 2 * halves ? (i / 2 * kRows + row) * 2 + i % 2 : i * kRows + row;
        group[to] = bytes[i];
    }
}

/// Puts a row's codes of 32 columns among those of the group, which are zero before.
void put_codes(int bits, const uint8_t* codes, size_t row, std::byte* group) {
    for (size_t c = 0; c < kColumns; ++c) {
        const size_t vector = c / 4;
        std::byte* at_row = group + row * 4 + c % 4;
        if (bits == 8) {
            at_row[vector * 64] = std::byte{codes[c]};
            continue;
        }
        at_row[vector % 4 * 64] |= std::byte(codes[c] & 15) << (vector < 4 ? 0 : 4);
        std::byte* high = at_row + size_t{4} * 64;
        if (bits == 5) *high |= std::byte(codes[c] >> 4) << vector;
        if (bits == 6) high[vector / 4 * 64] |= std::byte(codes[c] >> 4) << (vector % 4 * 2);
    }
}

}  // namespace

std::optional<BlockType> block_type_of(std::string_view name) {
    for (size_t i = 0; i < kBlockForms.size(); ++i) {
        if (kBlockForms[i].name == name) return static_cast<BlockType>(i);
    }
    return std::nullopt;
}

void lay(BlockType type, int64_t rows, int64_t columns, const std::byte* blocks, std::byte* groups) {
    const BlockForm& form = form_of(type);
    const auto count = static_cast<size_t>(columns / block_columns(type));
    const auto parts_in_block = static_cast<size_t>(blocks_per_head(form.head));
    const size_t bytes = block_bytes(type);
    std::fill_n(groups, static_cast<size_t>(groups_of(rows)) * group_bytes(type, columns), std::byte{});
    for (size_t row = 0; row < static_cast<size_t>(rows); ++row) {
        for (size_t b = 0; b < count; ++b) {
            const Parts parts = take(form, blocks + (row * count + b) * bytes);
            std::byte* to = groups + (row / kRows * count + b) * bytes * kRows;
            put_head(form, parts, row % kRows, to);
            to += head_bytes(form.head) * kRows;
            for (size_t i = 0; i < parts_in_block; ++i) {
                put_codes(form.bits, parts.codes.data() + i * kColumns, row % kRows, to + i * code_bytes(form.bits));
            }
        }
    }
}

}  // namespace llama_runner
