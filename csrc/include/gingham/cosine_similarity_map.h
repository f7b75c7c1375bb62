// The cosine of every pixel of a feature map with a set of prototypes (SG-One, arXiv:1810.09091), forward and backward.
//
//   output[k, p] = <features[:, p], prototypes[k]> / (max(|features[:, p]|, eps) max(|prototypes[k]|, eps))
#pragma once

#include "gingham/core.h"

namespace gingham {

struct CosineSimilarityMapShape {
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t prototypes = 0;
  int64_t rows = 0;
  int64_t columns = 0;
};

// What becomes of a norm that is not above eps (eps >= 0): its cosines are 0 and let no gradient through; or, where
// torch_compat, the norm counts as eps and gradients are those of torch.nn.functional.cosine_similarity.
struct CosineNorms {
  double eps = 1e-8;
  bool torch_compat = false;
};

// Vectors [batch, prototype, channel], channels adjacent; strides in elements.
struct PrototypeView {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t prototype_stride = 0;
};

// features and output, [batch, channels, rows, columns] and [batch, prototypes, rows, columns], have one layout: either
// both column_strides are 1 (channels first) or both channel_strides are 1 (channels last); the other strides are free.
// The norms |features[:, p]|, [batch, rows, columns], and |prototypes[k]|, [batch, prototypes], are contiguous float32,
// of float64 maps float64, and are not raised to eps.
struct CosineSimilarityMapForward {
  CosineSimilarityMapShape shape;
  DType dtype = DType::float32;
  CosineNorms norms;
  MapView features;
  PrototypeView prototypes;
  MapView output;
  void* feature_norms = nullptr;
  void* prototype_norms = nullptr;
};

// The gradients are written, not accumulated into; all maps have the layout of features, grad_prototypes is contiguous.
struct CosineSimilarityMapBackward {
  CosineSimilarityMapShape shape;
  DType dtype = DType::float32;
  CosineNorms norms;
  MapView features;
  PrototypeView prototypes;
  MapView output, grad_output;
  const void* feature_norms = nullptr;
  const void* prototype_norms = nullptr;
  MapView grad_features;
  PrototypeView grad_prototypes;
};

GINGHAM_DECLARE_CALL(CosineSimilarityMapForward)
GINGHAM_DECLARE_CALL(CosineSimilarityMapBackward)

}  // namespace gingham
