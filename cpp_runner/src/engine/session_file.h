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

/// The version of session files.
inline constexpr uint32_t kSnapshotVersion = 1;

/// The contents of a session file, the same in Python and C++: the text's ids and its caches.
///
/// Little-endian: magic "llamakvs", version (uint32), zero (uint32), the model's identity (16 bytes), position and
/// first (int64 each, see `KVCache::State`), the text's ids (int64 each), the filled rows of every cache in the order
/// of the method's inputs, and XXH3-64 of all that (uint64).
struct SavedSession {
    const std::array<unsigned char, 16>& identity;
    KVCache::State state;
    std::span<const int64_t> tokens;
    std::vector<KVCache::Filled> rows;
};

/// Writes a session file completely, or leaves the earlier file unchanged.
Result<void> write_session_file(const std::string& path, const SavedSession& saved);

/// A saved session whose checksum is correct, read up to its rows.
struct OpenSessionFile {
    File file;
    KVCache::State state;
    std::vector<int64_t> tokens;

    /// Reads the rows.
    Result<void> read_rows(const std::vector<KVCache::Filled>& rows) const;
};

/// Opens a saved session. Fails if it is no session file, is damaged, is for another model, or has more positions than
/// `capacity`.
Result<OpenSessionFile> open_session_file(const std::string& path, const std::array<unsigned char, 16>& identity,
                                          int64_t capacity);

}  // namespace llama_runner
