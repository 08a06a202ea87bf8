#pragma once

namespace llama_runner {

/// Measures the bytes a second that `threads` threads together read from memory: the best of a few passes over 256 MB,
/// more than CPU caches hold. Decoding reads all weights for each token, so this bounds its speed.
double read_bandwidth(int threads);

}  // namespace llama_runner
