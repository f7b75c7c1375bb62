// The emulated operators for ctypes: each returns an error text, empty when all went well.
#include <string>

#include "cuda_emulation.h"
#include "gingham/criss_cross_attention.h"

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

template <class Run>
const char* report(unsigned seed, Run run) {
  static std::string message;
  message.clear();
  gingham::emulation::device.random.seed(seed);
  try {
    run();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

}  // namespace

extern "C" {

void* allocate_guarded(size_t bytes) { return gingham::emulation::allocate_guarded(bytes); }
void free_guarded(void* memory, size_t bytes) {
  gingham::emulation::free_guarded(static_cast<unsigned char*>(memory), bytes);
}

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
  return report(seed, [&] { gingham::cuda::criss_cross_attention(call, allow_tf32, nullptr, nullptr); });
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
  return report(seed, [&] { gingham::cuda::criss_cross_attention_backward(call, allow_tf32, workspace, nullptr); });
}

}  // extern "C"
