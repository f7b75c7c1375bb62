// What cosine_similarity_map's and masked_similarity's front ends share.
#pragma once

#include <cmath>

#include "gingham/cosine_similarity_map.h"
#include "tensor.h"

namespace gingham::torch_front {

inline CosineNorms norms_argument(const Checks& require, StableIValue eps, StableIValue torch_compat) {
  const CosineNorms norms{double_argument(eps), bool_argument(torch_compat)};
  require(norms.eps >= 0 && std::isfinite(norms.eps), "eps must be finite and not negative");
  return norms;
}

}  // namespace gingham::torch_front
