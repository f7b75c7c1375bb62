// Twin of csrc/cpu/tiles.h in software: tiles that only exist between the making and the end of a TileScope.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

struct EmulatedTiles {
  bool configured = false;
  uint32_t data[8][16][16];
};
inline thread_local EmulatedTiles emulated_tiles;

inline uint32_t (&emulated_tile(int tile))[16][16] {
  if (!emulated_tiles.configured) std::abort();  // an illegal instruction on the machine
  return emulated_tiles.data[tile];
}

template <int tile>
inline void tile_zero() {
  std::memset(emulated_tile(tile), 0, sizeof emulated_tiles.data[tile]);
}
template <int tile>
inline void tile_load(const void* p, int64_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy(emulated_tile(tile)[i], static_cast<const char*>(p) + i * stride, 64);
}
template <int tile>
inline void tile_store(void* p, int64_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(p) + i * stride, emulated_tile(tile)[i], 64);
}
template <int sums, int a, int b>
inline void tile_multiply() {
  static_assert(sums != a && sums != b && a != b, "the instruction refuses equal tiles");
  const auto to_float = [](uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  };
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      float sum = to_float(emulated_tile(sums)[m][n]);
      for (int k = 0; k < 16; ++k) {
        const uint32_t left = emulated_tile(a)[m][k], right = emulated_tile(b)[k][n];
        sum = std::fma(to_float(left << 16), to_float(right << 16), sum);
        sum = std::fma(to_float(left & 0xffff0000u), to_float(right & 0xffff0000u), sum);
      }
      std::memcpy(&emulated_tile(sums)[m][n], &sum, 4);
    }
  }
}

class TileScope {
 public:
  TileScope() {
    if (emulated_tiles.configured) std::abort();
    emulated_tiles.configured = true;
    std::memset(emulated_tiles.data, 0xff, sizeof emulated_tiles.data);  // not a number
  }
  ~TileScope() { emulated_tiles.configured = false; }
};

}  // namespace
