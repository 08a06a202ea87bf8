#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace llama_runner {

/// A format of weights in blocks: GGUF's, and two more of the microscaling formats of the Open Compute Project, with
/// elements of E2M3 and INT8.
enum class BlockType : uint8_t {
    kQ8_0,
    kQ4_0,
    kQ4_1,
    kQ5_0,
    kQ5_1,
    kQ4_K,
    kQ5_K,
    kQ6_K,
    kIQ4_NL,
    kMXFP4,
    kMXFP6,
    kMXINT8
};

/// What a block stores in front of its codes, for each row. A weight is d * code + m, and 32 columns have a d and an m
/// of their own, for which 8 such blocks may share a head.
enum class BlockHead : uint8_t {
    kScale,           // float16 d; m = 0
    kScaleAndOffset,  // float16 d, float16 m
    kExponent,        // uint8 e: d = 2^(e - 127 - fraction_bits); m = 0
    kSixBits,         // float16 D, float16 M, and 12 bytes with 6-bit s and t of 8 blocks: d = D * s, m = -M * t
    kBytes,           // float16 D, and int8 s of 16 halves of such blocks: d = D * s; m = 0
};

/// A matrix is stored in groups of 16 rows, the last padded with zeros. A group is a sequence of blocks, and a block
/// has its head, then the codes of each 32 columns. It takes as many bytes as 16 blocks of single rows.
///
/// A head has the float16 numbers of the 16 rows side by side, all d or D, then all m or M; then their first single
/// bytes, all second ones, and so on, each as GGUF has it. The codes of 32 columns are 8 vectors of 64 bytes. Byte 4 *
/// r + j of vector q belongs to row r and column 4 * q + j, so that each 32-bit lane holds what an instruction for dot
/// products of bytes takes from one row. Codes of 8 bits are stored so. Of shorter codes, the low 4 bits come first, in
/// 4 vectors: vector i has those of vector i in its low and of vector i + 4 in its high nibbles. Then come the fifth
/// bits in one vector: bit q of its bytes belongs to vector q; or the fifth and sixth bits in two: bits 2 * s and 2 * s
/// + 1 of i belong to vector 4 * i + s.
struct BlockForm {
    std::string_view name;
    BlockHead head;
    int bits;             // of a code
    int zero;             // subtracted from a code, as far as it is not signed or looked up
    const int8_t* table;  // 2^bits numbers that codes stand for, or null
    int fraction_bits;    // of the numbers that codes stand for, with an exponent as head
};

constexpr int64_t kGroupRows = 16;
constexpr int64_t kBlockColumns = 32;

constexpr std::array<int8_t, 16> kIQ4_NLTable = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                 1,    13,   25,  38,  53,  69,  89,  113};
constexpr std::array<int8_t, 16> kMXFP4Table = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

/// Returns the floats of 1 + 2 + 3 bits (sign, exponent, fraction) times 8.
constexpr std::array<int8_t, 64> mxfp6_table() {
    std::array<int8_t, 64> table{};
    for (int code = 0; code < 32; ++code) {
        const int exponent = code >> 3, fraction = code & 7;
        const int number = exponent == 0 ? fraction : (8 + fraction) << (exponent - 1);
        table[static_cast<size_t>(code)] = static_cast<int8_t>(number);
        table[static_cast<size_t>(code) + 32] = static_cast<int8_t>(-number);
    }
    return table;
}

constexpr std::array<int8_t, 64> kMXFP6Table = mxfp6_table();

/// The forms, in the order of BlockType.
constexpr std::array<BlockForm, 12> kBlockForms = {{
    {"Q8_0", BlockHead::kScale, 8, 0, nullptr, 0},
    {"Q4_0", BlockHead::kScale, 4, 8, nullptr, 0},
    {"Q4_1", BlockHead::kScaleAndOffset, 4, 0, nullptr, 0},
    {"Q5_0", BlockHead::kScale, 5, 16, nullptr, 0},
    {"Q5_1", BlockHead::kScaleAndOffset, 5, 0, nullptr, 0},
    {"Q4_K", BlockHead::kSixBits, 4, 0, nullptr, 0},
    {"Q5_K", BlockHead::kSixBits, 5, 0, nullptr, 0},
    {"Q6_K", BlockHead::kBytes, 6, 32, nullptr, 0},
    {"IQ4_NL", BlockHead::kScale, 4, 0, kIQ4_NLTable.data(), 0},
    {"MXFP4", BlockHead::kExponent, 4, 0, kMXFP4Table.data(), 1},
    {"MXFP6", BlockHead::kExponent, 6, 0, kMXFP6Table.data(), 3},
    {"MXINT8", BlockHead::kExponent, 8, 0, nullptr, 6},
}};

constexpr const BlockForm& form_of(BlockType type) { return kBlockForms[static_cast<size_t>(type)]; }

std::optional<BlockType> block_type_of(std::string_view name);

/// Returns the number of bytes of a head for each row.
constexpr size_t head_bytes(BlockHead head) {
    constexpr size_t kBytes[] = {2, 4, 1, 16, 18};
    return kBytes[static_cast<size_t>(head)];
}

/// Returns how many times 32 columns share a head.
constexpr int64_t blocks_per_head(BlockHead head) {
    return head == BlockHead::kSixBits || head == BlockHead::kBytes ? 8 : 1;
}

/// Returns the number of bytes of the codes of 32 columns of a group.
constexpr size_t code_bytes(int bits) { return static_cast<size_t>(bits * kGroupRows * kBlockColumns / 8); }

/// Returns the number of columns of a block; a matrix has a multiple of it.
constexpr int64_t block_columns(BlockType type) { return blocks_per_head(form_of(type).head) * kBlockColumns; }

/// Returns the number of bytes of one row's block in GGUF.
constexpr size_t block_bytes(BlockType type) {
    const BlockForm& form = form_of(type);
    return head_bytes(form.head) +
           static_cast<size_t>(blocks_per_head(form.head)) * code_bytes(form.bits) / static_cast<size_t>(kGroupRows);
}

constexpr int64_t groups_of(int64_t rows) { return (rows + kGroupRows - 1) / kGroupRows; }

constexpr size_t group_bytes(BlockType type, int64_t columns) {
    return static_cast<size_t>(columns / block_columns(type) * kGroupRows) * block_bytes(type);
}

/// Brings GGUF's blocks of a matrix into groups.
void lay(BlockType type, int64_t rows, int64_t columns, const std::byte* blocks, std::byte* groups);

}  // namespace llama_runner
