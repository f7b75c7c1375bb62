// The bfloat16 kernels on emulated tiles, for ctypes. Scratch memory is full of not-a-number and guarded at its end;
// each function returns whether the guard is whole.
#include <algorithm>
#include <cstring>
#include <vector>

#include "gingham/criss_cross_attention.h"

namespace gingham::cpu::amx {
size_t workspace_size(const CrissCrossForward&, int);
size_t workspace_size(const CrissCrossBackward&, int);
void run(const CrissCrossForward&, int, void*, ParallelFor);
void run(const CrissCrossBackward&, int, void*, ParallelFor);
}  // namespace gingham::cpu::amx

namespace {

struct Map {
  void* data;
  int64_t strides[5];  // of [batch, channel, frame, row, column], in elements
};

gingham::MapView view_of(const Map& map) {
  const int64_t* s = map.strides;
  return {map.data, s[0], s[1], s[2], s[3], s[4]};
}
gingham::CrissCrossShape shape_of(const int64_t* s) { return {s[0], s[1], s[2], s[3], s[4], s[5]}; }

void one_after_the_other(int64_t count, int64_t, gingham::RangeFn fn, void* context) { fn(0, count, context); }

template <class Run>
bool with_scratch(size_t size, Run run) {
  constexpr size_t kGuard = 4096;
  std::vector<unsigned char> memory(size + kGuard + 64, 0xff);
  auto* begin = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
  run(begin);
  return std::all_of(begin + size, memory.data() + memory.size(), [](unsigned char byte) { return byte == 0xff; });
}

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
