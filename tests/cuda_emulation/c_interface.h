// What the emulated operators share on their way to ctypes: each operator has a file here that hands its calls on, and
// returns an error text, empty when all went well. tests/oracles/cuda_emulation.py is the other side.
#pragma once

#include <string>

#include "cuda_emulation.h"
#include "gingham/core.h"

namespace {

struct Map {
  void* data;
  int64_t strides[5];  // of [batch, channel, frame, row, column], in elements
};

gingham::MapView view_of(const Map& map) {
  const int64_t* s = map.strides;
  return {map.data, s[0], s[1], s[2], s[3], s[4]};
}
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

}  // extern "C"
