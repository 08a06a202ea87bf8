#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "llama_runner/result.h"

namespace llama_runner {

/// What a loaded shard takes, to the bytes of its matrices: norms, scales and the runtime's own structures.
inline constexpr double kMargin = 1.04;

/// For each shard, whether it stays once it is loaded, where not all of them may. Each of the others is loaded when its
/// turn comes, every time anew, and alone.
///
/// The first stays before others, as much of its file is an embedding, of which a step reads a row; then the largest,
/// so that those that come and go need less room. `sizes` are the bytes that each takes, in order, and `room` those
/// that all may take together. Fails where there is no room for the largest.
Result<std::vector<bool>> choose_resident(std::span<const int64_t> sizes, int64_t room);

}  // namespace llama_runner
