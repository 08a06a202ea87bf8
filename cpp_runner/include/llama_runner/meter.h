#pragma once

#include <sys/resource.h>

#include <chrono>
#include <cstdint>
#include <cstdio>

namespace llama_runner {

/// Seconds since some moment.
inline double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// The most memory in bytes that this process held, mapped files included. On Linux getrusage would answer for the
/// process, too, that started this one.
inline int64_t peak_memory() {
#ifdef __linux__
    if (std::FILE* status = std::fopen("/proc/self/status", "r")) {
        char line[256];
        long long kilobytes = 0;
        while (kilobytes == 0 && std::fgets(line, sizeof line, status)) {
            if (std::sscanf(line, "VmHWM: %lld kB", &kilobytes) != 1) kilobytes = 0;
        }
        std::fclose(status);
        if (kilobytes > 0) return kilobytes * 1024;
    }
    constexpr int64_t kUnit = 1024;
#else
    constexpr int64_t kUnit = 1;
#endif
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    return int64_t{usage.ru_maxrss} * kUnit;
}

}  // namespace llama_runner
