#include "python_api.h"

#include <executorch/extension/threadpool/threadpool_guard.h>
#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/backend/options.h>

#include "attention/bandwidth.h"

namespace et = executorch::runtime;

double llama_pte_read_bandwidth(int threads) { return llama_runner::read_bandwidth(threads); }

int llama_pte_share_packed_weights() {
    et::BackendOptions<1> options;
    et::Error error = options.set_option("weight_cache_enabled", true);
    if (error == et::Error::Ok) error = et::set_option("XnnpackBackend", options.view());
    return static_cast<int>(error);
}

void llama_pte_set_threads_off(bool off) { executorch::extension::threadpool::NoThreadPoolGuard::set_enabled(off); }
