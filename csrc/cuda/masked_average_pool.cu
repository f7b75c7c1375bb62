// Masked average pooling on CUDA: mask_pooling.cuh with one shot an image.
//
// Three launches forward, one or, with the gradient of the mask, four backward. Floor: the features read or their
// gradient written once. Beside the results, a number a position and vectors of channels.
#include "gingham/masked_average_pool.h"
#include "mask_pooling.cuh"
#include "workspace.cuh"

namespace gingham::cuda {
namespace {

template <class Call>
Supports supports_of(const Call& call, const MapView& features, const MapView& mask) {
  const MaskedAveragePoolShape& s = call.shape;
  return {s.batch,  1,    s.channels, {s.rows, s.columns, s.mask_rows, s.mask_columns}, call.mask_type, call.resize,
          features, mask, nullptr};
}

template <class T>
struct Forward {
  const MaskedAveragePoolForward& call;
  Supports supports;
  int64_t parts;
  Sum<T>*plain, *sums;

  Forward(const MaskedAveragePoolForward& call, Workspace& workspace)
      : call(call),
        supports(supports_of(call, call.features, call.mask)),
        parts(parts_of_pool(supports)),
        plain(workspace.take<Sum<T>>(supports.samples() * supports.positions())),
        sums(workspace.take<Sum<T>>(supports.samples() * parts * supports.channels)) {}

  void run(void* stream) const {
    auto* weights = static_cast<Sum<T>*>(call.weights);
    launch_find_weights<Sum<T>>({supports, weights, plain}, stream);
    launch_pool<T>({supports, weights, sums, parts, 1}, stream);
    launch_mean_of_shots<T, T>(
        {supports, parts, plain, sums, static_cast<Sum<T>*>(call.total), static_cast<T*>(call.pooled), nullptr},
        stream);
  }
};

template <class T>
struct Backward {
  const MaskedAveragePoolBackward& call;
  Supports supports;
  Sum<T>* products;

  Backward(const MaskedAveragePoolBackward& call, Workspace& workspace)
      : call(call),
        supports(supports_of(call, call.features, {})),
        products(workspace.take<Sum<T>>(supports.samples() * supports.positions())) {}

  void run(void* stream) const {
    const auto* weights = static_cast<const Sum<T>*>(call.weights);
    const auto* totals = static_cast<const Sum<T>*>(call.total);
    const auto* slopes = static_cast<const T*>(call.grad_pooled);
    if (call.grad_features.data) {
      launch_spread<T, T>({supports, call.grad_features, weights, totals, slopes, 1, 1}, stream);
    }
    if (call.grad_mask.data) {
      launch_mask_gradient<T, T>({supports, call.grad_mask, weights, totals, slopes, 1, products, false}, stream);
    }
  }
};

}  // namespace

size_t workspace_size(const MaskedAveragePoolForward& call) { return size_of_workspace<Forward>(call); }
size_t workspace_size(const MaskedAveragePoolBackward& call) { return size_of_workspace<Backward>(call); }
void run(const MaskedAveragePoolForward& call, void* workspace, void* stream) {
  run_in_workspace<Forward>(call, workspace, stream);
}
void run(const MaskedAveragePoolBackward& call, void* workspace, void* stream) {
  run_in_workspace<Backward>(call, workspace, stream);
}

}  // namespace gingham::cuda
