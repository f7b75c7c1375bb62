// One warp's matrix products by element type, behind one interface, so that a kernel is written once.
//
// A warp owns 16 positions. `sums` are 16 x 8 tiles in the layout of mma.cuh: with g = lane / 4, t = lane % 4, sums[j]
// holds (g, 8j + 2t), (g, 8j + 2t + 1), (g + 8, 8j + 2t), (g + 8, 8j + 2t + 1). What the rows of such tiles become
// after a softmax, `Weights`, is the left operand of the next product without leaving the registers: where the hardware
// wants other columns in a lane, the depth index is permuted, in both operands alike (a product does not depend on its
// order).
//
// A product has
//   Element, Sum             types in memory and of sums
//   kDepth                   depth of one step
//   kSegment                 other positions that a warp can hold logits for
//   kWeightScale             exact factor on weights, so that small ones do not leave the range of float16
//   load_left<depth_minor>   16 x kDepth operand; element (m, k) at p[m * stride + k], or p[k * stride + m]
//   load_right<depth_minor>  kDepth x 16 operand; element (k, n) at p[n * stride + k], or p[k * stride + n]
//   multiply                 sums[0..1] += left * right
//   exponential              e to the power of a sum, as exact as the element type asks for
//   weights, weight, left    sums -> Weights, one of them back, step i as a left operand
//   merge                    pair[0..1] = two sums, plus what is there times a factor (add); pair is aligned to two
#pragma once

#include <cstdint>
#include <type_traits>

#include "elements.cuh"
#include "primitives.cuh"

namespace gingham::cuda {

// ---------------------------------------------------------------------------------------------- float16 and bfloat16

template <class T>
struct PackedProduct {
  using Element = T;
  using Sum = float;
  static constexpr bool kFloat16 = std::is_same_v<T, Float16>;
  static constexpr int kDepth = 16, kSegment = 128;
  static constexpr float kWeightScale = kFloat16 ? 32768.0f : 1.0f;
  struct Left {
    uint32_t x[4];
  };
  struct Right {
    uint32_t x[2][2];
  };
  struct Weights {
    uint32_t x[kSegment / 16][4];
  };

  __device__ static float to_sum(T x) { return cuda::to_sum(x); }
  __device__ static uint32_t pack(float low, float high) {
    if constexpr (kFloat16) return pack_float16(low, high);
    return pack_bfloat16(low, high);
  }
  __device__ static float exponential(float x) { return exp2_approximately(x * 1.44269504f); }
  __device__ static void merge(T* pair, float first, float second, bool add, float factor) {
    auto* packed = reinterpret_cast<uint32_t*>(pair);
    if (add) {
      const uint32_t old = *packed;
      first += to_sum({static_cast<uint16_t>(old & 0xffffu)}) * factor;
      second += to_sum({static_cast<uint16_t>(old >> 16)}) * factor;
    }
    *packed = pack(first, second);
  }

  template <bool depth_minor>
  __device__ static Left load_left(const T* p, int stride, int lane) {
    const int m = lane % 8 + lane / 8 % 2 * 8, k = lane / 16 * 8;
    Left left;
    if constexpr (depth_minor) {
      ldmatrix(left.x, p + m * stride + k);
    } else {
      ldmatrix_transposed(left.x, p + (lane % 8 + k) * stride + lane / 8 % 2 * 8);
    }
    return left;
  }
  template <bool depth_minor>
  __device__ static Right load_right(const T* p, int stride, int lane) {
    uint32_t x[4];
    if constexpr (depth_minor) {
      ldmatrix(x, p + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
    } else {
      ldmatrix_transposed(x, p + (lane % 8 + lane / 8 % 2 * 8) * stride + lane / 16 * 8);
    }
    return {{{x[0], x[1]}, {x[2], x[3]}}};
  }
  __device__ static void multiply(float (&sums)[4], const Left& left, const Right& right, int n) {
    if constexpr (kFloat16) {
      mma_float16(sums, left.x, right.x[n]);
    } else {
      mma_bfloat16(sums, left.x, right.x[n]);
    }
  }

  __device__ static Weights weights(const float (&sums)[kSegment / 8][4]) {
    Weights weights;
#pragma unroll
    for (int i = 0; i < kSegment / 16; ++i) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        weights.x[i][2 * n] = pack(sums[2 * i + n][0], sums[2 * i + n][1]);
        weights.x[i][2 * n + 1] = pack(sums[2 * i + n][2], sums[2 * i + n][3]);
      }
    }
    return weights;
  }
  __device__ static float weight(const Weights& weights, int j, int e) {
    const uint32_t pair = weights.x[j / 2][j % 2 * 2 + e / 2];
    return to_sum({static_cast<uint16_t>(e % 2 ? pair >> 16 : pair & 0xffffu)});
  }
  __device__ static Left left(const Weights& weights, int step) {
    return {{weights.x[step][0], weights.x[step][1], weights.x[step][2], weights.x[step][3]}};
  }
};

// ---------------------------------------------------------------------------------------------- float32 and float64

// Lanes load their scalars themselves. A lane takes depths 2t and 2t + 1, which is what it holds of the sums.
template <bool depth_minor, class T>
__device__ inline void load_left_scalars(T (&x)[4], const T* p, int stride, int lane) {
  const int g = lane / 4, k = lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int m = g + i % 2 * 8, depth = k + i / 2;
    x[i] = depth_minor ? p[m * stride + depth] : p[depth * stride + m];
  }
}
template <bool depth_minor, class T>
__device__ inline void load_right_scalars(T (&x)[2][2], const T* p, int stride, int lane) {
  const int g = lane / 4, k = lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      x[n][i] = depth_minor ? p[(g + n * 8) * stride + k + i] : p[(k + i) * stride + g + n * 8];
    }
  }
}

