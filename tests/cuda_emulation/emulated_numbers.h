// Twin of csrc/cuda/numbers.cuh: conversions by their definitions, round to nearest even (TF32: away from zero).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace gingham::cuda {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline uint32_t float16_bits(float x) {
  const uint32_t sign = bits_of_float(x) >> 16 & 0x8000u;
  const double magnitude = std::fabs(static_cast<double>(x));
  if (std::isnan(x)) return 0x7fffu;
  if (magnitude >= 65520.0) return sign | 0x7c00u;
  if (magnitude == 0.0) return sign;
  int exponent;
  std::frexp(magnitude, &exponent);                         // magnitude in [2^(exponent - 1), 2^exponent)
  const int unit = (exponent < -13 ? -13 : exponent) - 11;  // of the last place
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, -unit)));
  // Subnormal numbers are their steps; a carry into the exponent field is what it should be.
  return sign | (exponent < -13 ? steps : (static_cast<uint32_t>(exponent + 14) << 10) + (steps - 1024u));
}
inline float float_of_float16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double sign = bits >> 15 ? -1.0 : 1.0;
  if (exponent == 31) return static_cast<float>(mantissa ? NAN : sign * INFINITY);
  return static_cast<float>(sign *
                            (exponent ? std::ldexp(1024.0 + mantissa, exponent - 25) : std::ldexp(mantissa, -24)));
}
inline uint32_t bfloat16_bits(float x) {
  const uint32_t bits = bits_of_float(x);
  if (std::isnan(x)) return 0x7fffu;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

inline uint32_t pack_float16(float low, float high) { return float16_bits(low) | float16_bits(high) << 16; }
inline uint32_t pack_bfloat16(float low, float high) { return bfloat16_bits(low) | bfloat16_bits(high) << 16; }
inline uint32_t round_to_tf32(float x) {
  if (!std::isfinite(x)) return bits_of_float(x);
  return (bits_of_float(x) + 0x1000u) & ~0x1fffu;
}

inline float exp2_approximately(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }

}  // namespace gingham::cuda
