#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "llama_runner/result.h"

namespace llama_runner {

/// Ratio of a loaded shard's memory to its matrices' bytes; the rest is norms, scales and the runtime's structures.
inline constexpr double kMargin = 1.04;

/// Returns whether each shard stays loaded. Each of the others is loaded alone for each step, when it runs.
///
/// The first shard is chosen first, because much of its file is an embedding, of which a step reads only a row; then
/// the largest, so that the shards loaded for each step need less room. `sizes` are the bytes that each shard takes, in
/// order; `room` are the bytes that all may take together. Fails if there is no room for the largest shard.
Result<std::vector<bool>> choose_resident(std::span<const int64_t> sizes, int64_t room);

}  // namespace llama_runner
