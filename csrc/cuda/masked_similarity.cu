// Masked similarity on CUDA: the pooled means of mask_pooling.cuh and, with them, the cosines of cosine.cuh.
//
// Four launches forward; five backward, and three more with the gradient of the mask. Floor: supports and query read
// once; backward, the query read and its and the supports' gradients written once. Beside the results, a number or two
// a position and vectors of channels.
#include "cosine.cuh"
#include "gingham/masked_similarity.h"
#include "mask_pooling.cuh"
#include "workspace.cuh"

namespace gingham::cuda {
namespace {

template <class Call>
Supports supports_of(const Call& call, const MapView& mask) {
  const MaskedSimilarityShape& s = call.shape;
  const Extent full{s.support_rows, s.support_columns, s.mask_rows, s.mask_columns};
  return {s.batch, s.shots, s.channels, full, call.mask_type, call.resize, call.support, mask, call.valid_sizes};
}

// [image][row][column] as a map of one channel.
template <class T>
PixelMap<T> one_channel(T* data, int64_t pixels) {
  return {data, pixels, pixels, 0, 1, pixels};
}

template <class T>
struct Forward {
  const MaskedSimilarityForward& call;
  Supports supports;
  int64_t parts;
  Sum<T>*plain, *sums, *norms;

  Forward(const MaskedSimilarityForward& call, Workspace& workspace)
      : call(call),
        supports(supports_of(call, call.mask)),
        parts(parts_of_pool(supports)),
        plain(workspace.take<Sum<T>>(supports.samples() * supports.positions())),
        sums(workspace.take<Sum<T>>(supports.samples() * parts * supports.channels)),
        norms(workspace.take<Sum<T>>(supports.batch)) {}

  void run(void* stream) const {
    using S = Sum<T>;
    const MaskedSimilarityShape& s = call.shape;
    auto* weights = static_cast<S*>(call.weights);
    auto* prototype = static_cast<S*>(call.prototype);
    launch_find_weights<S>({supports, weights, plain}, stream);
    launch_pool<T>({supports, weights, sums, parts, 1}, stream);
    launch_mean_of_shots<T, S>({supports, parts, plain, sums, static_cast<S*>(call.totals), prototype, norms}, stream);
    const int64_t pixels = s.rows * s.columns;
    CosinePass<T, S> pass{};
    pass.images = s.batch;
    pass.channels = s.channels;
    pass.pixels = pixels;
    pass.prototypes = pass.count = 1;
    pass.rule = norm_rule<S>(call.norms);
    pass.features = pixel_map<const T>(call.query, s.rows, s.columns);
    pass.vectors = {prototype, s.channels, s.channels};
    pass.vector_norms = norms;
    pass.output = one_channel(static_cast<T*>(call.similarity), pixels);
    pass.norms = static_cast<S*>(call.query_norms);
    launch_cosines<1>(pass, lanes_are_channels(call.query, s.rows, s.columns), stream);
  }
};

template <class T>
struct Backward {
  const MaskedSimilarityBackward& call;
  Supports supports, query;  // the query as what a weighted sum is taken of
  bool channels_last;
  int64_t pixels, parts;
  Sum<T>*norms, *a, *b, *t, *sums, *slopes, *products;

  Backward(const MaskedSimilarityBackward& call, Workspace& workspace)
      : call(call),
        supports(supports_of(call, {})),
        query{call.shape.batch, 1,           call.shape.channels, {call.shape.rows, call.shape.columns, 1, 1},
              call.mask_type,   call.resize, call.query,          {},
              nullptr},
        // Maps of one column may pass for either layout; the gradient's must be the one that is written.
        channels_last(lanes_are_channels(call.query, call.shape.rows, call.shape.columns) &&
                      (!call.grad_query.data || call.grad_query.channel_stride == 1)),
        pixels(call.shape.rows * call.shape.columns),
        parts(call.grad_query.data ? gradient_parts(pixels, channels_last) : parts_of_pool(query)) {
    const MaskedSimilarityShape& s = call.shape;
    norms = workspace.take<Sum<T>>(s.batch);
    a = workspace.take<Sum<T>>(s.batch * pixels);
    b = workspace.take<Sum<T>>(s.batch * pixels);
    t = workspace.take<Sum<T>>(s.batch * factor_blocks(pixels));
    sums = workspace.take<Sum<T>>(s.batch * parts * s.channels);
    slopes = workspace.take<Sum<T>>(s.batch * s.channels);
    products = workspace.take<Sum<T>>(call.grad_mask.data ? supports.samples() * supports.positions() : 0);
  }

