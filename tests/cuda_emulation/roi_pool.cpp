#include "gingham/roi_pool.h"

#include "c_interface.h"

namespace {

struct Arrays {
  Map features, output, grad_output, grad_features;
  void *boxes, *places;
};

template <class Call>
Call call_of(const int64_t* s, int dtype, double spatial_scale, const Arrays& arrays) {
  Call call;
  call.shape = {s[0], s[1], s[2], s[3], s[4], s[5], s[6]};
  call.dtype = gingham::DType(dtype);
  call.spatial_scale = spatial_scale;
  call.features = view_of(arrays.features);
  call.boxes = arrays.boxes;
  return call;
}

gingham::RoiPoolBackward backward_call(const int64_t* shape, int dtype, double spatial_scale, const Arrays& arrays) {
  auto call = call_of<gingham::RoiPoolBackward>(shape, dtype, spatial_scale, arrays);
  call.grad_output = view_of(arrays.grad_output);
  call.grad_features = view_of(arrays.grad_features);
  return call;
}

}  // namespace

extern "C" {

const char* forward(const int64_t* shape, int dtype, double spatial_scale, const Arrays* arrays, unsigned seed) {
  auto call = call_of<gingham::RoiPoolForward>(shape, dtype, spatial_scale, *arrays);
  call.output = view_of(arrays->output);
  return report(seed, [&] { gingham::cuda::run(call, nullptr, nullptr); });
}

const char* places(const int64_t* shape, int dtype, double spatial_scale, const Arrays* arrays, unsigned seed) {
  auto call = call_of<gingham::RoiPoolPlaces>(shape, dtype, spatial_scale, *arrays);
  call.places = static_cast<int32_t*>(arrays->places);
  return report(seed, [&] { gingham::cuda::run(call, nullptr, nullptr); });
}

size_t backward_workspace(const int64_t* shape, int dtype, const Arrays* arrays) {
  return gingham::cuda::workspace_size(backward_call(shape, dtype, 1.0, *arrays));
}

const char* backward(const int64_t* shape, int dtype, double spatial_scale, const Arrays* arrays, void* workspace,
                     unsigned seed) {
  const auto call = backward_call(shape, dtype, spatial_scale, *arrays);
  return report(seed, [&] { gingham::cuda::run(call, workspace, nullptr); });
}

}  // extern "C"
