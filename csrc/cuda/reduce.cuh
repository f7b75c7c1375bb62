// Sums over a warp and over a block, in an order that the number of threads alone fixes.
#pragma once

#include "primitives.cuh"

namespace gingham::cuda {

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
