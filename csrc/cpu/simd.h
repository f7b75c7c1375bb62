// Vectors of the instruction set that this translation unit is compiled for, and the few operations the kernels need.
//
// Every kernel source is compiled once per instruction set (see dispatch.h). All of this file has internal linkage, so
// that the linker can never keep the AVX-512 copy of a function for a machine that has none.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "gingham/core.h"

// A function that bench/profile_cpu.sh is to tell apart from its callers.
#if defined(GINGHAM_PROFILE)
#define GINGHAM_STEP __attribute__((noinline))
#else
#define GINGHAM_STEP inline
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = int32_t;
};
template <>
struct IntegerOf<uint32_t> {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};
template <class T>
using Integers = Vector<typename IntegerOf<T>::type>;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

template <class T>
inline Vector<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}
template <class T>
inline void store(T* p, Vector<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}
template <class T>
inline Vector<T> broadcast(T x) {
  return x - Vector<T>{};  // not x + 0, which is no copy of -0 and so costs an addition
}
template <class T>
inline Vector<T> maximum(Vector<T> a, Vector<T> b) {
  return a > b ? a : b;
}

// Storage types of two bytes. Arithmetic is done in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float to_float(Half h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000u) << 16;
  const uint32_t magnitude = h.bits & 0x7fffu;
  uint32_t bits = 0;
  if (magnitude >= 0x7c00u) {
    bits = 0x7f800000u | (magnitude << 13);
  } else if (magnitude >= 0x0400u) {
    bits = (magnitude << 13) + 0x38000000u;
  } else {  // a subnormal half is a multiple of 2^-24
    const float value = float(magnitude) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &value, 4);
  }
  bits |= sign;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline float to_float(BFloat16 b) {
  const uint32_t bits = uint32_t(b.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }

template <class E>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class E>
using Accumulator = typename AccumulatorOf<E>::type;

// Loads kLanes<float> (or double) elements of storage type E, widened.
inline Vector<float> load_widened(const float* p) { return load(p); }
inline Vector<double> load_widened(const double* p) { return load(p); }
inline Vector<float> load_widened(const BFloat16* p) {
  typedef uint16_t Shorts __attribute__((vector_size(kVectorBytes / 2)));
  Shorts raw;
  std::memcpy(&raw, p, sizeof raw);
  const Vector<uint32_t> wide = __builtin_convertvector(raw, Vector<uint32_t>) << 16;
  return (Vector<float>)wide;
}
inline Vector<float> load_widened(const Half* p) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vector<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

// Round to nearest even; NaN stays NaN.
inline Vector<uint32_t> bfloat16_bits(Vector<float> v) {
#if defined(__AVX512BF16__)
  return (Vector<uint32_t>)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  const Vector<uint32_t> bits = (Vector<uint32_t>)v;
  const Vector<uint32_t> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return v == v ? rounded : ((bits >> 16) | 0x40u);
#endif
}
#if defined(__AVX512BF16__)
// Two numbers a lane, rounded to bfloat16: `low` in the lower half.
inline Vector<uint32_t> pair_bits(Vector<float> low, Vector<float> high) {
  return bfloat16_bits(low) | (bfloat16_bits(high) << 16);
}
#endif
inline void store_narrowed(float* p, Vector<float> v) { store(p, v); }
inline void store_narrowed(double* p, Vector<double> v) { store(p, v); }
inline void store_narrowed(BFloat16* p, Vector<float> v) {
  typedef uint16_t Shorts __attribute__((vector_size(kVectorBytes / 2)));
  const Shorts raw = __builtin_convertvector(bfloat16_bits(v), Shorts);
  std::memcpy(p, &raw, sizeof raw);
}
inline void store_narrowed(Half* p, Vector<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) {
    uint32_t bits;
    const float x = v[i];
    std::memcpy(&bits, &x, 4);
    const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
    bits &= 0x7fffffffu;
    uint16_t magnitude;
    if (bits > 0x7f800000u) {
      magnitude = 0x7e00u;
    } else if (bits >= 0x477ff000u) {  // rounds past the largest half
      magnitude = 0x7c00u;
    } else if (bits < 0x38800000u) {  // subnormal: adding 0.5 makes the float unit round at 2^-24
      float shifted;
      std::memcpy(&shifted, &bits, 4);
      shifted += 0.5f;
      uint32_t shifted_bits;
      std::memcpy(&shifted_bits, &shifted, 4);
      magnitude = uint16_t(shifted_bits - 0x3f000000u);
    } else {
      magnitude = uint16_t((bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13);
    }
    p[i].bits = uint16_t(sign | magnitude);
  }
#endif
}

// The first `count` lanes only; the others read as zero and are not written.
#if defined(__AVX512F__)
inline __mmask16 first_lanes(int count) { return __mmask16((1u << count) - 1); }
inline Vector<float> load_widened(const float* p, int count) {
  return (Vector<float>)_mm512_maskz_loadu_ps(first_lanes(count), p);
}
inline Vector<double> load_widened(const double* p, int count) {
  return (Vector<double>)_mm512_maskz_loadu_pd(__mmask8(first_lanes(count)), p);
}
inline Vector<float> load_widened(const BFloat16* p, int count) {
  return (Vector<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(count), p)), 16);
}
inline Vector<float> load_widened(const Half* p, int count) {
  return (Vector<float>)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), p));
}
inline void store_narrowed(float* p, Vector<float> v, int count) {
  _mm512_mask_storeu_ps(p, first_lanes(count), (__m512)v);
}
inline void store_narrowed(double* p, Vector<double> v, int count) {
  _mm512_mask_storeu_pd(p, __mmask8(first_lanes(count)), (__m512d)v);
}
inline void store_narrowed(BFloat16* p, Vector<float> v, int count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), _mm512_cvtepi32_epi16((__m512i)bfloat16_bits(v)));
}
inline void store_narrowed(Half* p, Vector<float> v, int count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
template <class E>
inline Vector<Accumulator<E> > load_widened(const E* p, int count) {
  E part[kLanes<Accumulator<E> >] = {};
  std::memcpy(part, p, size_t(count) * sizeof(E));
  return load_widened(part);
}
template <class E>
inline void store_narrowed(E* p, Vector<Accumulator<E> > v, int count) {
  E part[kLanes<Accumulator<E> >];
  store_narrowed(part, v);
  std::memcpy(p, part, size_t(count) * sizeof(E));
}
#endif

// Stores all lanes, or the first `count` of them when there is no room for more.
template <class T>
inline void store_part(T* p, Vector<T> v, int64_t count) {
  if (count >= kLanes<T>) return store(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_epi32(p, first_lanes(int(count)), (__m512i)v);
  } else {
    _mm512_mask_storeu_epi64(p, __mmask8(first_lanes(int(count))), (__m512i)v);
  }
#else
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
#endif
}
// Loads the first `count` lanes, the others as zeros.
template <class T>
inline Vector<T> load_part(const T* p, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vector<T>)_mm512_maskz_loadu_epi32(first_lanes(int(count)), p);
  } else {
    return (Vector<T>)_mm512_maskz_loadu_epi64(__mmask8(first_lanes(int(count))), p);
  }
