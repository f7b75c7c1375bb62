// From a DType to the storage type of simd.h.
#pragma once

#include "gingham/core.h"
#include "simd.h"

namespace {

// Calls function(E{}) for the storage type E of dtype and returns what it returns.
template <class Function>
inline auto with_element([[maybe_unused]] gingham::DType dtype, const Function& function) {
#if defined(__AVX512BF16__)
  return function(BFloat16{});  // dispatch.cpp leaves the other types to avx512
#else
  switch (dtype) {
    case gingham::DType::float64:
      return function(double{});
    case gingham::DType::float16:
      return function(Half{});
    case gingham::DType::bfloat16:
      return function(BFloat16{});
    default:
      return function(float{});
  }
#endif
}

}  // namespace
