// What the programs of bench/profile_cpu.sh share: random maps, and calls again and again on one thread.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "gingham/core.h"

namespace profile {

using namespace gingham;

// Numbers from `least` to 1; the end of the memory is followed by what kernels may read but not use.
struct Map {
  std::vector<char> memory;
  MapView view;

  Map(int64_t batch, int64_t channels, int64_t rows, int64_t columns, DType dtype, bool channels_last, uint32_t seed,
      float least = -1.0f)
      : memory(size_t(batch * channels * rows * columns * element_size(dtype)) + 64) {
    std::minstd_rand random(seed);
    const int64_t area = rows * columns;
    for (int64_t i = 0; i < batch * channels * area; ++i) {
      const float x = std::max(least, float(random() % 2001) / 1000.0f - 1.0f);
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      if (dtype == DType::bfloat16) bits >>= 16;
      std::memcpy(memory.data() + i * element_size(dtype), &bits, size_t(element_size(dtype)));
    }
    view = channels_last ? MapView{memory.data(), area * channels, 1, 0, columns * channels, channels}
                         : MapView{memory.data(), area * channels, area, 0, columns, 1};
  }
};

inline void one_after_the_other(int64_t count, int64_t, RangeFn fn, void* context) { fn(0, count, context); }

inline void* allocate(size_t size) { return std::aligned_alloc(64, std::max<size_t>(64, (size + 63) / 64 * 64)); }

// Calls run(0), run(1), ... and returns the median time in milliseconds.
template <class Run>
double time_calls(int repeats, const Run& run) {
  std::vector<double> milliseconds;
  for (int i = 0; i < repeats; ++i) {
    const auto begun = std::chrono::steady_clock::now();
    run(i);
    milliseconds.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begun).count());
  }
  std::sort(milliseconds.begin(), milliseconds.end());
  return milliseconds[milliseconds.size() / 2];
}

}  // namespace profile
