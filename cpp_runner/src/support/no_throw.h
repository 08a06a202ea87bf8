#pragma once

#include <exception>
#include <new>

#include "llama_runner/result.h"

namespace llama_runner {

/// Runs `body`, which returns a Result, and turns exceptions of other libraries into an Error.
template <typename Body>
auto guarded(const Body& body) -> decltype(body()) {
    try {
        return body();
    } catch (const std::bad_alloc&) {
        return Error{"there is not enough memory; close other programs or use a smaller model"};
    } catch (const std::exception& exception) {
        return Error{std::string("unexpected failure (") + exception.what() + ")"};
    }
}

}  // namespace llama_runner
