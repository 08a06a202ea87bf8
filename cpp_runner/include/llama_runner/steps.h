#pragma once

#include <cstddef>
#include <mutex>
#include <span>

#include "llama_runner/metadata.h"
#include "llama_runner/result.h"

namespace llama_runner {

/// The part of a program that a session uses; `Program` implements it, and a test may.
class Steps {
  public:
    virtual ~Steps() = default;

    virtual const Metadata& metadata() const = 0;

    /// Runs a method once.
    ///
    /// `method` is an index of metadata().methods. `inputs` are in the order of the method's spec, with the sizes for
    /// `step`, and are read in place. Returns the outputs in the order of the spec, valid only until the next step of
    /// this program.
    virtual Result<std::span<const void* const>> step(size_t method, StepSize step,
                                                      std::span<const void* const> inputs) = 0;

    /// The lock that a session holds while it runs steps and reads their outputs.
    std::mutex& turn() { return turn_; }

  private:
    std::mutex turn_;
};

}  // namespace llama_runner
