#include "gingham/roi_pool.h"

#include "c_interface.h"

namespace {

struct Arrays {
  Map features, output, places, grad_output, grad_features;
  void* boxes;
};

template <class Call>
Call call_of(const int64_t* s, int dtype, double spatial_scale, const Arrays& arrays, bool keep) {
  Call call;
  call.shape = {s[0], s[1], s[2], s[3], s[4], s[5], s[6]};
  call.dtype = gingham::DType(dtype);
  call.spatial_scale = spatial_scale;
  call.features = view_of(arrays.features);
  call.boxes = arrays.boxes;
  if (keep) call.places = view_of(arrays.places);
  return call;
}

gingham::RoiPoolBackward backward_call(const int64_t* shape, int dtype, double spatial_scale, const Arrays& arrays,
                                       bool keep) {
  auto call = call_of<gingham::RoiPoolBackward>(shape, dtype, spatial_scale, arrays, keep);
  call.grad_output = view_of(arrays.grad_output);
  call.grad_features = view_of(arrays.grad_features);
  return call;
}

}  // namespace

extern "C" {

// keep: forward writes the places, and backward reads them.
const char* forward(const int64_t* shape, int dtype, double spatial_scale, const Arrays* arrays, bool keep,
                    unsigned seed) {
  auto call = call_of<gingham::RoiPoolForward>(shape, dtype, spatial_scale, *arrays, keep);
  call.output = view_of(arrays->output);
  return report(seed, [&] { gingham::cuda::run(call, nullptr, nullptr); });
}

size_t backward_workspace(const int64_t* shape, int dtype, const Arrays* arrays, bool keep) {
  return gingham::cuda::workspace_size(backward_call(shape, dtype, 1.0, *arrays, keep));
}

const char* backward(const int64_t* shape, int dtype, double spatial_scale, const Arrays* arrays, bool keep,
                     void* workspace, unsigned seed) {
  const auto call = backward_call(shape, dtype, spatial_scale, *arrays, keep);
  return report(seed, [&] { gingham::cuda::run(call, workspace, nullptr); });
}

}  // extern "C"
