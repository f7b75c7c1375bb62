// The bfloat16 kernels of criss-cross attention on emulated tiles.
#include "c_interface.h"
#include "gingham/criss_cross_attention.h"

namespace gingham::cpu::amx {
size_t workspace_size(const CrissCrossForward&, int);
size_t workspace_size(const CrissCrossBackward&, int);
void run(const CrissCrossForward&, int, void*, ParallelFor);
void run(const CrissCrossBackward&, int, void*, ParallelFor);
}  // namespace gingham::cpu::amx

namespace {

gingham::CrissCrossShape shape_of(const int64_t* s) { return {s[0], s[1], s[2], s[3], s[4], s[5]}; }

}  // namespace

extern "C" {

// maps: query, key, value, output
bool forward(const int64_t* shape, double scale, const Map* maps, double* lse) {
  gingham::CrissCrossForward call;
  call.shape = shape_of(shape);
  call.dtype = gingham::DType::bfloat16;
  call.scale = scale;
  call.query = view_of(maps[0]);
  call.key = view_of(maps[1]);
  call.value = view_of(maps[2]);
  call.output = view_of(maps[3]);
  call.lse = lse;
  return with_scratch(gingham::cpu::amx::workspace_size(call, 1),
                      [&](void* scratch) { gingham::cpu::amx::run(call, 1, scratch, one_after_the_other); });
}

// maps: query, key, value, output, grad_output, grad_query, grad_key, grad_value
bool backward(const int64_t* shape, double scale, const Map* maps, const double* lse) {
  gingham::CrissCrossBackward call;
  call.shape = shape_of(shape);
  call.dtype = gingham::DType::bfloat16;
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
  return with_scratch(gingham::cpu::amx::workspace_size(call, 1),
                      [&](void* scratch) { gingham::cpu::amx::run(call, 1, scratch, one_after_the_other); });
}

}  // extern "C"
