// Twin of csrc/cuda/mma.cuh, from the fragment layouts of the PTX ISA. Sums are cut off, as tensor cores do.
#pragma once

#include <cmath>
#include <cstdint>

#include "device.h"
#include "emulated_numbers.h"

namespace gingham::cuda {

inline float cut_off(double x) {
  const auto nearest = static_cast<float>(x);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(x) ? std::nextafterf(nearest, 0.0f) : nearest;
}

// element_a(operands of a lane, i) is the i-th element of its a-fragment; columns of a and rows of b by i.
template <int depth, class Element>
inline void emulated_mma(const char* name, float (&s)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         Element element) {
  constexpr int kPerRegister = depth / 8;  // 2: 16-bit elements, 1: TF32
  struct Operands {
    uint32_t a[4], b[2];
  } operands;
  for (int i = 0; i < 4; ++i) operands.a[i] = a[i];
  for (int i = 0; i < 2; ++i) operands.b[i] = b[i];
  float result[4];
  emulation::device.collective(name, operands, [&](const Operands* lanes, int lane) {
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
      double sum = s[e];
      for (int k = 0; k < depth; ++k) {
        // Registers of a: row half in bit 0, depth half in bit 1. Of b: depth half. Lane % 4 is the place in the half.
        const int half = k / (4 * kPerRegister), place = k % (4 * kPerRegister);
        const int t = place / kPerRegister, in_register = place % kPerRegister;
        sum += static_cast<double>(element(lanes[row % 8 * 4 + t].a[row / 8 + 2 * half], in_register)) *
               static_cast<double>(element(lanes[column * 4 + t].b[half], in_register));
      }
      result[e] = cut_off(sum);
    }
    return 0;
  });
  for (int e = 0; e < 4; ++e) s[e] = result[e];
}

inline void mma_float16(float (&s)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated_mma<16>("mma_float16", s, a, b,
                   [](uint32_t x, int i) { return float_of_float16(static_cast<uint16_t>(x >> (16 * i))); });
}
inline void mma_bfloat16(float (&s)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated_mma<16>("mma_bfloat16", s, a, b, [](uint32_t x, int i) { return float_of_bits(x >> (16 * i) << 16); });
}
inline void mma_tf32(float (&s)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated_mma<8>("mma_tf32", s, a, b, [](uint32_t x, int) { return float_of_bits(x & ~0x1fffu); });
}

inline void mma_float64(double& s0, double& s1, double a, double b) {
  struct Operands {
    double a, b;
  };
  double* const sums[2] = {&s0, &s1};
  emulation::device.collective("mma_float64", Operands{a, b}, [&](const Operands* lanes, int lane) {
    for (int e = 0; e < 2; ++e) {
      for (int k = 0; k < 4; ++k) {
        *sums[e] = std::fma(lanes[lane / 4 * 4 + k].a, lanes[(lane % 4 * 2 + e) * 4 + k].b, *sums[e]);
      }
    }
    return 0;
  });
}

}  // namespace gingham::cuda
