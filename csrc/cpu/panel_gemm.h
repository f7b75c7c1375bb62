// Small matrix products on packed panels: C[m][n] (+)= sum_k A[m][k] B[k][n].
//
// A panel holds *units*: what one multiply instruction consumes of the summed axis. A unit is a float, a double, or a
// pair of neighbouring bfloat16 (AVX512-BF16), so that one loop serves all of them. A has free strides, because its
// units are broadcast; B and C have contiguous n and rows that are padded to whole vectors.
// The register block is MR x NV vectors of C. What it needs of B per k stays in L1, A is read once per block.
#pragma once

#include "prefetch.h"
#include "simd.h"

namespace {

struct FloatUnit {
  using Unit = float;
  using Sum = float;
  static constexpr int kPair = 1;
  static Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> sum) { return a * b + sum; }
};
struct DoubleUnit {
  using Unit = double;
  using Sum = double;
  static constexpr int kPair = 1;
  static Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> sum) { return a * b + sum; }
};
#if defined(__AVX512BF16__)
struct BFloat16Pair {
  using Unit = uint32_t;
  using Sum = float;
  static constexpr int kPair = 2;
  static Vector<float> multiply_add(Vector<uint32_t> a, Vector<uint32_t> b, Vector<float> sum) {
    return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// The largest register block of NV vectors a row that leaves registers for B and one broadcast of A.
constexpr int block_rows(int vectors) {
  if (kRegisters == 32) return vectors == 4 ? 6 : vectors == 3 ? 8 : 12;
  return vectors == 3 ? 4 : vectors == 2 ? 6 : 8;
}
constexpr int kMostVectors = kRegisters == 32 ? 4 : 3;

constexpr int64_t kStepsBetweenPrefetches = 16;

template <class U>
struct Panel {
  const typename U::Unit* data;
  int64_t row_stride;  // between neighbours of the axis that C keeps
  int64_t sum_stride;  // between neighbours of the summed axis
};

template <class U, int MR, int NV>
inline void multiply_block(Panel<U> a, const typename U::Unit* b, int64_t b_stride, typename U::Sum* c,
                           int64_t c_stride, int64_t count, bool accumulate, Prefetcher& prefetcher) {
  using Sum = typename U::Sum;
  using Unit = typename U::Unit;
  constexpr int kN = kLanes<Sum>;
  Vector<Sum> sums[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) sums[m][v] = accumulate ? load(c + m * c_stride + v * kN) : Vector<Sum>{};
  }
  const Unit* a_data = a.data;
  for (int64_t begin = 0; begin < count; begin += kStepsBetweenPrefetches) {
    const int64_t steps = smaller(kStepsBetweenPrefetches, count - begin);
    for (int64_t k = 0; k < steps; ++k) {
      Vector<Unit> b_row[NV];
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) b_row[v] = load(b + v * kN);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        const Vector<Unit> a_unit = broadcast(a_data[m * a.row_stride]);
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) sums[m][v] = U::multiply_add(a_unit, b_row[v], sums[m][v]);
      }
      a_data += a.sum_stride;
      b += b_stride;
    }
    prefetcher.step();
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) store(c + m * c_stride + v * kN, sums[m][v]);
  }
}

template <class U, int NV, int MR = block_rows(NV)>
inline void multiply_rows(int rows, Panel<U> a, const typename U::Unit* b, int64_t b_stride, typename U::Sum* c,
                          int64_t c_stride, int64_t count, bool accumulate, Prefetcher& prefetcher) {
  if constexpr (MR > 0) {
    if (rows == MR) return multiply_block<U, MR, NV>(a, b, b_stride, c, c_stride, count, accumulate, prefetcher);
    return multiply_rows<U, NV, MR - 1>(rows, a, b, b_stride, c, c_stride, count, accumulate, prefetcher);
  }
}

template <class U, int NV>
inline void multiply_stripe(int64_t rows, Panel<U> a, const typename U::Unit* b, int64_t b_stride, typename U::Sum* c,
                            int64_t c_stride, int64_t count, bool accumulate, Prefetcher& prefetcher) {
  const int64_t blocks = (rows + block_rows(NV) - 1) / block_rows(NV);
  for (int64_t block = 0; block < blocks; ++block) {  // blocks of equal height, give or take one row
    const int64_t begin = rows * block / blocks, end = rows * (block + 1) / blocks;
    multiply_rows<U, NV>(int(end - begin), {a.data + begin * a.row_stride, a.row_stride, a.sum_stride}, b, b_stride,
                         c + begin * c_stride, c_stride, count, accumulate, prefetcher);
  }
}

