// Sums over memory, over a warp and over a block, in an order that counts and the number of threads alone fix.
#pragma once

#include <cstdint>

#include "primitives.cuh"

namespace gingham::cuda {

// The sum of `count` values that lie `stride` apart; kAhead loads are under way at a time. (Where a loaded value is
// used in a branch, the compiler moves the load there; where it is selected, it stays with the others.)
template <int kAhead, class T>
__device__ inline T sum_of_memory(const T* values, int64_t count, int64_t stride) {
  T sum = 0;
  for (int64_t first = 0; first < count; first += kAhead) {
    T loaded[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) loaded[i] = values[(first + i < count ? first + i : first) * stride];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) sum += first + i < count ? loaded[i] : T(0);
  }
  return sum;
}

// Every lane gets the sum.
template <class T>
__device__ inline T sum_of_warp(T x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// Every thread gets the sum. shared: kWarps values, free to be used again when the function has returned.
template <int kWarps, class T>
__device__ inline T sum_of_block(T x, T* shared) {
  x = sum_of_warp(x);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  T sum = shared[0];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) sum += shared[i];
  __syncthreads();
  return sum;
}

}  // namespace gingham::cuda
