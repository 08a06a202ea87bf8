#include "engine/session_file.h"

#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "support/no_throw.h"

namespace llama_runner {

namespace {

static_assert(std::endian::native == std::endian::little);

constexpr char kMagic[] = {'l', 'l', 'a', 'm', 'a', 'k', 'v', 's'};

struct Header {
    char magic[8];
    uint32_t version;
    uint32_t zero;
    unsigned char identity[16];
    int64_t position;
    int64_t first;
};
static_assert(sizeof(Header) == 48);

Error unwritable(const std::string& path) {
    return {path + " cannot be written (" + std::strerror(errno) + "); give another path"};
}

bool write_all(std::FILE* file, const SavedSession& saved) {
    Header header{{}, kSnapshotVersion, 0, {}, saved.state.position, saved.state.first};
    std::memcpy(header.magic, kMagic, sizeof kMagic);
    std::memcpy(header.identity, saved.identity.data(), sizeof header.identity);
    Checksum checksum;
    bool whole = true;
    const auto add = [&](const void* data, size_t size) {
        checksum.add(data, size);
        whole = whole && std::fwrite(data, 1, size, file) == size;
    };
    add(&header, sizeof header);
    add(saved.tokens.data(), saved.tokens.size_bytes());
    for (const KVCache::Filled& rows : saved.rows) {
        for (int64_t head = 0; head < rows.heads; ++head) add(rows.of(head).data(), rows.of(head).size());
    }
    const uint64_t digest = checksum.digest();
    return whole && std::fwrite(&digest, sizeof digest, 1, file) == 1 && std::fflush(file) == 0;
}

}  // namespace

Result<void> write_session_file(const std::string& path, const SavedSession& saved) {
    return guarded([&]() -> Result<void> {
        std::string temporary = path + ".XXXXXX";
        const int descriptor = mkstemp(temporary.data());
        if (descriptor < 0) return unwritable(path);
        File file(fdopen(descriptor, "wb"));
        if (!write_all(file.get(), saved) || std::rename(temporary.c_str(), path.c_str()) != 0) {
            const Error error = unwritable(path);
            std::remove(temporary.c_str());
            return error;
        }
        return {};
    });
}

Result<OpenSessionFile> open_session_file(const std::string& path, const std::array<unsigned char, 16>& identity,
                                          int64_t capacity) {
    File file(std::fopen(path.c_str(), "rb"));
    if (!file) return Error{path + " cannot be read (" + std::strerror(errno) + "); give a saved session"};
    Header header;
    if (std::fread(&header, sizeof header, 1, file.get()) != 1 ||
        std::memcmp(header.magic, kMagic, sizeof kMagic) != 0) {
        return Error{path + " is not a saved session; give one"};
    }
    if (header.version != kSnapshotVersion) {
        return Error{path + " has version " + std::to_string(header.version) + ", but this program reads " +
                     std::to_string(kSnapshotVersion) + "; save the session again"};
    }
    if (std::memcmp(header.identity, identity.data(), identity.size()) != 0) {
        return Error{path + " was saved with another model; give the .pte that it was made with"};
    }
    std::error_code failure;
    const uint64_t size = std::filesystem::file_size(path, failure);
    uint64_t digest = 0;
    const bool whole = !failure && size >= sizeof header + sizeof digest;
    const auto found = whole ? checksum_of(file.get(), size - sizeof digest) : std::nullopt;
    if (!found || std::fread(&digest, sizeof digest, 1, file.get()) != 1 || *found != digest || header.position < 0 ||
        header.position > capacity) {
        return Error{path + " is damaged: its checksum does not match; save the session again"};
    }
    OpenSessionFile opened{std::move(file), {header.position, header.first}, {}};
    opened.tokens.resize(static_cast<size_t>(header.position));
    if (std::fseek(opened.file.get(), sizeof header, SEEK_SET) != 0 ||
        std::fread(opened.tokens.data(), sizeof(int64_t), opened.tokens.size(), opened.file.get()) !=
            opened.tokens.size()) {
        return Error{path + " is damaged: it is too short; save the session again"};
    }
    return opened;
}

Result<void> OpenSessionFile::read_rows(const std::vector<KVCache::Filled>& rows) const {
    for (const KVCache::Filled& each : rows) {
        for (int64_t head = 0; head < each.heads; ++head) {
            const std::span<std::byte> bytes = each.of(head);
            if (std::fread(bytes.data(), 1, bytes.size(), file.get()) != bytes.size()) {
                return Error{"the saved session is too short; save it again"};
            }
        }
    }
    return {};
}

}  // namespace llama_runner
