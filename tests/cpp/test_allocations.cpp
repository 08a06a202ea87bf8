// Counts the calls of malloc and operator new, by caller, while up to 100 tokens are decoded: none may come from the
// runner's own code or from the standard library that it calls.
//
//     test_allocations FILE

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <new>

#include "llama_runner/generation.h"
#include "llama_runner/program.h"

extern "C" {
void* __libc_malloc(size_t size);
void* __libc_calloc(size_t count, size_t size);
void* __libc_realloc(void* memory, size_t size);
void* __libc_memalign(size_t alignment, size_t size);
extern char __executable_start;
extern char etext;
}

namespace {

constexpr int64_t kMostTokens = 100;

std::atomic<bool> counting{false};
std::atomic<size_t> count{0};
std::array<std::atomic<void*>, 65536> callers{};

void note(void* caller) {
    if (counting) callers[count++ % callers.size()] = caller;
}

}  // namespace

#define INTERPOSED extern "C" __attribute__((visibility("default"), noinline))

INTERPOSED void* malloc(size_t size) {
    note(__builtin_return_address(0));
    return __libc_malloc(size);
}
INTERPOSED void* calloc(size_t items, size_t size) {
    note(__builtin_return_address(0));
    return __libc_calloc(items, size);
}
INTERPOSED void* realloc(void* memory, size_t size) {
    note(__builtin_return_address(0));
    return __libc_realloc(memory, size);
}
INTERPOSED void* aligned_alloc(size_t alignment, size_t size) {
    note(__builtin_return_address(0));
    return __libc_memalign(alignment, size);
}
INTERPOSED int posix_memalign(void** memory, size_t alignment, size_t size) {
    note(__builtin_return_address(0));
    *memory = __libc_memalign(alignment, size);
    return 0;
}

__attribute__((visibility("default"), noinline)) void* operator new(size_t size) {
    note(__builtin_return_address(0));
    void* const memory = __libc_malloc(size);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
}
__attribute__((visibility("default"), noinline)) void* operator new[](size_t size) {
    note(__builtin_return_address(0));
    void* const memory = __libc_malloc(size);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
}

namespace {

using namespace llama_runner;

/// Returns whether a caller is in this program or in the standard library.
bool is_ours(void* caller, const char*& library) {
    Dl_info info{};
    library = dladdr(caller, &info) != 0 && info.dli_fname != nullptr ? info.dli_fname : "unknown";
    const auto* address = static_cast<const char*>(caller);
    return (address >= &__executable_start && address < &etext) || std::strstr(library, "libstdc++") != nullptr;
}

/// Decodes while allocations are counted. Returns false on failure.
bool decode(Generator& generator, int64_t tokens) {
    for (int64_t i = -1; i < tokens; ++i) {
        const auto step = generator.next();
        counting = i + 1 < tokens;
        if (!step || *step == nullptr) return false;
    }
    return true;
}

int report(int64_t tokens) {
    size_t ours = 0;
    for (size_t i = 0; i < count && i < callers.size(); ++i) {
        const char* library = nullptr;
        if (is_ours(callers[i], library)) {
            ++ours;
            std::printf("%p in %s\n", callers[i].load(), library);
        }
    }
    std::printf("%lld tokens: %zu allocations by the runner, %zu by the libraries\n", static_cast<long long>(tokens),
                ours, count - ours);
    return ours == 0 && count < callers.size() ? 0 : 1;
}

}  // namespace

int main(int arguments, char** values) {
    const auto program = Program::open(arguments > 1 ? values[1] : "", {});
    if (!program) return std::printf("%s\n", program.error().message.c_str()), 2;
    auto session = Session::create(**program);
    const auto prompt = (*program)->tokenizer() != nullptr ? prompt_ids(**program, "Once upon a time")
                                                           : Result<std::vector<int64_t>>({1, 2, 3});
    if (!session || !prompt) return 2;
    const int64_t tokens = std::min(kMostTokens, session->capacity() - std::ssize(*prompt));
    Rng rng(1);
    const GenerationOptions options{{.temperature = 0.8,
                                     .top_k = 40,
                                     .top_p = 0.9,
                                     .min_p = 0.01,
                                     .repetition_penalty = 1.1,
                                     .presence_penalty = 0.1,
                                     .frequency_penalty = 0.1,
                                     .logit_bias = {{1, 0.5}}},
                                    tokens + 1,
                                    {},
                                    (*program)->tokenizer() != nullptr ? std::vector<std::string>{" the end of it all"}
                                                                       : std::vector<std::string>{},
                                    5};
    auto generator = Generator::create(*session, *prompt, options, rng, (*program)->tokenizer());
    if (!generator || !decode(*generator, tokens)) return 2;
    // Checks that the counter works.
    counting = true;
    const size_t before = count;
    delete new std::string(100, 'x');
    counting = false;
    if (count == before) return std::printf("the interposer is not in place\n"), 2;
    count = before;
    return report(tokens);
}
