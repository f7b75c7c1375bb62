// Twin of csrc/cuda/ldmatrix.cuh.
#pragma once

#include <cstdint>
#include <cstring>

#include "device.h"

namespace gingham::cuda {

inline void emulated_ldmatrix(const char* name, uint32_t (&x)[4], const void* row, bool transposed) {
  emulation::require(reinterpret_cast<uintptr_t>(row) % 16 == 0, "ldmatrix: a row is not aligned to 16 bytes");
  emulation::require(emulation::device.is_shared(row, 16), "ldmatrix: a row is not in shared memory");
  emulation::device.collective(name, row, [&](const void* const* rows, int lane) {
    for (int i = 0; i < 4; ++i) {
      const auto element = [&](int r, int c) {
        uint16_t bits;
        memcpy(&bits, static_cast<const unsigned char*>(rows[8 * i + r]) + 2 * c, sizeof bits);
        return static_cast<uint32_t>(bits);
      };
      const int g = lane / 4, t = lane % 4 * 2;
      x[i] = transposed ? element(t, g) | element(t + 1, g) << 16 : element(g, t) | element(g, t + 1) << 16;
    }
    return 0;
  });
}

inline void ldmatrix(uint32_t (&x)[4], const void* row) { emulated_ldmatrix("ldmatrix", x, row, false); }
inline void ldmatrix_transposed(uint32_t (&x)[4], const void* row) {
  emulated_ldmatrix("ldmatrix_transposed", x, row, true);
}

}  // namespace gingham::cuda
