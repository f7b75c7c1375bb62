// Criss-cross attention (Huang et al., CCNet, ICCV 2019), 2-D and 3-D, forward and backward.
//
// Every position u attends to the positions that differ from it in at most one coordinate (u itself once):
//   logits[u, p] = scale * sum_c query[c, u] * key[c, p]
//   output[c, u] = sum_p softmax_p(logits[u, p]) * value[c, p]
//   lse[u]       = log sum_p exp(logits[u, p])
#pragma once

#include "gingham/core.h"

namespace gingham {

struct CrissCrossShape {
  int64_t batch = 0;
  int64_t key_channels = 0;
  int64_t value_channels = 0;
  int64_t frames = 1;  // 1 for a 2-D map
  int64_t rows = 0;
  int64_t columns = 0;
};

// query, key, value, output share one dtype and one layout: either every column_stride is 1 (channels first) or every
// channel_stride is 1 (channels last); the other strides are free, and so are those of a single column and, map by map,
// of a single channel. lse is [batch, frames, rows, columns], contiguous, float64 whatever the dtype: beside a large
// logit float32 has no room for the logarithm of the sum.
struct CrissCrossForward {
  CrissCrossShape shape;
  DType dtype = DType::float32;
  double scale = 1.0;
  bool allow_tf32 = false;  // on CUDA, float32 products may use TF32 tensor cores
  MapView query, key, value, output;
  double* lse = nullptr;
};

// The gradients are written, not accumulated into; they have the layout of the inputs.
struct CrissCrossBackward {
  CrissCrossShape shape;
  DType dtype = DType::float32;
  double scale = 1.0;
  bool allow_tf32 = false;
  MapView query, key, value, output, grad_output;
  const double* lse = nullptr;
  MapView grad_query, grad_key, grad_value;
};

GINGHAM_DECLARE_CALL(CrissCrossForward)
GINGHAM_DECLARE_CALL(CrissCrossBackward)

}  // namespace gingham
