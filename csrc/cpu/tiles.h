// AMX: matrix products of bfloat16 pairs on the core's eight tiles of 16 rows of 64 bytes.
//
// tile_multiply adds to C[16][16] floats the product of A[16 rows][16 pairs] and B[16 pairs][16 columns], the units of
// panel_gemm.h. The instructions are written out, so that no compiler flag lets others slip into this machine code. A
// build with GINGHAM_EMULATED_TILES computes the same in software (tests/tile_emulation).
#pragma once

#include <cstdint>

#if defined(GINGHAM_EMULATED_TILES)
#include "emulated_tiles.h"
#elif defined(GINGHAM_TILES)

namespace {

template <int tile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
// Strides in bytes.
template <int tile>
inline void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(tile) : "memory");
}
template <int sums, int a, int b>
inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(a), "i"(b));
}

// The tiles are configured while one of these lives, on the thread that made it.
class TileScope {
 public:
  TileScope() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } configuration;
    static_assert(sizeof configuration == 64);
    asm volatile("ldtilecfg %0" ::"m"(configuration));
  }
  ~TileScope() { asm volatile("tilerelease"); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

}  // namespace

#else

namespace {
struct TileScope {};
}  // namespace

#endif

namespace {
#if defined(GINGHAM_TILES)
constexpr bool kHasTiles = true;
#else
constexpr bool kHasTiles = false;
#endif
constexpr int kTileRows = 16;
}  // namespace
