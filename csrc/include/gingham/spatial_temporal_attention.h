// Spatial-temporal attention (Fu et al., STA, AAAI 2019): a clip's frames are scored part by part, a part being a band
// of rows, by where the energy of their features lies, and the clip is pooled twice by these scores.
//
// With the features f of a clip, its frames t and the positions p of a frame, of which band k takes the rows
// [k * rows / parts, (k + 1) * rows / parts) (rounded down, so that every position lies in one band):
//   energy[t, p] = sum_c f[t, c, p]^2, or its square root             (SpatialEnergy)
//   map[t, p]    = energy[t, p] / max(total[t], eps)                  total: the sum of energy, or its L2 norm
//   shares[t, k] = sum, or mean, of map[t, p] over the band
//   scores[t, k] = shares[t, k] / max(part_totals[k], eps)            part_totals[k] = sum_t shares[t, k]
//   chosen[k]    = the first t with the largest shares[t, k]
//   sums[t, k, c] = sum of f[t, c, p] over the band
//   pooled[c]            = 1 / (rows * columns) * sum_k sums[chosen[k], k, c]
//   pooled[channels + c] = 1 / (rows * columns) * sum_k sum_t scores[t, k] * sums[t, k, c]
// The last two are the means of the aggregates that the paper writes as whole maps, which nobody needs as such.
#pragma once

#include "gingham/core.h"

namespace gingham {

struct SpatialTemporalShape {
  int64_t batch = 0;     // clips
  int64_t frames = 1;    // of a clip, at least 1
  int64_t channels = 0;  // may be 0
  int64_t rows = 1;      // at least 1
  int64_t columns = 1;   // at least 1
  int64_t parts = 1;     // 1 to rows
};

enum class SpatialEnergy : int32_t {
  sq = 0,    // squares, divided by their sum, summed over bands: the paper's formula
  l2 = 1,    // L2 norms, divided by their sum, summed over bands
  agrl = 2,  // L2 norms, divided by their L2 norm, averaged over bands
};

// Below, `Sum` is float, or double where dtype is float64. Arrays of Sum are contiguous.

// What can be said of every frame alone. features has either column_stride 1 (channels first) or channel_stride 1
// (channels last); its other strides are free.
struct SpatialTemporalSums {
  SpatialTemporalShape shape;
  DType dtype = DType::float32;
  SpatialEnergy energy = SpatialEnergy::sq;
  double eps = 1e-12;
  MapView features;
  void* sums = nullptr;    // Sum [batch, frames, parts, channels]
  void* shares = nullptr;  // Sum [batch, frames, parts]
  void* map = nullptr;     // Sum [batch, frames, rows, columns]
  void* totals = nullptr;  // Sum [batch, frames]
};

// The gradient of features, which is written, not accumulated into, and has the memory order of features. Where a total
// is not above eps, no gradient passes it.
struct SpatialTemporalSumsBackward {
  SpatialTemporalShape shape;
  DType dtype = DType::float32;
  SpatialEnergy energy = SpatialEnergy::sq;
  double eps = 1e-12;
  MapView features;
  const void* map = nullptr;
  const void* totals = nullptr;
  const void* grad_sums = nullptr;    // Sum [batch, frames, parts, channels]
  const void* grad_shares = nullptr;  // Sum [batch, frames, parts]
  const void* grad_map = nullptr;     // Sum [batch, frames, rows, columns], or null for zeros
  MapView grad_features;
};

// What is made of a clip's frames. dtype is that of pooled.
struct SpatialTemporalPooling {
  SpatialTemporalShape shape;
  DType dtype = DType::float32;
  double eps = 1e-12;
  const void* sums = nullptr;
  const void* shares = nullptr;
  void* pooled = nullptr;       // of dtype [batch, 2 * channels], contiguous
  void* scores = nullptr;       // Sum [batch, frames, parts]
  int64_t* chosen = nullptr;    // [batch, parts]
  void* part_totals = nullptr;  // Sum [batch, parts]
};

// The gradients of sums and shares. detach_attention: none passes from pooled to the scores.
struct SpatialTemporalPoolingBackward {
  SpatialTemporalShape shape;
  DType dtype = DType::float32;
  double eps = 1e-12;
  bool detach_attention = false;
  const void* sums = nullptr;
  const void* scores = nullptr;
  const int64_t* chosen = nullptr;
  const void* part_totals = nullptr;
  const void* grad_pooled = nullptr;  // of dtype [batch, 2 * channels], contiguous
  const void* grad_scores = nullptr;  // Sum [batch, frames, parts]
  void* grad_sums = nullptr;
  void* grad_shares = nullptr;
};

GINGHAM_DECLARE_CALL(SpatialTemporalSums)
GINGHAM_DECLARE_CALL(SpatialTemporalSumsBackward)
GINGHAM_DECLARE_CALL(SpatialTemporalPooling)
GINGHAM_DECLARE_CALL(SpatialTemporalPoolingBackward)

}  // namespace gingham
