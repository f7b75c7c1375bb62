#include "gingham/criss_cross_attention.h"

#include "c_interface.h"

namespace {

gingham::CrissCrossShape shape_of(const int64_t* s) { return {s[0], s[1], s[2], s[3], s[4], s[5]}; }

// maps: query, key, value, output
gingham::CrissCrossForward forward_call(const int64_t* shape, int dtype, const Map* maps) {
  gingham::CrissCrossForward call;
  call.shape = shape_of(shape);
  call.dtype = gingham::DType(dtype);
  call.query = view_of(maps[0]);
  call.key = view_of(maps[1]);
  call.value = view_of(maps[2]);
  call.output = view_of(maps[3]);
  return call;
}

// maps: query, key, value, output, grad_output, grad_query, grad_key, grad_value
gingham::CrissCrossBackward backward_call(const int64_t* shape, int dtype, const Map* maps) {
  gingham::CrissCrossBackward call;
  call.shape = shape_of(shape);
  call.dtype = gingham::DType(dtype);
  call.query = view_of(maps[0]);
  call.key = view_of(maps[1]);
  call.value = view_of(maps[2]);
  call.output = view_of(maps[3]);
  call.grad_output = view_of(maps[4]);
  call.grad_query = view_of(maps[5]);
  call.grad_key = view_of(maps[6]);
  call.grad_value = view_of(maps[7]);
  return call;
}

}  // namespace

extern "C" {

size_t forward_workspace(const int64_t* shape, int dtype, const Map* maps) {
  return gingham::cuda::workspace_size(forward_call(shape, dtype, maps));
}

const char* forward(const int64_t* shape, int dtype, double scale, bool allow_tf32, const Map* maps, double* lse,
                    void* workspace, unsigned seed) {
  gingham::CrissCrossForward call = forward_call(shape, dtype, maps);
  call.scale = scale;
  call.allow_tf32 = allow_tf32;
  call.lse = lse;
  return report(seed, [&] { gingham::cuda::run(call, workspace, nullptr); });
}

size_t backward_workspace(const int64_t* shape, int dtype, const Map* maps) {
  return gingham::cuda::workspace_size(backward_call(shape, dtype, maps));
}

const char* backward(const int64_t* shape, int dtype, double scale, bool allow_tf32, const Map* maps, const double* lse,
                     void* workspace, unsigned seed) {
  gingham::CrissCrossBackward call = backward_call(shape, dtype, maps);
  call.scale = scale;
  call.allow_tf32 = allow_tf32;
  call.lse = lse;
  return report(seed, [&] { gingham::cuda::run(call, workspace, nullptr); });
}

}  // extern "C"