template <class T>
__device__ inline void merge_scalars(T* pair, T first, T second, bool add, T factor) {
  struct alignas(2 * sizeof(T)) Pair {
    T first, second;
  };
  auto& both = *reinterpret_cast<Pair*>(pair);
  if (add) first += both.first * factor, second += both.second * factor;
  both = {first, second};
}

template <class T, int segment>
struct ScalarWeights {
  T x[segment / 8][4];
};

// float32 on TF32 tensor cores. exact: an operand is the sum of two TF32 numbers, big + small, and a product is three
// (small * small is below float32's last place). What is not finite is small, beside a big of zero, so that it meets
// none but the other operand's big part, which has the sign of the whole. Each step starts from zero and is added in
// float32, because tensor cores cut sums off instead of rounding them.
template <bool exact>
struct Tf32Product {
  using Element = float;
  using Sum = float;
  static constexpr int kDepth = 8, kSegment = 128;
  static constexpr float kWeightScale = 1.0f;
  using Weights = ScalarWeights<float, kSegment>;
  struct Left {
    uint32_t big[4], small[4];
  };
  struct Right {
    uint32_t big[2][2], small[2][2];
  };

  __device__ static float to_sum(float x) { return x; }
  __device__ static float exponential(float x) { return exp(x); }
  __device__ static void merge(float* pair, float first, float second, bool add, float factor) {
    merge_scalars(pair, first, second, add, factor);
  }

  __device__ static void split(float x, uint32_t& big, uint32_t& small) {
    if constexpr (exact) {
      // Rounded by hand: round_to_tf32 tests for infinity once more. What is compared with rounds to infinity.
      big = fabs(x) < 0x1.ffep127f ? (bits_of_float(x) + 0x1000u) & ~0x1fffu : 0;
      small = round_to_tf32(x - float_of_bits(big));
    } else {
      big = round_to_tf32(x);
      small = 0;
    }
  }
  __device__ static Left split(const float (&x)[4]) {
    Left left;
#pragma unroll
    for (int i = 0; i < 4; ++i) split(x[i], left.big[i], left.small[i]);
    return left;
  }

  template <bool depth_minor>
  __device__ static Left load_left(const float* p, int stride, int lane) {
    float x[4];
    load_left_scalars<depth_minor>(x, p, stride, lane);
    return split(x);
  }
  template <bool depth_minor>
  __device__ static Right load_right(const float* p, int stride, int lane) {
    float x[2][2];
    load_right_scalars<depth_minor>(x, p, stride, lane);
    Right right;
#pragma unroll
    for (int i = 0; i < 4; ++i) split(x[i / 2][i % 2], right.big[i / 2][i % 2], right.small[i / 2][i % 2]);
    return right;
  }
  __device__ static void multiply(float (&sums)[4], const Left& left, const Right& right, int n) {
    if constexpr (exact) {
      float step[4] = {};
      mma_tf32(step, left.small, right.big[n]);
      mma_tf32(step, left.big, right.small[n]);
      mma_tf32(step, left.big, right.big[n]);
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[e] += step[e];
    } else {
      mma_tf32(sums, left.big, right.big[n]);
    }
  }

  __device__ static Weights weights(const float (&sums)[kSegment / 8][4]) {
    Weights weights;
#pragma unroll
    for (int i = 0; i < kSegment / 2; ++i) weights.x[i / 4][i % 4] = sums[i / 4][i % 4];
    return weights;
  }
  __device__ static float weight(const Weights& weights, int j, int e) { return weights.x[j][e]; }
  __device__ static Left left(const Weights& weights, int step) {
    return split({weights.x[step][0], weights.x[step][2], weights.x[step][1], weights.x[step][3]});
  }
};

struct Float64Product {
  using Element = double;
  using Sum = double;
  static constexpr int kDepth = 8, kSegment = 64;
  static constexpr double kWeightScale = 1.0;
  using Weights = ScalarWeights<double, kSegment>;
  struct Left {
    double x[4];
  };
  struct Right {
    double x[2][2];
  };

  __device__ static double to_sum(double x) { return x; }
  __device__ static double exponential(double x) { return exp(x); }
  __device__ static void merge(double* pair, double first, double second, bool add, double factor) {
    merge_scalars(pair, first, second, add, factor);
  }

  template <bool depth_minor>
  __device__ static Left load_left(const double* p, int stride, int lane) {
    Left left;
    load_left_scalars<depth_minor>(left.x, p, stride, lane);
    return left;
  }
  template <bool depth_minor>
  __device__ static Right load_right(const double* p, int stride, int lane) {
    Right right;
    load_right_scalars<depth_minor>(right.x, p, stride, lane);
    return right;
  }
  __device__ static void multiply(double (&sums)[4], const Left& left, const Right& right, int n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      mma_float64(sums[0], sums[1], left.x[2 * i], right.x[n][i]);
      mma_float64(sums[2], sums[3], left.x[2 * i + 1], right.x[n][i]);
    }
  }

  __device__ static Weights weights(const double (&sums)[kSegment / 8][4]) {
    Weights weights;
#pragma unroll
    for (int i = 0; i < kSegment / 2; ++i) weights.x[i / 4][i % 4] = sums[i / 4][i % 4];
    return weights;
  }
  __device__ static double weight(const Weights& weights, int j, int e) { return weights.x[j][e]; }
  __device__ static Left left(const Weights& weights, int step) {
    return {{weights.x[step][0], weights.x[step][2], weights.x[step][1], weights.x[step][3]}};
  }
};

}  // namespace gingham::cuda
