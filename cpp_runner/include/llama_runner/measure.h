#pragma once

#include <sys/resource.h>

#include <chrono>
#include <cstdint>
#include <cstdio>

namespace llama_runner {

/// Returns the seconds since an arbitrary fixed moment.
inline double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Returns a value in /proc/self/status in bytes, or 0 on other systems than Linux. getrusage would include the parent
/// process.
inline int64_t status_of(const char* format) {
    long long kilobytes = 0;
#ifdef __linux__
    if (std::FILE* status = std::fopen("/proc/self/status", "r")) {
        char line[256];
        while (kilobytes == 0 && std::fgets(line, sizeof line, status)) {
            if (std::sscanf(line, format, &kilobytes) != 1) kilobytes = 0;
        }
        std::fclose(status);
    }
#endif
    return kilobytes * 1024;
}

/// Returns the peak memory of this process in bytes, mapped files included.
inline int64_t peak_memory() {
    if (const int64_t found = status_of("VmHWM: %lld kB"); found > 0) return found;
#ifdef __linux__
    constexpr int64_t kUnit = 1024;
#else
    constexpr int64_t kUnit = 1;
#endif
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    return int64_t{usage.ru_maxrss} * kUnit;
}

/// Returns the memory of this process in bytes, mapped files included; its peak if the system does not report it.
inline int64_t memory() {
    const int64_t found = status_of("VmRSS: %lld kB");
    return found > 0 ? found : peak_memory();
}

}  // namespace llama_runner
