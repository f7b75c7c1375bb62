// What the emulated kernels share on their way to ctypes. Scratch memory is full of not-a-number and guarded at its
// end; each function returns whether the guard is whole.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

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
