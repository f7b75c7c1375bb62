// From a DType to the storage type of numbers.cuh, and conversions to the type in which sums are held.
#pragma once

#include <type_traits>

#include "gingham/core.h"
#include "primitives.cuh"

namespace gingham::cuda {

template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline float to_sum(float x) { return x; }
__device__ inline double to_sum(double x) { return x; }
__device__ inline float to_sum(Float16 x) { return float_of_float16(x.bits); }
__device__ inline float to_sum(BFloat16 x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }

template <class T>
__device__ inline T from_sum(Sum<T> x) {
  if constexpr (std::is_same_v<T, Float16>) {
    return {static_cast<uint16_t>(pack_float16(x, x) & 0xffffu)};
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return {static_cast<uint16_t>(pack_bfloat16(x, x) & 0xffffu)};
  } else {
    return x;
  }
}

// Calls run(T{}) for the storage type T of dtype.
template <class Run>
void with_element(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::float64:
      return run(double{});
    case DType::float16:
      return run(Float16{});
    case DType::bfloat16:
      return run(BFloat16{});
    case DType::float32:
      return run(float{});
  }
}

}  // namespace gingham::cuda
