#pragma once

#include <span>
#include <string>

#include "llama_runner/metadata.h"
#include "llama_runner/result.h"

namespace llama_runner {

/// A file and what it carries.
struct NamedMetadata {
    std::string path;
    const Metadata* metadata;
};

/// What the whole carries of which these are the shards, in the order of their blocks; of one file, what it carries.
/// Fails, and names the file, where one is not of the same export, is there twice, or is missing.
Result<Metadata> join_parts(std::span<const NamedMetadata> shards);

}  // namespace llama_runner
