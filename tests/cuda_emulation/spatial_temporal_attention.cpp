#include "gingham/spatial_temporal_attention.h"

#include "c_interface.h"

namespace {

// All arrays but the features and their gradient.
struct Arrays {
  void *sums, *shares, *map, *totals, *pooled, *scores;
  int64_t* chosen;
  void *part_totals, *grad_pooled, *grad_scores, *grad_map, *grad_sums, *grad_shares;
};

// What all calls have.
template <class Call>
Call call_of(const int64_t* s, int dtype, double eps) {
  Call call;
  call.shape = {s[0], s[1], s[2], s[3], s[4], s[5]};
  call.dtype = gingham::DType(dtype);
  call.eps = eps;
  return call;
}

gingham::SpatialTemporalSums sums_call(const int64_t* shape, int dtype, int energy, double eps, const Map* features,
                                       const Arrays* arrays) {
  auto call = call_of<gingham::SpatialTemporalSums>(shape, dtype, eps);
  call.energy = gingham::SpatialEnergy(energy);
  call.features = view_of(*features);
  call.sums = arrays->sums;
  call.shares = arrays->shares;
  call.map = arrays->map;
  call.totals = arrays->totals;
  return call;
}

gingham::SpatialTemporalSumsBackward backward_call(const int64_t* shape, int dtype, int energy, double eps,
                                                   const Map* features, const Map* grad_features,
                                                   const Arrays* arrays) {
  auto call = call_of<gingham::SpatialTemporalSumsBackward>(shape, dtype, eps);
  call.energy = gingham::SpatialEnergy(energy);
  call.features = view_of(*features);
  call.map = arrays->map;
  call.totals = arrays->totals;
  call.grad_sums = arrays->grad_sums;
  call.grad_shares = arrays->grad_shares;
  call.grad_map = arrays->grad_map;
  call.grad_features = view_of(*grad_features);
  return call;
}

}  // namespace

extern "C" {

size_t forward_workspace(const int64_t* shape, int dtype, int energy, double eps, const Map* features,
                         const Arrays* arrays) {
  return gingham::cuda::workspace_size(sums_call(shape, dtype, energy, eps, features, arrays));
}

const char* forward(const int64_t* shape, int dtype, int energy, double eps, const Map* features, const Arrays* arrays,
                    void* workspace, unsigned seed) {
  auto pooling = call_of<gingham::SpatialTemporalPooling>(shape, dtype, eps);
  pooling.sums = arrays->sums;
  pooling.shares = arrays->shares;
  pooling.pooled = arrays->pooled;
  pooling.scores = arrays->scores;
  pooling.chosen = arrays->chosen;
  pooling.part_totals = arrays->part_totals;
  return report(seed, [&] {
    gingham::cuda::run(sums_call(shape, dtype, energy, eps, features, arrays), workspace, nullptr);
    gingham::cuda::run(pooling, nullptr, nullptr);
  });
}

size_t backward_workspace(const int64_t* shape, int dtype, int energy, double eps, const Map* features,
                          const Map* grad_features, const Arrays* arrays) {
  return gingham::cuda::workspace_size(backward_call(shape, dtype, energy, eps, features, grad_features, arrays));
}

const char* backward(const int64_t* shape, int dtype, int energy, double eps, const Map* features,
                     const Map* grad_features, const Arrays* arrays, void* workspace, bool detach, unsigned seed) {
  auto pooling = call_of<gingham::SpatialTemporalPoolingBackward>(shape, dtype, eps);
  pooling.detach_attention = detach;
  pooling.sums = arrays->sums;
  pooling.scores = arrays->scores;
  pooling.chosen = arrays->chosen;
  pooling.part_totals = arrays->part_totals;
  pooling.grad_pooled = arrays->grad_pooled;
  pooling.grad_scores = arrays->grad_scores;
  pooling.grad_sums = arrays->grad_sums;
  pooling.grad_shares = arrays->grad_shares;
  return report(seed, [&] {
    gingham::cuda::run(pooling, nullptr, nullptr);
    gingham::cuda::run(backward_call(shape, dtype, energy, eps, features, grad_features, arrays), workspace, nullptr);
  });
}

}  // extern "C"
