// Bilinear interpolation (align_corners=False) of maps that are small beside features, masks above all, and its
// adjoint.
//
// Both are separable. Interpolation blends two rows and picks from the result. The adjoint gathers: the rows that read
// the same two rows form a run, whose plain and whose weighted sum are taken in registers, so that a mask of bytes is
// widened once and nothing else is stored; then, with as many results' rows as a vector has lanes, rows become lanes,
// and the same is done along the columns.
#pragma once

#include <type_traits>

#include "gingham/masked_average_pool.h"
#include "simd.h"

namespace {

using gingham::MaskType;

// ---------------------------------------------------------------------------------------------- one axis

// What interpolation of an axis reads for one of its results: (1 - fraction) of `index` and fraction of `next`.
struct Tap {
  int64_t index, next;
  double fraction;
};

// Interpolation of an axis from `from` samples to `to`. Places are exact: whole numbers of units, 2 to of them between
// neighbouring samples.
struct Axis1d {
  int64_t from, to;

  int64_t unit() const { return 2 * to; }
  int64_t place(int64_t result) const { return (2 * result + 1) * from - to; }
  Tap tap(int64_t result) const {
    const int64_t x = larger(0, place(result)), index = x / unit();
    return {index, smaller(index + 1, from - 1), double(x % unit()) / double(unit())};
  }
  // The first result whose index is `index` or larger; `to` when there is none.
  int64_t first_result_of(int64_t index) const {
    if (index <= 0) return 0;
    const int64_t odd = ((2 * index + 1) * to + from - 1) / from;  // 2 result + 1 is this or more
    return smaller(to, odd / 2);
  }
};

struct Bilinear {
  Axis1d rows, columns;
};

// ---------------------------------------------------------------------------------------------- rows of any type

// Calls function(E{}) for the storage type E of a mask.
template <class Function>
inline auto with_mask_element(MaskType type, const Function& function) {
  switch (type) {
    case MaskType::float64:
      return function(double{});
    case MaskType::float16:
      return function(Half{});
    case MaskType::bfloat16:
      return function(BFloat16{});
    case MaskType::uint8:
      return function(uint8_t{});
    default:
      return function(float{});
  }
}

// A vector of `count` elements.
template <class T, int count>
struct PartType {
  typedef T type __attribute__((vector_size(count * sizeof(T))));
};
template <class T, int count>
using PartOf = typename PartType<T, count>::type;

// kLanes<Sum> bytes as numbers; by their own instructions, as compilers take the long way from bytes to floats.
template <class Sum>
inline Vector<Sum> load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Sum) == 4) {
    return (Vector<Sum>)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  } else {
    return (Vector<Sum>)_mm512_cvtepi32_pd(_mm256_cvtepu8_epi32(_mm_loadu_si64(p)));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(Sum) == 4) {
    return (Vector<Sum>)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadu_si64(p)));
  } else {
    return (Vector<Sum>)_mm256_cvtepi32_pd(_mm_cvtepu8_epi32(_mm_loadu_si32(p)));
  }
#else
  Vector<Sum> v;
  for (int i = 0; i < kLanes<Sum>; ++i) v[i] = Sum(p[i]);
  return v;
#endif
}

// kLanes<Sum> elements of a mask.
template <class Sum, class M>
inline Vector<Sum> load_mask(const M* p) {
  if constexpr (sizeof(M) == 1) {
    return load_bytes<Sum>(p);
  } else if constexpr (sizeof(M) == 2 && sizeof(Sum) == 4) {
    return load_widened(p);
  } else if constexpr (sizeof(M) == 2) {
    Vector<Sum> v;
    for (int i = 0; i < kLanes<Sum>; ++i) v[i] = to_float(p[i]);
    return v;
  } else if constexpr (sizeof(M) == sizeof(Sum)) {
    return load(p);
  } else {
    PartOf<M, kLanes<Sum> > part;
    std::memcpy(&part, p, sizeof part);
    return __builtin_convertvector(part, Vector<Sum>);
  }
}
// The first `count`, the others as zeros.
template <class Sum, class M>
inline Vector<Sum> load_mask(const M* p, int64_t count) {
  if (count >= kLanes<Sum>) return load_mask<Sum>(p);
  if constexpr (sizeof(M) > 1 && std::is_same_v<Sum, Accumulator<M> >) {
    return load_widened(p, int(count));
  } else {
    alignas(16) M part[16] = {};
#if defined(__AVX512F__)
    if constexpr (sizeof(M) == 1) {
      _mm_store_si128(reinterpret_cast<__m128i*>(part), _mm_maskz_loadu_epi8(first_lanes(int(count)), p));
      return load_mask<Sum>(part);
    }
#endif
    std::memcpy(part, p, size_t(count) * sizeof(M));
    return load_mask<Sum>(part);
  }
}

