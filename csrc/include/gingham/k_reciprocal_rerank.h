// k-reciprocal re-ranking (Zhong et al., CVPR 2017): distances between queries and gallery items that take into account
// which of all N = queries + gallery items, queries first, are among each other's nearest.
//
//   D[i, j]  = squared Euclidean distance, Dn[i, j] = D[i, j] / max_j D[i, j]
//   N(i, k)  = i itself and the k others nearest to it, of equals those with the smaller index
//   R(i, k)  = those j of N(i, k) with i in N(j, k)
//   R*(i)    = R(i, k1) and every R(j, h), j in R(i, k1), of which more than two thirds are in R(i, k1);
//              h = k1 / 2, halves rounded to even
//   V[i, j]  = exp(-Dn[i, j]) / (their sum over j) for j in R*(i), otherwise 0
//   V'[i]    = the mean of V[j] over the first k2 items of N(i, .)
//   m[i, j]  = sum_l min(V'[i, l], V'[j, l])
//   output   = (1 - lambda) (1 - m / (2 - m)) + lambda Dn      of every query i and gallery item j
//
// k1 and k2 end where the items end.
#pragma once

#include "gingham/core.h"

namespace gingham {

struct KReciprocalRerankShape {
  int64_t queries = 0;
  int64_t gallery = 0;
  int64_t channels = 0;
};

// Rows of contiguous features, row_stride elements apart.
struct FeatureRows {
  const void* data = nullptr;
  int64_t row_stride = 0;
};

enum class NotFinite : int32_t { none = 0, query_features = 1, gallery_features = 2 };

struct KReciprocalRerankForward {
  KReciprocalRerankShape shape;
  DType dtype = DType::float32;  // of the features
  int64_t k1 = 20, k2 = 6;       // at least 1
  double lambda = 0.3;           // in [0, 1]
  FeatureRows query_features, gallery_features;
  void* output = nullptr;           // [queries][gallery], contiguous: float64 for float64 features, otherwise float32
  NotFinite* not_finite = nullptr;  // written: which features have a NaN or an infinity; then output is not written
};

// How much of its workspace a call touches depends on how many items are among each other's nearest, and is usually a
// small part.
GINGHAM_DECLARE_CPU_CALL(KReciprocalRerankForward)

}  // namespace gingham
