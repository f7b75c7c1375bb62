// Masked similarity (Zhang et al., SG-One, arXiv:1810.09091): the cosine of every pixel of a query with the mean of
// what masked average pooling makes of K supports, forward and backward.
//
//   prototype[c] = 1/K sum_k pooled_k[c]      (masked_average_pool.h; the pooled vectors are not normalised)
//   similarity[p] = <query[:, p], prototype> / (max(|query[:, p]|, eps) max(|prototype|, eps))
#pragma once

#include "gingham/core.h"
#include "gingham/cosine_similarity_map.h"
#include "gingham/masked_average_pool.h"

namespace gingham {

struct MaskedSimilarityShape {
  int64_t batch = 0;
  int64_t shots = 0;
  int64_t channels = 0;
  int64_t rows = 0;  // of the query
  int64_t columns = 0;
  int64_t support_rows = 0;
  int64_t support_columns = 0;
  int64_t mask_rows = 0;
  int64_t mask_columns = 0;
};

// query and support: column_stride is 1 (channels first) or channel_stride is 1 (channels last), each for itself; the
// other strides are free. mask: column_stride is 1. In support and mask frame_stride is that of the shots.
//
// valid_sizes [batch, shots, 4], contiguous, or null: of every support the rows and columns of its features and of its
// mask that count, from the upper left; the others are not read. They lie in [0, extent]; CUDA takes what lies outside
// for the nearest that does not.
//
// similarity [batch, rows, columns] is of `dtype`. What backward reads is float32, of float64 maps float64: weights
// [batch, shots, support_rows * support_columns], those of the positions that count one row after the other, then
// zeros; totals [batch, shots]; prototype [batch, channels]; query_norms |query[:, p]| [batch, rows, columns]. All are
// contiguous.
struct MaskedSimilarityForward {
  MaskedSimilarityShape shape;
  DType dtype = DType::float32;
  MaskType mask_type = MaskType::float32;
  MaskResize resize = MaskResize::features;
  CosineNorms norms;
  MapView query, support, mask;
  const int64_t* valid_sizes = nullptr;
  void* similarity = nullptr;
  void* weights = nullptr;
  void* totals = nullptr;
  void* prototype = nullptr;
  void* query_norms = nullptr;
};

// similarity and grad_similarity are contiguous, of `dtype`. A gradient whose data is null is not computed; others are
// written, not accumulated into: zero where valid_sizes lets nothing count. grad_mask has neighbouring columns and is
// of mask_type, which then is a floating one.
struct MaskedSimilarityBackward {
  MaskedSimilarityShape shape;
  DType dtype = DType::float32;
  MaskType mask_type = MaskType::float32;
  MaskResize resize = MaskResize::features;
  CosineNorms norms;
  MapView query, support;
  const int64_t* valid_sizes = nullptr;
  const void* similarity = nullptr;
  const void* grad_similarity = nullptr;
  const void* weights = nullptr;
  const void* totals = nullptr;
  const void* prototype = nullptr;
  const void* query_norms = nullptr;
  MapView grad_query, grad_support, grad_mask;
};

GINGHAM_DECLARE_CALL(MaskedSimilarityForward)
GINGHAM_DECLARE_CALL(MaskedSimilarityBackward)

}  // namespace gingham
