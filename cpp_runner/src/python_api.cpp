#include "python_api.h"

#include <executorch/extension/threadpool/threadpool_guard.h>
#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/backend/options.h>
#include <executorch/runtime/platform/platform.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "attention/bandwidth.h"
#include "pte/program_check.h"

namespace et = executorch::runtime;

double llama_pte_read_bandwidth(int threads) { return llama_runner::read_bandwidth(threads); }

int llama_pte_share_packed_weights() {
    et::BackendOptions<1> options;
    et::Error error = options.set_option("weight_cache_enabled", true);
    if (error == et::Error::Ok) error = et::set_option("XnnpackBackend", options.view());
    return static_cast<int>(error);
}

const char* llama_pte_malformed(const void* bytes, size_t size) {
    thread_local std::optional<std::string> problem;
    problem = llama_runner::malformed({static_cast<const std::byte*>(bytes), size});
    return problem ? problem->c_str() : nullptr;
}

void llama_pte_throw_at_abort() {
    et::PalImpl platform = et::PalImpl::create(nullptr, "llama_pte");
    platform.abort = [] { throw std::runtime_error("the program is not what a kernel expects"); };
    et::register_pal(platform);
}

void llama_pte_set_threads_off(bool off) { executorch::extension::threadpool::NoThreadPoolGuard::set_enabled(off); }