// One column of C. When A's summed axis is contiguous, the lanes run along it; otherwise they run along the rows.
// Both may read up to a vector past the end of A's contiguous axis: panels are padded (with zeros along the summed
// axis).
template <class U>
inline void multiply_column(int64_t rows, Panel<U> a, const typename U::Unit* b, int64_t b_stride, typename U::Sum* c,
                            int64_t c_stride, int64_t count, bool accumulate, typename U::Unit* column) {
  using Sum = typename U::Sum;
  constexpr int kN = kLanes<Sum>;
  if (a.sum_stride == 1) {
    const int64_t padded = (count + kN - 1) / kN * kN;
    for (int64_t k = 0; k < count; ++k) column[k] = b[k * b_stride];
    for (int64_t k = count; k < padded; ++k) column[k] = 0;
    for (int64_t m = 0; m < rows; ++m) {
      const typename U::Unit* row = a.data + m * a.row_stride;
      Vector<Sum> sum{};
      for (int64_t k = 0; k < padded; k += kN) sum = U::multiply_add(load(row + k), load(column + k), sum);
      const Sum total = sum_of_lanes<Sum>(sum);
      c[m * c_stride] = accumulate ? c[m * c_stride] + total : total;
    }
    return;
  }
  for (int64_t m = 0; m < rows; m += kN) {
    Vector<Sum> sum{};
    for (int64_t k = 0; k < count; ++k) {
      sum = U::multiply_add(load(a.data + m + k * a.sum_stride), broadcast(b[k * b_stride]), sum);
    }
    for (int64_t i = 0; i < smaller(kN, rows - m); ++i) {
      Sum& target = c[(m + i) * c_stride];
      target = accumulate ? target + sum[i] : sum[i];
    }
  }
}

// How the columns of C are cut into stripes of up to kMostVectors vectors.
template <class U>
struct Stripes {
  static constexpr int kN = kLanes<typename U::Sum>;
  int64_t vectors, count;

  explicit Stripes(int64_t columns) {
    // A remainder of one or two columns (97 = 6 * 16 + 1) is cheaper one by one than as a vector that is mostly
    // padding.
    const int64_t rest = columns % kN;
    const bool single = columns > kN && rest > 0 && rest <= 2;
    vectors = single ? columns / kN : (columns + kN - 1) / kN;
    count = (vectors + kMostVectors - 1) / kMostVectors;
  }
  // How often a product of `rows` rows and `steps` steps lets the prefetcher work, at least.
  int64_t prefetches(int64_t rows, int64_t steps) const {
    return count * ((rows + block_rows(1) - 1) / block_rows(1)) * larger(1, steps / kStepsBetweenPrefetches);
  }
};

// C[rows][columns] (+)= A B. A must have sum_stride 1 or row_stride 1. `column` is scratch for `count` units, padded.
template <class U>
inline void multiply(int64_t rows, int64_t columns, int64_t count, Panel<U> a, const typename U::Unit* b,
                     int64_t b_stride, typename U::Sum* c, int64_t c_stride, bool accumulate, typename U::Unit* column,
                     Prefetcher& prefetcher) {
  constexpr int kN = kLanes<typename U::Sum>;
  const Stripes<U> stripes(columns);
  for (int64_t stripe = 0; stripe < stripes.count; ++stripe) {
    const int64_t begin = stripes.vectors * stripe / stripes.count,
                  end = stripes.vectors * (stripe + 1) / stripes.count;
    const auto* b_part = b + begin * kN;
    auto* c_part = c + begin * kN;
    switch (end - begin) {
      case 1:
        multiply_stripe<U, 1>(rows, a, b_part, b_stride, c_part, c_stride, count, accumulate, prefetcher);
        break;
      case 2:
        multiply_stripe<U, 2>(rows, a, b_part, b_stride, c_part, c_stride, count, accumulate, prefetcher);
        break;
      case 3:
        multiply_stripe<U, 3>(rows, a, b_part, b_stride, c_part, c_stride, count, accumulate, prefetcher);
        break;
      default:
        if constexpr (kMostVectors == 4) {
          multiply_stripe<U, 4>(rows, a, b_part, b_stride, c_part, c_stride, count, accumulate, prefetcher);
        }
    }
  }
  for (int64_t n = stripes.vectors * kN; n < columns; ++n) {
    multiply_column<U>(rows, a, b + n, b_stride, c + n, c_stride, count, accumulate, column);
  }
}

}  // namespace
