#pragma once

#include <cstddef>
#include <mutex>
#include <span>

#include "llama_runner/metadata.h"
#include "llama_runner/result.h"

namespace llama_runner {

/// What a session needs of a program: `Program`, or a stand-in.
class Steps {
  public:
    virtual ~Steps() = default;

    virtual const Metadata& metadata() const = 0;

    /// Runs a method once.
    ///
    /// `method` counts in metadata().methods; `inputs` are in the order of its spec, as large as `step` says, and are
    /// read in place. Returns the outputs in the order of its spec, valid only until the next step of this program.
    virtual Result<std::span<const void* const>> step(size_t method, StepSize step,
                                                      std::span<const void* const> inputs) = 0;

    /// Whose turn it is: held by a session while it runs steps and looks at their outputs.
    std::mutex& turn() { return turn_; }

  private:
    std::mutex turn_;
};

}  // namespace llama_runner