#else
  Vector<T> v{};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
#endif
}

#if defined(__AVX512F__)
inline float sum_of_lanes(Vector<float> v) { return _mm512_reduce_add_ps((__m512)v); }
inline double sum_of_lanes(Vector<double> v) { return _mm512_reduce_add_pd((__m512d)v); }
#else
template <class V>
inline auto sum_of_lanes(V v) {
  constexpr int kN = int(sizeof(V) / sizeof(v[0]));
  for (int width = kN / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  }
  return v[0] + 0;
}
#endif

// exp of non-positive numbers (and of small positive ones); exactly 0 below the smallest normal result; NaN stays NaN.
// x = n log 2 + r, |r| <= log(2) / 2, and a Taylor polynomial in r: relative error below 2 units in the last place.
inline Vector<float> exponential(Vector<float> x) {
  const Vector<float> n_float = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23 rounds to an integer
  const Vector<float> n = n_float - 12582912.0f;
  const Vector<float> r = (x - n * 0.693145751953125f) - n * 1.42860682030941723212e-6f;
  Vector<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.0f;
  const Vector<uint32_t> exponent = ((Vector<uint32_t>)n_float << 23) + 0x3f800000u;
  return x < -87.0f ? Vector<float>{} : p * (Vector<float>)exponent;
}
inline Vector<double> exponential(Vector<double> x) {
  const Vector<double> n_double = x * 1.4426950408889634074 + 6755399441055744.0;  // 1.5 * 2^52
  const Vector<double> n = n_double - 6755399441055744.0;
  const Vector<double> r = (x - n * 6.93147180369123816490e-1) - n * 1.90821492927058770002e-10;
  Vector<double> p = broadcast(1.0 / 6227020800.0);
  constexpr double kCoefficients[] = {
      1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
      1.0 / 720,       1.0 / 120,      1.0 / 24,      1.0 / 6,      0.5};
  for (double coefficient : kCoefficients) p = p * r + coefficient;
  p = p * (r * r) + r + 1.0;
  const Vector<uint64_t> exponent = ((Vector<uint64_t>)n_double << 52) + 0x3ff0000000000000ull;
  return x < -708.0 ? Vector<double>{} : p * (Vector<double>)exponent;
}

