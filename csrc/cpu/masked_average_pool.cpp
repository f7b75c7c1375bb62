// Masked average pooling on the CPU: mask_pooling.h with one shot an image.
//
// Forward reads the mask and the features once, two operations an element of each; backward writes the features'
// gradient once. Beside the results it keeps a vector of channels for every chunk of positions.
#include "gingham/masked_average_pool.h"

#include "mask_pooling.h"

namespace {

using gingham::MaskedAveragePoolBackward;
using gingham::MaskedAveragePoolForward;
using gingham::MaskedAveragePoolShape;

template <class Call>
Supports supports_of(const Call& call, const MapView& features, const MapView& mask) {
  const MaskedAveragePoolShape& s = call.shape;
  return {s.batch,  1,    s.channels, {s.rows, s.columns, s.mask_rows, s.mask_columns}, call.mask_type, call.resize,
          features, mask, nullptr};
}

template <class E>
struct Forward {
  using Sum = Accumulator<E>;

  const MaskedAveragePoolForward& call;
  Supports supports;
  int threads;
  Sum *weights, *totals;
  MaskWeights<Sum> mask;
  Pooling<E> pooling;
  Sum* means;

  Forward(const MaskedAveragePoolForward& call, int most_threads, Workspace& workspace)
      : call(call),
        supports(supports_of(call, call.features, call.mask)),
        threads(threads_for_elements(supports.elements(), most_threads)),
        weights(static_cast<Sum*>(call.weights)),
        totals(static_cast<Sum*>(call.total)),
        mask(supports, weights, threads, workspace),
        pooling(supports, weights, supports.positions(), threads, workspace),
        means(workspace.take<Sum>(supports.channels)) {}

  void run(ParallelFor parallel_for) const {
    mask.run(parallel_for);
    pooling.run(parallel_for);
    for (int64_t b = 0; b < supports.batch; ++b) {
      totals[b] = mask.total(b);
      pooling.mean(b, totals, means);
      write_row(static_cast<E*>(call.pooled) + b * supports.channels, means, supports.channels);
    }
  }
};

template <class E>
struct Backward {
  using Sum = Accumulator<E>;

  const MaskedAveragePoolBackward& call;
  Supports supports;
  int threads;
  const Sum *weights, *totals;
  Sum* slopes;
  FeatureGradient<E> features;
  MaskGradient<E> mask;

  Backward(const MaskedAveragePoolBackward& call, int most_threads, Workspace& workspace)
      : call(call),
        supports(supports_of(call, call.features, {})),
        threads(threads_for_elements(supports.elements(), most_threads)),
        weights(static_cast<const Sum*>(call.weights)),
        totals(static_cast<const Sum*>(call.total)),
        slopes(workspace.take<Sum>(supports.batch * supports.channels)),
        features(supports, call.grad_features, weights, totals, slopes, threads),
        mask(supports, call.grad_mask, weights, totals, slopes, threads, workspace) {}

  void run(ParallelFor parallel_for) const {
    const E* gradient = static_cast<const E*>(call.grad_pooled);
    for (int64_t i = 0; i < supports.batch * supports.channels; ++i) slopes[i] = to_float(gradient[i]);
    if (call.grad_features.data) features.run(parallel_for);
    if (call.grad_mask.data) mask.run(parallel_for);
  }
};

}  // namespace

namespace gingham::cpu::GINGHAM_ISA {

size_t workspace_size(const MaskedAveragePoolForward& call, int threads) {
  return size_of_workspace<Forward>(call, threads);
}
size_t workspace_size(const MaskedAveragePoolBackward& call, int threads) {
  return size_of_workspace<Backward>(call, threads);
}
void run(const MaskedAveragePoolForward& call, int threads, void* workspace, ParallelFor parallel_for) {
  run_in_workspace<Forward>(call, threads, workspace, parallel_for);
}
void run(const MaskedAveragePoolBackward& call, int threads, void* workspace, ParallelFor parallel_for) {
  run_in_workspace<Backward>(call, threads, workspace, parallel_for);
}

}  // namespace gingham::cpu::GINGHAM_ISA