template <class Sum, class M>
inline void write_row(M* to, const Sum* row, int64_t count) {
  if constexpr (sizeof(M) != 2) {
    for (int64_t i = 0; i < count; ++i) to[i] = M(row[i]);
  } else {
    for (int64_t i = 0; i < count; i += kLanes<float>) {
      const int lanes = int(smaller(kLanes<float>, count - i));
      Vector<float> v{};
      for (int lane = 0; lane < lanes; ++lane) v[lane] = float(row[i + lane]);
      store_narrowed(to + i, v, lanes);
    }
  }
}

// Rows of neighbouring elements.
template <class M>
struct Rows {
  M* data;
  int64_t stride;
  M* at(int64_t row) const { return data + row * stride; }
};

// ---------------------------------------------------------------------------------------------- both axes

// Memory of one thread for maps of at most `columns` columns, before and after.
template <class Sum>
struct BilinearScratch {
  Sum* rows;       // [kLanes][row_stride]
  Sum* lanes;      // [columns + 1][kLanes]
  Sum* row;        // [row_stride]
  Sum* fractions;  // [row_stride], of the columns' taps
  int64_t* indices;
  int64_t row_stride;

  template <class Layout>
  BilinearScratch(Layout& layout, int64_t columns) : row_stride(round_up(columns, kLanes<Sum>)) {
    rows = layout.template take<Sum>(kLanes<Sum> * row_stride);
    lanes = layout.template take<Sum>(kLanes<Sum> * (columns + 1));
    row = layout.template take<Sum>(row_stride);
    fractions = layout.template take<Sum>(row_stride);
    indices = layout.template take<int64_t>(row_stride);
  }

  // Of adjoint_rows: its rows are lanes.
  const Sum* adjoint_row(int64_t lane, int64_t columns) const {
    for (int64_t x = 0; x < columns; ++x) row[x] = lanes[x * kLanes<Sum> + lane];
    return row;
  }
  void find_columns(const Axis1d& axis) const {
    const int64_t unit = axis.unit(), step = 2 * axis.from / unit, step_rest = 2 * axis.from % unit;
    const double scale = 1 / double(unit);
    int64_t result = 0;
    for (; result < axis.to && axis.place(result) < 0; ++result) indices[result] = 0, fractions[result] = 0;
    int64_t index = axis.place(result) / unit, rest = axis.place(result) % unit;
    for (; result < axis.to; ++result) {
      indices[result] = index;
      fractions[result] = Sum(double(rest) * scale);
      index += step, rest += step_rest;
      if (rest >= unit) rest -= unit, ++index;
    }
  }
};

// The rows of one run, weighted, are added to two rows of sums; returns their plain sum, lane by lane.
template <class M, class Sum>
inline Vector<Sum> add_run(const Rows<const M>& source, int64_t begin, int64_t end, const Axis1d& axis, int64_t columns,
                           Sum* to_index, Sum* to_next) {
  constexpr int kN = kLanes<Sum>, kMost = 16;
  Vector<Sum> total{};
  for (int64_t first = begin; first < end; first += kMost) {
    const int count = int(smaller(kMost, end - first));
    Sum fractions[kMost];
    for (int i = 0; i < count; ++i) fractions[i] = Sum(axis.tap(first + i).fraction);
    for (int64_t x = 0; x < columns; x += kN) {
      Vector<Sum> plain{}, weighted{};
      const M* p = source.at(first) + x;
      const auto add = [&](const auto& read) __attribute__((always_inline)) {
        for (int i = 0; i < count; ++i, p += source.stride) {
          const Vector<Sum> value = read(p);
          plain += value;
          weighted += fractions[i] * value;
        }
      };
      if (x + kN <= columns) {
        add([](const M* p) { return load_mask<Sum>(p); });
      } else {
        add([&](const M* p) { return load_mask<Sum>(p, columns - x); });
      }
      total += plain;
      if (to_index) store(to_index + x, load(to_index + x) + (plain - weighted));
      if (to_next) store(to_next + x, load(to_next + x) + weighted);
    }
  }
  return total;
}

