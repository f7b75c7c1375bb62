// Launching a kernel, and what a kernel asks of its block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace gingham::cuda {

// The dynamic shared memory of a block, as bytes aligned to 16.
#define GINGHAM_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]

// The lane's value from lane ^ mask.
template <class T>
__device__ inline T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Bit i says whether the condition holds in lane i.
__device__ inline uint32_t ballot(bool condition) { return __ballot_sync(0xffffffffu, condition); }

// Lanes see what others of their warp wrote to shared memory before.
__device__ inline void synchronize_warp() { __syncwarp(); }

// The lowest bit that is set; there is one.
__device__ inline int lowest_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }

__device__ inline int count_bits(uint32_t bits) { return __popc(bits); }

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // not to be reported again to whoever asks next
  throw std::runtime_error(std::string("gingham: CUDA failed to ") + what + ": " + cudaGetErrorString(error));
}

inline int64_t cache_bytes() {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "name the current device");
  check(cudaDeviceGetAttribute(&value, cudaDevAttrL2CacheSize, device), "describe the current device");
  return value;
}

// Of a workspace, for copies of some images at a time, unless a single one needs more.
constexpr int64_t kCopyBytes = int64_t{256} << 20;

// What the blocks of every shape fit in, and every card gives a block.
constexpr size_t kMostSharedBytes = 96 * 1024;

// The limit set for a kernel is one constant: another thread may launch the same kernel for another shape.
template <class Parameters>
void launch(void (*kernel)(Parameters), int64_t blocks, int threads, size_t shared_bytes, void* stream,
            Parameters parameters) {
  if (blocks == 0) return;
  if (blocks >= int64_t{1} << 31) throw std::runtime_error("gingham: CUDA has no grid of so many blocks");
  if (shared_bytes > kMostSharedBytes) throw std::runtime_error("gingham: a block has more shared memory than it may");
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(kMostSharedBytes)),
          "reserve shared memory");
  }
  void* arguments[] = {&parameters};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                         dim3(static_cast<unsigned>(threads)), arguments, shared_bytes,
                         static_cast<cudaStream_t>(stream)),
        "launch a kernel");
}

}  // namespace gingham::cuda
