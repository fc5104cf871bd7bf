// The C interface of the compiled kernels: every function that Python calls, and what it takes.
//
// Plain C types only. Pointers are borrowed for the call; nothing is kept, allocated for the caller or thrown. Python's
// side of each struct stands in packlight/native/<name>.py. Threads are OpenMP's, `num_threads` of them in each call.

#pragma once

#include <cstddef>
#include <cstdint>

#define PACKLIGHT_EXPORT extern "C" __attribute__((visibility("default")))

// --- stream.cpp -----------------------------------------------------------------------------------------------------

// The sum of the 64-bit words of `num_bytes` (a multiple of 64) at `memory`.
PACKLIGHT_EXPORT uint64_t packlight_stream_read(const void* memory, size_t num_bytes, int num_threads);
