#pragma once

namespace llama_runner {

/// Bytes a second that `threads` threads together read from memory: the best of a few passes over 256 MB, which is more
/// than caches hold. Decoding reads all weights for each token, so it cannot be faster than this allows.
double read_bandwidth(int threads);

}  // namespace llama_runner