// Transposes a square of kLanes<T> vectors in registers (Eklundh's exchange of halves, quarters, ...).
template <class T, int Distance>
__attribute__((always_inline)) inline void exchange(Vector<T>* rows) {
  constexpr int kN = kLanes<T>;
  Integers<T> upper, lower;
  for (int lane = 0; lane < kN; ++lane) {
    upper[lane] = (lane & Distance) ? kN + lane - Distance : lane;
    lower[lane] = (lane & Distance) ? kN + lane : lane + Distance;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kN; ++i) {
    if (i & Distance) continue;
    const Vector<T> a = rows[i], b = rows[i + Distance];
    rows[i] = __builtin_shuffle(a, b, upper);
    rows[i + Distance] = __builtin_shuffle(a, b, lower);
  }
}
template <class T>
__attribute__((always_inline)) inline void transpose(Vector<T>* rows) {
  constexpr int kN = kLanes<T>;
  if constexpr (kN >= 16) exchange<T, 8>(rows);
  if constexpr (kN >= 8) exchange<T, 4>(rows);
  if constexpr (kN >= 4) exchange<T, 2>(rows);
  exchange<T, 1>(rows);
}

// Folds each of kLanes<T> vectors into one number: lane i of the result is that of rows[i], which are overwritten. The
// exchange of halves, quarters, ... that transposes a square, with both results of an exchange folded into one.
template <class T, int kDistance = kLanes<T> / 2, class V, class Fold>
__attribute__((always_inline)) inline V fold_lanes(V* rows, const Fold& fold) {
  constexpr int kN = kLanes<T>;
  Integers<T> upper, lower;
  for (int lane = 0; lane < kN; ++lane) {
    upper[lane] = (lane & kDistance) ? kN + lane - kDistance : lane;
    lower[lane] = (lane & kDistance) ? kN + lane : lane + kDistance;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kDistance; ++i) {
    const V a = rows[i], b = rows[i + kDistance];
    rows[i] = fold(__builtin_shuffle(a, b, upper), __builtin_shuffle(a, b, lower));
  }
  if constexpr (kDistance > 1) {
    return fold_lanes<T, kDistance / 2>(rows, fold);
  } else {
    return rows[0];
  }
}

}  // namespace
