#pragma once

#include <string>

#include "llama_runner/result.h"

namespace llama_runner {

/// Refuses what is not a whole file of ours in a format this version reads.
///
/// `checksum` also reads the file through and compares its checksum (about 0.1 s per GB in the page cache).
Result<void> check_file(const std::string& path, bool checksum);

}  // namespace llama_runner
