#pragma once

#include <optional>
#include <string>

#include "pte/flatbuffer.h"

namespace llama_runner {

/// Checks what ExecuTorch does not check of a program before it uses it: that every index, size and offset in it, and
/// in XNNPACK's graphs, stays inside. Returns what is wrong; nothing if all is well.
///
/// `file` is the program, with the data behind it.
std::optional<std::string> malformed(Bytes file);

}  // namespace llama_runner
