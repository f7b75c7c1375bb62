#include "gingham/masked_average_pool.h"

#include "c_interface.h"

namespace {

// Gradients that are not wanted have no data.
struct Arrays {
  Map features, mask, grad_features, grad_mask;
  void *pooled, *weights, *total, *grad_pooled;
};

template <class Call>
Call call_of(const int64_t* s, int dtype, int mask_type, bool resize_mask) {
  Call call;
  call.shape = {s[0], s[1], s[2], s[3], s[4], s[5]};
  call.dtype = gingham::DType(dtype);
  call.mask_type = gingham::MaskType(mask_type);
  call.resize = resize_mask ? gingham::MaskResize::mask : gingham::MaskResize::features;
  return call;
}

gingham::MaskedAveragePoolForward forward_call(const int64_t* s, int dtype, int mask_type, bool resize_mask,
                                               const Arrays& arrays) {
  auto call = call_of<gingham::MaskedAveragePoolForward>(s, dtype, mask_type, resize_mask);
  call.features = view_of(arrays.features);
  call.mask = view_of(arrays.mask);
  call.pooled = arrays.pooled;
  call.weights = arrays.weights;
  call.total = arrays.total;
  return call;
}
gingham::MaskedAveragePoolBackward backward_call(const int64_t* s, int dtype, int mask_type, bool resize_mask,
                                                 const Arrays& arrays) {
  auto call = call_of<gingham::MaskedAveragePoolBackward>(s, dtype, mask_type, resize_mask);
  call.features = view_of(arrays.features);
  call.grad_pooled = arrays.grad_pooled;
  call.weights = arrays.weights;
  call.total = arrays.total;
  call.grad_features = view_of(arrays.grad_features);
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