// Rows [begin, begin + count) of the adjoint, count <= kLanes; scratch.adjoint_row has each. Returns the sum of the
// source's rows whose index is one of these: over all rows, every row of the source is in one such sum.
template <class M, class Sum>
__attribute__((noinline)) Sum adjoint_rows(const Bilinear& bilinear, const Rows<const M>& source, int64_t begin,
                                           int64_t count, const BilinearScratch<Sum>& scratch) {
  constexpr int kN = kLanes<Sum>;
  const Axis1d &rows = bilinear.rows, &columns = bilinear.columns;
  const int64_t stride = round_up(columns.to, kN);
  __builtin_memset(scratch.rows, 0, size_t(kN * stride) * sizeof(Sum));
  Vector<Sum> total{};
  int64_t first = rows.first_result_of(begin - 1);
  for (int64_t index = larger(0, begin - 1); index < begin + count; ++index) {
    const int64_t end = rows.first_result_of(index + 1);
    const int64_t own = index - begin, next = smaller(index + 1, rows.from - 1) - begin;
    const Vector<Sum> sum =
        add_run(source, first, end, rows, columns.to, own >= 0 ? scratch.rows + own * stride : nullptr,
                next < count ? scratch.rows + next * stride : nullptr);
    if (own >= 0) total += sum;
    first = end;
  }

  __builtin_memset(scratch.lanes, 0, size_t(kN * (columns.from + 1)) * sizeof(Sum));
  scratch.find_columns(columns);
  Vector<Sum> plain{}, weighted{};
  int64_t index = 0;
  const auto flush = [&] {
    Sum* p = scratch.lanes + index * kN;
    // At the last index, `next` is the same one.
    const int64_t to_next = index + 1 < columns.from ? kN : 0;
    store(p, load(p) + (plain - weighted));
    store(p + to_next, load(p + to_next) + weighted);
  };
  for (int64_t x = 0; x < columns.to; x += kN) {
    Vector<Sum> block[kN];
#pragma GCC unroll 16
    for (int i = 0; i < kN; ++i) block[i] = load(scratch.rows + i * stride + x);
    transpose<Sum>(block);
    Sum values[kN * kN] __attribute__((aligned(64)));
#pragma GCC unroll 16
    for (int i = 0; i < kN; ++i) store(values + i * kN, block[i]);
    for (int64_t i = 0; i < smaller(kN, columns.to - x); ++i) {
      if (scratch.indices[x + i] != index) {
        flush();
        index = scratch.indices[x + i];
        plain = weighted = Vector<Sum>{};
      }
      const Vector<Sum> value = load(values + i * kN);
      plain += value;
      weighted += scratch.fractions[x + i] * value;
    }
  }
  flush();
  return sum_of_lanes(total);
}

// One row of the interpolated map. The scratch's find_columns was called; it keeps the result in lanes.
template <class M, class Sum>
__attribute__((noinline)) const Sum* interpolate_row(const Bilinear& bilinear, const Rows<const M>& source, int64_t row,
                                                     const BilinearScratch<Sum>& scratch) {
  const Tap tap = bilinear.rows.tap(row);
  const M *upper = source.at(tap.index), *lower = source.at(tap.next);
  const int64_t columns = bilinear.columns.from;
  for (int64_t x = 0; x < columns; x += kLanes<Sum>) {
    const Vector<Sum> a = load_mask<Sum>(upper + x, columns - x), b = load_mask<Sum>(lower + x, columns - x);
    store(scratch.row + x, a * Sum(1 - tap.fraction) + b * Sum(tap.fraction));
  }
  Sum* result = scratch.lanes;
  for (int64_t x = 0; x < bilinear.columns.to; ++x) {
    const int64_t index = scratch.indices[x], next = smaller(index + 1, columns - 1);
    const Sum fraction = scratch.fractions[x];
    result[x] = scratch.row[index] * (1 - fraction) + scratch.row[next] * fraction;
  }
  return result;
}

}  // namespace
