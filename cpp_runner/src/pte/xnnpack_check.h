#pragma once

#include <cstdint>
#include <map>
#include <string_view>
#include <vector>

#include "pte/flatbuffer.h"

namespace llama_runner {

/// A tensor that a delegate takes or gives.
struct External {
    uint32_t id;  // its place among a call's arguments
    bool is_output;
    int8_t scalar_type;
    std::vector<uint32_t> sizes;
};

/// Checks what XNNPACK does not check of the graphs in a program.
class XnnpackCheck {
  public:
    /// Takes the program's named data: names -> bytes.
    explicit XnnpackCheck(std::map<std::string_view, uint64_t> named) : named_(std::move(named)) {}

    /// Checks the payload of a delegate, and returns its inputs and outputs. Throws Malformed.
    std::vector<External> check(Bytes payload);

  private:
    std::map<std::string_view, uint64_t> named_;
    /// Names of matrices -> the shapes in which they are multiplied: XNNPACK packs a name once for all graphs.
    std::map<std::string_view, std::vector<uint64_t>> matrices_;

    friend class XnnpackGraph;
};

}  // namespace llama_runner
