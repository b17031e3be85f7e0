/* A fake of the CUDA runtime for tests: memory of the host, and a record of copies. */
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "calls.hpp"

enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
struct CUstream_st : fake::Counted {};
using cudaStream_t = CUstream_st*;

inline const char* cudaGetErrorString(cudaError_t) { return "out of memory"; }

inline cudaError_t cudaMalloc(void** place, size_t bytes) {
    fake::record("malloc", bytes);
    if (fake::fails()) return cudaErrorMemoryAllocation;
    *place = std::malloc(bytes);
    ++fake::live;
    return cudaSuccess;
}

inline cudaError_t cudaFree(void* place) {
    if (place != nullptr) --fake::live;
    std::free(place);
    return cudaSuccess;
}

inline cudaError_t cudaStreamCreate(cudaStream_t* stream) {
    *stream = new CUstream_st;
    return cudaSuccess;
}

inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    delete stream;
    return cudaSuccess;
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
    fake::record("synchronise");
    return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
    fake::record(kind == cudaMemcpyHostToDevice ? "upload" : "download", bytes);
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}
