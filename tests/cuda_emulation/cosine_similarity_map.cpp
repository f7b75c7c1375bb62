#include "gingham/cosine_similarity_map.h"

#include "c_interface.h"

namespace {

struct Arrays {
  Map features, output, grad_output, grad_features;
  void *prototypes, *grad_prototypes;
  int64_t prototype_stride;
  void *feature_norms, *prototype_norms;
};

gingham::CosineSimilarityMapShape shape_of(const int64_t* s) { return {s[0], s[1], s[2], s[3], s[4]}; }

gingham::CosineSimilarityMapBackward backward_call(const int64_t* shape, int dtype, double eps, bool torch_compat,
                                                   const Arrays& arrays) {
  gingham::CosineSimilarityMapBackward call;
  call.shape = shape_of(shape);
  call.dtype = gingham::DType(dtype);
  call.norms = {eps, torch_compat};
  call.features = view_of(arrays.features);
  call.prototypes = {arrays.prototypes, call.shape.prototypes * arrays.prototype_stride, arrays.prototype_stride};
  call.output = view_of(arrays.output);
  call.grad_output = view_of(arrays.grad_output);
  call.feature_norms = arrays.feature_norms;
  call.prototype_norms = arrays.prototype_norms;
  call.grad_features = view_of(arrays.grad_features);
  call.grad_prototypes = {arrays.grad_prototypes, call.shape.prototypes * call.shape.channels, call.shape.channels};
  return call;
}

}  // namespace

extern "C" {

const char* forward(const int64_t* shape, int dtype, double eps, bool torch_compat, const Arrays* arrays,
                    unsigned seed) {
  const auto like = backward_call(shape, dtype, eps, torch_compat, *arrays);
  gingham::CosineSimilarityMapForward call;
  call.shape = like.shape;
  call.dtype = like.dtype;
  call.norms = like.norms;
  call.features = like.features;
  call.prototypes = like.prototypes;
  call.output = like.output;
  call.feature_norms = arrays->feature_norms;
  call.prototype_norms = arrays->prototype_norms;
  return report(seed, [&] { gingham::cuda::run(call, nullptr, nullptr); });
}

size_t backward_workspace(const int64_t* shape, int dtype, const Arrays* arrays) {
  return gingham::cuda::workspace_size(backward_call(shape, dtype, 0, false, *arrays));
}

const char* backward(const int64_t* shape, int dtype, double eps, bool torch_compat, const Arrays* arrays,
                     void* workspace, unsigned seed) {
  const auto call = backward_call(shape, dtype, eps, torch_compat, *arrays);
  return report(seed, [&] { gingham::cuda::run(call, workspace, nullptr); });
}

}  // extern "C"
