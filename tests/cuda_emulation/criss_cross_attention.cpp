#include "gingham/criss_cross_attention.h"

#include "c_interface.h"

namespace {

gingham::CrissCrossShape shape_of(const int64_t* s) { return {s[0], s[1], s[2], s[3], s[4], s[5]}; }

}  // namespace

extern "C" {

// maps: query, key, value, output
const char* forward(const int64_t* shape, int dtype, double scale, bool allow_tf32, const Map* maps, double* lse,
                    unsigned seed) {
  gingham::CrissCrossForward call;
  call.shape = shape_of(shape);
  call.dtype = gingham::DType(dtype);
  call.scale = scale;
  call.query = view_of(maps[0]);
  call.key = view_of(maps[1]);
  call.value = view_of(maps[2]);
  call.output = view_of(maps[3]);
  call.lse = lse;
  call.allow_tf32 = allow_tf32;
  return report(seed, [&] { gingham::cuda::run(call, nullptr, nullptr); });
}

size_t backward_workspace(const int64_t* shape, int dtype) {
  gingham::CrissCrossBackward call;
  call.shape = shape_of(shape);
  call.dtype = gingham::DType(dtype);
  return gingham::cuda::workspace_size(call);
}

// maps: query, key, value, output, grad_output, grad_query, grad_key, grad_value
const char* backward(const int64_t* shape, int dtype, double scale, bool allow_tf32, const Map* maps, const double* lse,
                     void* workspace, unsigned seed) {
  gingham::CrissCrossBackward call;
  call.shape = shape_of(shape);
  call.dtype = gingham::DType(dtype);
  call.scale = scale;
  call.query = view_of(maps[0]);
  call.key = view_of(maps[1]);
  call.value = view_of(maps[2]);
  call.output = view_of(maps[3]);
  call.grad_output = view_of(maps[4]);
  call.grad_query = view_of(maps[5]);
  call.grad_key = view_of(maps[6]);
  call.grad_value = view_of(maps[7]);
  call.lse = lse;
  call.allow_tf32 = allow_tf32;
  return report(seed, [&] { gingham::cuda::run(call, workspace, nullptr); });
}

}  // extern "C"
