// RoI max pooling (Girshick, Fast R-CNN, ICCV 2015), forward and backward.
//
// A box (image, x1, y1, x2, y2) covers the pixels from R(x1 * scale) to R(x2 * scale), both included, at least one; R
// rounds half away from zero. Each axis is cut into bins of extent / pooled pixels, from floor(i * bin) to
// ceil((i + 1) * bin), which overlap; what lies outside of the map is cut off. All of it in the type of the boxes.
//   output[n, c, i, j] = the first maximum, in raster order, of the bin's pixels that are greater than -FLT_MAX;
//                        -FLT_MAX where there are none; 0 where the bin has no pixel
//   gradient           of that pixel: the sum over all outputs that took it
#pragma once

#include <cmath>

#include "gingham/core.h"

namespace gingham {

// A plane has fewer than 2^31 pixels.
struct RoiPoolShape {
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t boxes = 0;
  int64_t pooled_rows = 0;
  int64_t pooled_columns = 0;
};

// features and output share one dtype and one layout: either column_stride is 1 (channels first) or channel_stride is 1
// (channels last). The output's [row, column] are adjacent: row_stride == pooled_columns * column_stride.
// boxes: [boxes, 5], contiguous, float64 beside float64 features, otherwise float32. On the CPU all are valid (see
// first_invalid_box); on CUDA the output of others is NaN and their gradient 0.
// places: int32 in the output's layout, where the maxima are, row * columns + column, and -1 where there is none; not
// written where there is no data.
struct RoiPoolForward {
  RoiPoolShape shape;
  DType dtype = DType::float32;
  double spatial_scale = 1.0;
  MapView features;
  const void* boxes = nullptr;
  MapView output;
  MapView places;
};

// grad_output may have any strides where channels come first, otherwise its channel_stride is 1. grad_features is
// written, not accumulated into; it has the layout of features and adjacent [row, column]. Sums run over the boxes and
// their outputs in order. places are those of forward, adjacent as the features' pixels or channels are, and features
// then give their layout only; where places have no data, they are found anew.
struct RoiPoolBackward {
  RoiPoolShape shape;
  DType dtype = DType::float32;
  double spatial_scale = 1.0;
  MapView features;
  const void* boxes = nullptr;
  MapView places;
  MapView grad_output;
  MapView grad_features;
};

// The first box that names no image of the batch or has a coordinate that is not finite; -1 if there is none.
inline int64_t first_invalid_box(const void* boxes, DType dtype, int64_t count, int64_t batch) {
  const auto find = [&](const auto* box) {
    for (int64_t n = 0; n < count; ++n, box += 5) {
      bool is_valid = box[0] >= 0 && box[0] < batch && box[0] == std::floor(box[0]);
      for (int i = 1; i < 5; ++i) is_valid = is_valid && std::isfinite(box[i]);
      if (!is_valid) return n;
    }
    return int64_t{-1};
  };
  return dtype == DType::float64 ? find(static_cast<const double*>(boxes)) : find(static_cast<const float*>(boxes));
}

GINGHAM_DECLARE_CALL(RoiPoolForward)
GINGHAM_DECLARE_CALL(RoiPoolBackward)

}  // namespace gingham