  void run(void* stream) const {
    using S = Sum<T>;
    const MaskedSimilarityShape& s = call.shape;
    const auto* weights = static_cast<const S*>(call.weights);
    const auto* totals = static_cast<const S*>(call.totals);
    const Vectors<S> prototypes{const_cast<S*>(static_cast<const S*>(call.prototype)), s.channels, s.channels};
    launch_find_norms<T, S>({s.batch, 1, s.channels, prototypes, norms}, stream);
    FactorPass<T> factors{};
    factors.images = s.batch;
    factors.pixels = pixels;
    factors.prototypes = 1;
    factors.rule = norm_rule<S>(call.norms);
    factors.output = one_channel(static_cast<const T*>(call.similarity), pixels);
    factors.grad_output = one_channel(static_cast<const T*>(call.grad_similarity), pixels);
    factors.norms = static_cast<const S*>(call.query_norms);
    factors.vector_norms = norms;
    factors.a = a;
    factors.b = b;
    factors.t = t;
    launch_find_factors(factors, stream);
    if (call.grad_query.data) {
      GradientPass<T, S> gradients{};
      gradients.images = s.batch;
      gradients.channels = s.channels;
      gradients.pixels = pixels;
      gradients.prototypes = 1;
      gradients.parts = parts;
      gradients.features = pixel_map<const T>(call.query, s.rows, s.columns);
      gradients.grad_features = pixel_map<T>(call.grad_query, s.rows, s.columns);
      gradients.vectors = prototypes;
      gradients.a = a;
      gradients.b = b;
      gradients.sums = sums;
      launch_gradients<1>(gradients, channels_last, stream);
    } else {
      launch_pool<T>({query, a, sums, parts, 1}, stream);
    }
    if (!call.grad_support.data && !call.grad_mask.data) return;
    FinishPass<T, S> finish{};
    finish.images = s.batch;
    finish.channels = s.channels;
    finish.prototypes = 1;
    finish.parts = parts;
    finish.factor_blocks = factor_blocks(pixels);
    finish.rule = factors.rule;
    finish.vectors = prototypes;
    finish.vector_norms = norms;
    finish.t = t;
    finish.sums = sums;
    finish.grad_vectors = {slopes, s.channels, s.channels};
    launch_finish(finish, stream);
    const S scale = S(1) / static_cast<S>(s.shots);
    if (call.grad_support.data) {
      launch_spread<T, S>({supports, call.grad_support, weights, totals, slopes, scale, 1}, stream);
    }
    if (call.grad_mask.data) {
      launch_mask_gradient<T, S>({supports, call.grad_mask, weights, totals, slopes, scale, products, false}, stream);
    }
  }
};

}  // namespace

size_t workspace_size(const MaskedSimilarityForward& call) { return size_of_workspace<Forward>(call); }
size_t workspace_size(const MaskedSimilarityBackward& call) { return size_of_workspace<Backward>(call); }
void run(const MaskedSimilarityForward& call, void* workspace, void* stream) {
  run_in_workspace<Forward>(call, workspace, stream);
}
void run(const MaskedSimilarityBackward& call, void* workspace, void* stream) {
  run_in_workspace<Backward>(call, workspace, stream);
}

}  // namespace gingham::cuda
