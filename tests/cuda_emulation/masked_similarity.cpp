#include "gingham/masked_similarity.h"

#include "c_interface.h"

namespace {

// In support and mask the frame is the shot. Gradients that are not wanted have no data.
struct Arrays {
  Map query, support, mask, grad_query, grad_support, grad_mask;
  const int64_t* valid_sizes;
  void *similarity, *weights, *totals, *prototype, *query_norms, *grad_similarity;
};

template <class Call>
Call call_of(const int64_t* s, int dtype, int mask_type, bool resize_mask, const Arrays& arrays) {
  Call call;
  call.shape = {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8]};
  call.dtype = gingham::DType(dtype);
  call.mask_type = gingham::MaskType(mask_type);
  call.resize = resize_mask ? gingham::MaskResize::mask : gingham::MaskResize::features;
  call.query = view_of(arrays.query);
  call.support = view_of(arrays.support);
  call.valid_sizes = arrays.valid_sizes;
  call.similarity = arrays.similarity;
  call.weights = arrays.weights;
  call.totals = arrays.totals;
  call.prototype = arrays.prototype;
  call.query_norms = arrays.query_norms;
  return call;
}

gingham::MaskedSimilarityForward forward_call(const int64_t* s, int dtype, int mask_type, bool resize_mask,
                                              const Arrays& arrays) {
  auto call = call_of<gingham::MaskedSimilarityForward>(s, dtype, mask_type, resize_mask, arrays);
  call.mask = view_of(arrays.mask);
  return call;
}
gingham::MaskedSimilarityBackward backward_call(const int64_t* s, int dtype, int mask_type, bool resize_mask,
                                                const Arrays& arrays) {
  auto call = call_of<gingham::MaskedSimilarityBackward>(s, dtype, mask_type, resize_mask, arrays);
  call.grad_similarity = arrays.grad_similarity;
  call.grad_query = view_of(arrays.grad_query);
  call.grad_support = view_of(arrays.grad_support);
  call.grad_mask = view_of(arrays.grad_mask);
  return call;
}

}  // namespace

extern "C" {

size_t forward_workspace(const int64_t* shape, int dtype, int mask_type, bool resize_mask, const Arrays* arrays) {
  return gingham::cuda::workspace_size(forward_call(shape, dtype, mask_type, resize_mask, *arrays));
}
size_t backward_workspace(const int64_t* shape, int dtype, int mask_type, bool resize_mask, const Arrays* arrays) {
  return gingham::cuda::workspace_size(backward_call(shape, dtype, mask_type, resize_mask, *arrays));
}

const char* forward(const int64_t* shape, int dtype, int mask_type, bool resize_mask, const Arrays* arrays,
                    void* workspace, unsigned seed) {
  const auto call = forward_call(shape, dtype, mask_type, resize_mask, *arrays);
  return report(seed, [&] { gingham::cuda::run(call, workspace, nullptr); });
}
const char* backward(const int64_t* shape, int dtype, int mask_type, bool resize_mask, const Arrays* arrays,
                     void* workspace, unsigned seed) {
  const auto call = backward_call(shape, dtype, mask_type, resize_mask, *arrays);
  return report(seed, [&] { gingham::cuda::run(call, workspace, nullptr); });
}

}  // extern "C"
