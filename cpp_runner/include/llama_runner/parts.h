#pragma once

#include <span>
#include <string>

#include "llama_runner/metadata.h"
#include "llama_runner/result.h"

namespace llama_runner {

/// A file's path and metadata.
struct NamedMetadata {
    std::string path;
    const Metadata* metadata;
};

/// Returns the metadata of the whole model from its shards, in the order of their blocks, or from its only file.
/// Fails, and names the file, if one is from another export, occurs twice, or is missing.
Result<Metadata> join_parts(std::span<const NamedMetadata> shards);

}  // namespace llama_runner
