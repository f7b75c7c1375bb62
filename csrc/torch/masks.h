// What masked_average_pool's and masked_similarity's front ends share.
#pragma once

#include "gingham/masked_average_pool.h"
#include "tensor.h"

namespace gingham::torch_front {

inline MaskType mask_type_of(const Checks& require, const Tensor& mask) {
  static const int32_t kBool = aoti_torch_dtype_bool(), kUint8 = aoti_torch_dtype_uint8();
  if (mask.dtype() == kBool || mask.dtype() == kUint8) return MaskType::uint8;
  require.floating(mask);
  return MaskType(dtype_of(mask));
}

inline MaskResize resize_argument(StableIValue resize_mask) {
  return bool_argument(resize_mask) ? MaskResize::mask : MaskResize::features;
}

// The gradient of a tensor that asks for none.
inline Tensor no_gradient(const Tensor& like) { return empty_contiguous({0}, like.dtype(), like); }

}  // namespace gingham::torch_front
