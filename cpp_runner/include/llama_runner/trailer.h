#pragma once

#include <string>

#include "llama_runner/result.h"

namespace llama_runner {

/// Checks that a file is a complete file of llama-pte in the format version that this version reads.
///
/// `checksum`: whether to read the file through and compare its checksum (about 0.1 s per GB in the page cache).
Result<void> check_file(const std::string& path, bool checksum);

}  // namespace llama_runner
