// torch.ops.gingham.cosine_similarity_map and its backward.
#include "gingham/cosine_similarity_map.h"

#include "norms.h"
#include "run_call.h"
#include "tensor.h"

namespace gingham::torch_front {
namespace {

constexpr Checks require("cosine_similarity_map");

CosineSimilarityMapShape checked_shape(const Tensor& features, const Tensor& prototypes) {
  require.floating(features);
  require(features.dim() == 4, "features must be [B, C, H, W]");
  require(prototypes.dim() == 3, "prototypes must be [B, P, C]");
  require(features.size(1) > 0, "features must have at least one channel");
  require(prototypes.dtype() == features.dtype(), "features and prototypes must have one dtype");
  require.same_device(prototypes, features, "features and prototypes must be on one device");
  require(prototypes.size(0) == features.size(0) && prototypes.size(2) == features.size(1),
          "features and prototypes must have the same batch and channels");
  return {features.size(0), features.size(1), prototypes.size(1), features.size(2), features.size(3)};
}

PrototypeView view_of_prototypes(const Tensor& prototypes, void* data) {
  return {data, prototypes.stride(0), prototypes.stride(1)};
}
// In place where channels are adjacent, otherwise from a copy.
PrototypeView read_prototypes(const Tensor& prototypes, Tensor& copy) {
  const bool adjacent = prototypes.stride(2) == 1 || prototypes.size(2) <= 1;
  const Tensor& vectors = adjacent ? prototypes : contiguous(prototypes, copy);
  return view_of_prototypes(vectors, const_cast<void*>(vectors.data()));
}

template <bool cuda>
void forward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor features = tensor_argument(stack[0]), prototypes = tensor_argument(stack[1]);
  CosineSimilarityMapForward call;
  call.shape = checked_shape(features, prototypes);
  call.dtype = dtype_of(features);
  call.norms = norms_argument(require, stack[2], stack[3]);
  const bool channels_last = is_channels_last(features);
  Tensor copies[2];
  call.features = read_view(native_map(features, channels_last, copies[0]));
  call.prototypes = read_prototypes(prototypes, copies[1]);
  const auto& s = call.shape;
  const int64_t sizes[] = {s.batch, s.prototypes, s.rows, s.columns};
  Tensor output = empty_map(sizes, features, channels_last);
  Tensor feature_norms = empty_contiguous({s.batch, s.rows, s.columns}, sum_dtype(features), features);
  Tensor prototype_norms = empty_contiguous({s.batch, s.prototypes}, sum_dtype(features), features);
  call.output = write_view(output);
  call.feature_norms = feature_norms.mutable_data();
  call.prototype_norms = prototype_norms.mutable_data();
  run_call<cuda>(call, features);
  stack[0] = output.release();
  stack[1] = feature_norms.release();
  stack[2] = prototype_norms.release();
}

template <bool cuda>
void backward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor grad = tensor_argument(stack[0]), features = tensor_argument(stack[1]), prototypes = tensor_argument(stack[2]),
         output = tensor_argument(stack[3]), feature_norms = tensor_argument(stack[4]),
         prototype_norms = tensor_argument(stack[5]);
  CosineSimilarityMapBackward call;
  call.shape = checked_shape(features, prototypes);
  call.dtype = dtype_of(features);
  call.norms = norms_argument(require, stack[6], stack[7]);
  const auto& s = call.shape;
  const int64_t sizes[] = {s.batch, s.prototypes, s.rows, s.columns};
  require.same(grad, sizes, 4, features.dtype(), features, "grad_output must be [B, P, H, W], like the output");
  require.same(output, sizes, 4, features.dtype(), features, "output must be what the forward returned");
  const int64_t pixels[] = {s.batch, s.rows, s.columns}, vectors[] = {s.batch, s.prototypes};
  require.same(feature_norms, pixels, 3, sum_dtype(features), features,
               "feature_norms must have the shape, dtype and device of what the forward returned");
  require.same(prototype_norms, vectors, 2, sum_dtype(features), features,
               "prototype_norms must have the shape, dtype and device of what the forward returned");
  const bool channels_last = is_channels_last(features);
  Tensor copies[6];
  call.features = read_view(native_map(features, channels_last, copies[0]));
  call.prototypes = read_prototypes(prototypes, copies[1]);
  call.output = read_view(native_map(output, channels_last, copies[2]));
  call.grad_output = read_view(native_map(grad, channels_last, copies[3]));
  call.feature_norms = contiguous(feature_norms, copies[4]).data();
  call.prototype_norms = contiguous(prototype_norms, copies[5]).data();
  Tensor grad_features = empty_map(features.sizes(), features, channels_last);
  Tensor grad_prototypes = empty_contiguous(3, prototypes.sizes(), prototypes.dtype(), prototypes);
  call.grad_features = write_view(grad_features);
  call.grad_prototypes = view_of_prototypes(grad_prototypes, grad_prototypes.mutable_data());
  run_call<cuda>(call, features);
  stack[0] = grad_features.release();
  stack[1] = grad_prototypes.release();
}

}  // namespace

void define_cosine_similarity_map(Library& library) {
  library.define_with_backward(
      "cosine_similarity_map",
      "(Tensor features, Tensor prototypes, float eps, bool torch_compat=False) -> (Tensor, Tensor, Tensor)",
      "(Tensor grad_output, Tensor features, Tensor prototypes, Tensor output, Tensor feature_norms, "
      "Tensor prototype_norms, float eps, bool torch_compat=False) -> (Tensor, Tensor)");
}

void implement_cosine_similarity_map(Library& library, bool cuda) {
  library.implement_with_backward("cosine_similarity_map", cuda ? forward<true> : forward<false>,
                                  cuda ? backward<true> : backward<false>);
}

}  // namespace gingham::torch_front
