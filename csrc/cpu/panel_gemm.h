// Small matrix products on packed panels: C[m][n] (+)= sum_k A[m][k] B[k][n].
//
// A panel holds *units*: what one multiply instruction consumes of the summed axis. A unit is a float, a double, or a
// pair of neighbouring bfloat16 (AVX512-BF16), so that one loop serves all of them. A has free strides, because its
// units are broadcast; B and C have contiguous n.
// The register block is MR x NV vectors of C. What it needs of B per k stays in L1, A is read once per block. Pairs on
// AMX go through blocks of 2 x 2 tiles instead; there the summed axis is padded to whole tiles, with zeros in both
// operands, and blocks at the lower edge read and write whole tiles: panels end on a multiple of 16 rows.
#pragma once

#include <type_traits>

#include "prefetch.h"
#include "simd.h"
#include "tiles.h"

namespace {

struct FloatUnit {
  using Unit = float;
  using Sum = float;
  static constexpr int kPair = 1;
  static constexpr bool kTiles = false;
  static Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> sum) { return a * b + sum; }
};
struct DoubleUnit {
  using Unit = double;
  using Sum = double;
  static constexpr int kPair = 1;
  static constexpr bool kTiles = false;
  static Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> sum) { return a * b + sum; }
};
#if defined(__AVX512BF16__)
struct BFloat16Pair {
  using Unit = uint32_t;
  using Sum = float;
  static constexpr int kPair = 2;
  static constexpr bool kTiles = kHasTiles;
  static Vector<float> multiply_add(Vector<uint32_t> a, Vector<uint32_t> b, Vector<float> sum) {
    return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
using BFloat16Unit = BFloat16Pair;
#else
using BFloat16Unit = FloatUnit;
#endif
// The units that elements of storage type E are packed to.
template <class E>
using UnitOf = std::conditional_t<std::is_same_v<E, double>, DoubleUnit,
                                  std::conditional_t<std::is_same_v<E, BFloat16>, BFloat16Unit, FloatUnit>>;

// The elements number `which` of a vector of units.
template <class U>
inline Vector<typename U::Sum> sum_of_unit(Vector<typename U::Unit> units, [[maybe_unused]] int64_t which) {
  if constexpr (U::kPair == 1) {
    return units;
  } else {
    return (Vector<typename U::Sum>)(which ? units & 0xffff0000u : units << 16);
  }
}

// The largest register block of NV vectors a row that leaves registers for B and one broadcast of A.
constexpr int block_rows(int vectors) {
  if (kRegisters == 32) return vectors == 4 ? 6 : vectors == 3 ? 8 : 12;
  return vectors == 3 ? 4 : vectors == 2 ? 6 : 8;
}
constexpr int kMostVectors = kRegisters == 32 ? 4 : 3;

constexpr int64_t kStepsBetweenPrefetches = 8;

template <class U>
struct Panel {
  const typename U::Unit* data;
  int64_t row_stride;  // between neighbours of the axis that C keeps
  int64_t sum_stride;  // between neighbours of the summed axis
};

template <class U, int MR, int NV>
GINGHAM_STEP void multiply_block(Panel<U> a, const typename U::Unit* b, int64_t b_stride, typename U::Sum* c,
                                 int64_t c_stride, int64_t count, bool accumulate, Prefetcher& prefetcher) {
  using Sum = typename U::Sum;
  using Unit = typename U::Unit;
  constexpr int kN = kLanes<Sum>;
  Vector<Sum> sums[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) sums[m][v] = Vector<Sum>{};
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
    for (int v = 0; v < NV; ++v) {
      Sum* at = c + m * c_stride + v * kN;
      store(at, accumulate ? load(at) + sums[m][v] : sums[m][v]);
    }
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

// One column of C, from a column of B whose units are b_stride apart. When the summed axes of both are contiguous, the
// lanes run along them; otherwise they run along the rows, and may read up to a vector past the end of A.
template <class U>
GINGHAM_STEP void multiply_column(int64_t rows, Panel<U> a, const typename U::Unit* b, int64_t b_stride,
                                  typename U::Sum* c, int64_t c_stride, int64_t count, bool accumulate) {
  using Sum = typename U::Sum;
  constexpr int kN = kLanes<Sum>;
  if (a.sum_stride == 1 && b_stride == 1) {
    const typename U::Unit* column = b;
    const int64_t whole = count / kN * kN, rest = count - whole;
    const auto last = load_part(column + whole, rest);
    constexpr int kRows = 4;  // at a time, because a sum waits for its own last step
    for (int64_t begin = 0; begin < rows; begin += kRows) {
      const typename U::Unit* row[kRows];
      Vector<Sum> sums[kRows];
      for (int i = 0; i < kRows; ++i) {
        row[i] = a.data + smaller(begin + i, rows - 1) * a.row_stride;
        sums[i] = U::multiply_add(load_part(row[i] + whole, rest), last, Vector<Sum>{});
      }
      for (int64_t k = 0; k < whole; k += kN) {
        const auto b_part = load(column + k);
        for (int i = 0; i < kRows; ++i) sums[i] = U::multiply_add(load(row[i] + k), b_part, sums[i]);
      }
      for (int64_t i = 0; i < smaller(kRows, rows - begin); ++i) {
        Sum& target = c[(begin + i) * c_stride];
        const Sum total = sum_of_lanes(sums[i]);
        target = accumulate ? target + total : total;
      }
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

// A remainder of one or two columns (feature maps of 97, 129 or 257 have one) is cheaper one by one than as a vector
// that is mostly padding.
constexpr bool has_single_columns(int64_t columns, int lanes) {
  return columns > lanes && columns % lanes > 0 && columns % lanes <= 2;
}
// Room for a row of that many columns: whole vectors, but where columns are multiplied one by one. Then the row has no
// padding (97 columns stay 97), and vectors are stored in part at its end.
constexpr int64_t row_length(int64_t columns, int lanes) {
  return has_single_columns(columns, lanes) ? columns : (columns + lanes - 1) / lanes * lanes;
}

// How the columns of C are cut into stripes of up to kMostVectors vectors.
template <class U>
struct Stripes {
  static constexpr int kN = kLanes<typename U::Sum>;
  int64_t all, vectors, count;

  static constexpr int64_t kWidest = U::kTiles ? 2 : kMostVectors, kTallest = U::kTiles ? 2 * kTileRows : block_rows(1);

  explicit Stripes(int64_t columns) : all(columns) {
    vectors = has_single_columns(columns, kN) ? columns / kN : (columns + kN - 1) / kN;
    count = (vectors + kWidest - 1) / kWidest;
  }
  // Columns that are in no stripe and multiplied one by one: the last ones.
  int64_t single_columns() const { return larger(0, all - vectors * kN); }
  // How often a product of `rows` rows and `steps` steps lets the prefetcher work, at least.
  int64_t prefetches(int64_t rows, int64_t steps) const {
    constexpr int64_t kSteps = U::kTiles ? kTileRows : kStepsBetweenPrefetches;
    return count * ((rows + kTallest - 1) / kTallest) * larger(1, steps / kSteps);
  }
};

#if defined(GINGHAM_TILES)
// Up to 2 x 2 tiles of C in tiles 0 to 3; A passes through 4 and 5, B through 6 and 7. count is a multiple of 16.
template <int MT, int NT>
inline void multiply_tiles(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, float* c,
                           int64_t c_stride, int64_t count, bool accumulate, Prefetcher& prefetcher) {
  constexpr int64_t kSize = 4, kWidth = 16;
  const int64_t below = kTileRows * c_stride;
  if (accumulate) {
    tile_load<0>(c, c_stride * kSize);
    if constexpr (NT == 2) tile_load<1>(c + kWidth, c_stride * kSize);
    if constexpr (MT == 2) tile_load<2>(c + below, c_stride * kSize);
    if constexpr (MT == 2 && NT == 2) tile_load<3>(c + below + kWidth, c_stride * kSize);
  } else {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  }
  for (int64_t k = 0; k < count; k += kTileRows) {
    tile_load<6>(b + k * b_stride, b_stride * kSize);
    if constexpr (NT == 2) tile_load<7>(b + k * b_stride + kWidth, b_stride * kSize);
    tile_load<4>(a + k, a_stride * kSize);
    tile_multiply<0, 4, 6>();
    if constexpr (NT == 2) tile_multiply<1, 4, 7>();
    if constexpr (MT == 2) {
      tile_load<5>(a + k + kTileRows * a_stride, a_stride * kSize);
      tile_multiply<2, 5, 6>();
      if constexpr (NT == 2) tile_multiply<3, 5, 7>();
    }
    prefetcher.step();
  }
  tile_store<0>(c, c_stride * kSize);
  if constexpr (NT == 2) tile_store<1>(c + kWidth, c_stride * kSize);
  if constexpr (MT == 2) tile_store<2>(c + below, c_stride * kSize);
  if constexpr (MT == 2 && NT == 2) tile_store<3>(c + below + kWidth, c_stride * kSize);
}

template <int NT>
inline void multiply_tile_stripe(int64_t rows, Panel<BFloat16Pair> a, const uint32_t* b, int64_t b_stride, float* c,
                                 int64_t c_stride, int64_t count, bool accumulate, Prefetcher& prefetcher) {
  for (int64_t m = 0; m < rows; m += 2 * kTileRows) {
    const uint32_t* a_rows = a.data + m * a.row_stride;
    if (rows - m > kTileRows) {
      multiply_tiles<2, NT>(a_rows, a.row_stride, b, b_stride, c + m * c_stride, c_stride, count, accumulate,
                            prefetcher);
    } else {
      multiply_tiles<1, NT>(a_rows, a.row_stride, b, b_stride, c + m * c_stride, c_stride, count, accumulate,
                            prefetcher);
    }
  }
}
#endif

// Copies the columns of a right operand that are multiplied one by one to [column][stride], where each is contiguous.
template <class U>
GINGHAM_STEP void gather_single_columns(const typename U::Unit* b, int64_t b_stride, int64_t columns, int64_t count,
                                        typename U::Unit* to, int64_t stride) {
  for (int64_t n = columns - Stripes<U>(columns).single_columns(); n < columns; ++n, to += stride) {
    for (int64_t k = 0; k < count; ++k) to[k] = b[k * b_stride + n];
  }
}

// Units of scratch memory that `multiply` needs for a left operand of that many rows and steps.
template <class U>
inline int64_t multiply_scratch(int64_t rows, int64_t count) {
  return U::kTiles ? round_up(rows, kTileRows) * round_up(count, kTileRows) : 0;
}

// A with its summed axis contiguous, as tiles need it: blocks transposed into `copy` where it is not.
template <class U>
inline Panel<U> with_contiguous_sums(int64_t rows, Panel<U> a, int64_t count, typename U::Unit* copy) {
  using Unit = typename U::Unit;
  constexpr int kN = kLanes<Unit>;
  if (a.sum_stride == 1) return a;
  for (int64_t m = 0; m < rows; m += kN) {
    for (int64_t k = 0; k < count; k += kN) {
      Vector<Unit> block[kN];
      for (int i = 0; i < kN; ++i) block[i] = load(a.data + (k + i) * a.sum_stride + m);
      transpose<Unit>(block);
      for (int i = 0; i < kN; ++i) store(copy + (m + i) * count + k, block[i]);
    }
  }
  return {copy, count, 1};
}

// C[rows][columns] (+)= A B. With tiles, count is a multiple of 16. A must have row_stride 1, or sum_stride 1 and
// single_columns, those of B as gather_single_columns copies them.
template <class U>
inline void multiply(int64_t rows, int64_t columns, int64_t count, Panel<U> a, const typename U::Unit* b,
                     int64_t b_stride, const typename U::Unit* single_columns, int64_t single_stride,
                     typename U::Sum* c, int64_t c_stride, bool accumulate, typename U::Unit* scratch,
                     Prefetcher& prefetcher) {
  constexpr int kN = kLanes<typename U::Sum>;
  const Stripes<U> stripes(columns);
  const Panel<U> left = a;
  if constexpr (U::kTiles) a = with_contiguous_sums<U>(rows, a, count, scratch);
  for (int64_t stripe = 0; stripe < stripes.count; ++stripe) {
    const int64_t begin = stripes.vectors * stripe / stripes.count,
                  end = stripes.vectors * (stripe + 1) / stripes.count;
    const auto* b_part = b + begin * kN;
    auto* c_part = c + begin * kN;
    const auto with_vectors = [&](auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
#if defined(GINGHAM_TILES)
      if constexpr (U::kTiles && kVectors <= 2) {
        multiply_tile_stripe<kVectors>(rows, a, b_part, b_stride, c_part, c_stride, count, accumulate, prefetcher);
      }
#endif
      if constexpr (!U::kTiles) {
        multiply_stripe<U, kVectors>(rows, a, b_part, b_stride, c_part, c_stride, count, accumulate, prefetcher);
      }
    };
    switch (end - begin) {
      case 1:
        with_vectors(std::integral_constant<int, 1>());
        break;
      case 2:
        with_vectors(std::integral_constant<int, 2>());
        break;
      case 3:
        with_vectors(std::integral_constant<int, 3>());
        break;
      default:
        if constexpr (kMostVectors == 4) with_vectors(std::integral_constant<int, 4>());
    }
  }
  for (int64_t n = columns - stripes.single_columns(); n < columns; ++n) {
    if (single_columns) {
      multiply_column<U>(rows, left, single_columns, 1, c + n, c_stride, count, accumulate);
      single_columns += single_stride;
    } else {
      multiply_column<U>(rows, left, b + n, b_stride, c + n, c_stride, count, accumulate);
    }
  }
}

}  // namespace
