#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "llama_runner/kv_cache.h"
#include "llama_runner/metadata.h"
#include "llama_runner/result.h"
#include "support/checksum.h"

namespace llama_runner {

/// Of such files.
inline constexpr uint32_t kSnapshotVersion = 1;

/// A session in a file, equal in both runtimes: what the text is, and all that is cached of it.
///
/// Little-endian: magic "llamakvs", version (uint32), zero (uint32), the model's identity (16 bytes), position and
/// first (int64 each, see `KVCache::State`), the text's ids (int64 each), every cache's filled rows in the order of the
/// method's inputs, and XXH3-64 of all that (uint64).
struct SavedSession {
    const std::array<unsigned char, 16>& identity;
    KVCache::State state;
    std::span<const int64_t> tokens;
    std::vector<KVCache::Filled> rows;
};

/// Writes a file that is whole, or as it was before.
Result<void> write_session_file(const std::string& path, const SavedSession& saved);

/// A saved session whose checksum is right, up to its rows.
struct OpenSessionFile {
    File file;
    KVCache::State state;
    std::vector<int64_t> tokens;

    /// Reads the rest.
    Result<void> read_rows(const std::vector<KVCache::Filled>& rows) const;
};

/// Fails where it is no such file, or a damaged one, or another model's, or has more positions than `capacity`.
Result<OpenSessionFile> open_session_file(const std::string& path, const std::array<unsigned char, 16>& identity,
                                          int64_t capacity);

}  // namespace llama_runner
