// Masked average pooling (Zhang et al., SG-One, arXiv:1810.09091, "masked average pooling"), forward and backward.
//
//   pooled[c] = sum_q weights[q] * features[c, q] / total
//
// With U the bilinear interpolation (align_corners=False) of a map of the features' size to the mask's size and R that
// of the mask's size to the features' size:
//   Resize::features   weights = U^T mask, total = sum of the mask: the mean, under the mask, of U features;
//   Resize::mask       weights = R mask,   total = sum of the weights.
// Where total is 0 the result is 0 and no gradient passes.
#pragma once

#include "gingham/core.h"

namespace gingham {

// The first four are those of DType; uint8 serves bool too.
enum class MaskType : int32_t { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3, uint8 = 4 };

constexpr int64_t mask_element_size(MaskType type) { return type == MaskType::uint8 ? 1 : element_size(DType(type)); }

// What is resized to the size of the other.
enum class MaskResize : int32_t { features = 0, mask = 1 };

struct MaskedAveragePoolShape {
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t mask_rows = 0;
  int64_t mask_columns = 0;
};

// features: column_stride is 1 (channels first) or channel_stride is 1 (channels last); the other strides are free.
// mask: column_stride is 1; batch_stride and row_stride are free, the others are not used.
// pooled [batch, channels] is contiguous, of `dtype`. weights [batch, rows, columns] and total [batch] are contiguous
// float32, of float64 features float64; backward reads them.
struct MaskedAveragePoolForward {
  MaskedAveragePoolShape shape;
  DType dtype = DType::float32;
  MaskType mask_type = MaskType::float32;
  MaskResize resize = MaskResize::features;
  MapView features, mask;
  void* pooled = nullptr;
  void* weights = nullptr;
  void* total = nullptr;
};

// grad_pooled is contiguous, of `dtype`. A gradient whose data is null is not computed; others are written, not
// accumulated into, grad_features in either layout, grad_mask with neighbouring columns, of mask_type, which then is a
// floating one. features is read for grad_mask only.
struct MaskedAveragePoolBackward {
  MaskedAveragePoolShape shape;
  DType dtype = DType::float32;
  MaskType mask_type = MaskType::float32;
  MaskResize resize = MaskResize::features;
  MapView features;
  const void* grad_pooled = nullptr;
  const void* weights = nullptr;
  const void* total = nullptr;
  MapView grad_features, grad_mask;
};

GINGHAM_DECLARE_CALL(MaskedAveragePoolForward)
GINGHAM_DECLARE_CALL(MaskedAveragePoolBackward)

}  // namespace gingham
