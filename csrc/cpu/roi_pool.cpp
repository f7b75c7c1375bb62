// RoI max pooling on the CPU.
//
// The floor is memory: a box's part of the map is read and the output is written once; the comparison that a load feeds
// costs less than the load. The edges of all bins are computed once per call, for all channels.
//
// Channels first. A plane stays in cache while all boxes are pooled from it. Maxima are separable: the rows of a bin
// are folded into one line, vector by vector, for all bins beside each other; then the columns of each bin. Where the
// bins of a vector lie within two vectors of columns (a `narrow` box), step s picks the s-th column of each bin in
// registers; otherwise a vector holds columns of one bin, and the vectors of as many bins as there are lanes are folded
// into one that has a bin per lane. Backward needs the place of the first maximum too: forward has kept it, or it is
// found anew. One thread adds to a plane's gradient, box after box, in the order of the definition.
//
// Channels last. Lanes are channels, and a bin's pixels are folded one after the other.
#include "gingham/roi_pool.h"

#include <cfloat>
#include <type_traits>

#include "elements.h"
#include "parallel.h"
#include "simd.h"

namespace {

using gingham::MapView;
using gingham::ParallelFor;
using gingham::RoiPoolBackward;
using gingham::RoiPoolForward;
using gingham::RoiPoolShape;

template <class T>
using Index = typename IntegerOf<T>::type;

template <class T>
constexpr T kLowest = T(-FLT_MAX);  // what only greater pixels can beat, in float64 too
constexpr int32_t kNowhere = INT32_MAX;

// ---------------------------------------------------------------------------------------------- the bins of a box

inline float round_half_away(float x) { return __builtin_roundf(x); }
inline double round_half_away(double x) { return __builtin_round(x); }
inline float round_down(float x) { return __builtin_floorf(x); }
inline double round_down(double x) { return __builtin_floor(x); }

template <class T>
int64_t saturated(T rounded) {
  if (rounded >= T(2147483648.0)) return INT32_MAX;
  // What is no number (nothing times a scale beyond the type) goes with the smallest.
  return rounded >= T(-2147483648.0) ? int64_t(rounded) : int64_t{INT32_MIN};
}

// The edges of `pooled` bins along an axis of `extent` pixels. An empty bin ends where it begins, or before.
template <class T>
void cut_into_bins(T first, T last, T scale, int64_t pooled, int64_t extent, Index<T>* begin, Index<T>* end) {
  const int64_t start = saturated(round_half_away(first * scale)), stop = saturated(round_half_away(last * scale));
  const T bin = T(larger(stop - start + 1, 1)) / T(pooled);
  for (int64_t i = 0; i < pooled; ++i) {
    const int64_t from = start + int64_t(round_down(T(i) * bin));
    const int64_t to = start - int64_t(round_down(-(T(i + 1) * bin)));
    begin[i] = Index<T>(smaller(larger(from, 0), extent));
    end[i] = Index<T>(smaller(larger(to, 0), extent));
  }
}

// A box as all channels see it. Begins and ends of bins are monotonic, so that a box spans what lies between the begin
// of the first and the end of the last.
template <class T>
struct Box {
  int64_t image;
  const Index<T>*row_begin, *row_end;
  const Index<T>*column_begin, *column_end;  // padded to whole vectors by empty bins
  int64_t first_column, columns;             // that a line of folded rows has
  int64_t most_columns;                      // of a bin
  bool narrow;
};

template <class T>
struct BoxMemory {
  int64_t padded_columns, bytes;

  explicit BoxMemory(const RoiPoolShape& shape)
      : padded_columns(round_up(shape.pooled_columns, kLanes<T>)),
        bytes(round_up(int64_t(sizeof(Box<T>)) + 2 * (shape.pooled_rows + padded_columns) * int64_t(sizeof(Index<T>)),
                       64)) {}

  const Box<T>& at(const char* memory, int64_t n) const { return *reinterpret_cast<const Box<T>*>(memory + n * bytes); }

  void fill(const RoiPoolShape& shape, const T* numbers, T scale, char* memory) const {
    Box<T>& box = *reinterpret_cast<Box<T>*>(memory);
    auto *row_begin = reinterpret_cast<Index<T>*>(memory + sizeof(Box<T>)), *row_end = row_begin + shape.pooled_rows;
    auto *column_begin = row_end + shape.pooled_rows, *column_end = column_begin + padded_columns;
    cut_into_bins(numbers[2], numbers[4], scale, shape.pooled_rows, shape.rows, row_begin, row_end);
    cut_into_bins(numbers[1], numbers[3], scale, shape.pooled_columns, shape.columns, column_begin, column_end);
    for (int64_t j = shape.pooled_columns; j < padded_columns; ++j) column_begin[j] = column_end[j] = 0;
    box = {int64_t(numbers[0]), row_begin, row_end, column_begin, column_end, 0, 0, 0, true};

    // A line is at least a vector, where the map has one.
    const int64_t begin = column_begin[0], end = column_end[shape.pooled_columns - 1];
    box.columns = larger(end - begin, smaller(kLanes<T>, shape.columns));
    box.first_column = smaller(begin, shape.columns - box.columns);
    for (int64_t j = 0; j < shape.pooled_columns; ++j) {
      const int64_t first = j / kLanes<T> * kLanes<T>;
      box.most_columns = larger(box.most_columns, column_end[j] - column_begin[j]);
      box.narrow = box.narrow && column_end[j] - column_begin[first] <= 2 * kLanes<T>;
    }
  }
};

// ---------------------------------------------------------------------------------------------- vectors

template <class T>
inline Integers<T> lane_numbers() {
  Integers<T> lanes;
  for (int i = 0; i < kLanes<T>; ++i) lanes[i] = i;
  return lanes;
}
template <class T>
inline Integers<T> broadcast_index(int64_t x) {
  return Index<T>(x) - Integers<T>{};
}

// Lane i is source[index[i]]; indices count modulo two vectors.
template <class E>
inline Vector<Accumulator<E>> pick(const E* source, Integers<Accumulator<E>> index) {
  constexpr int kN = kLanes<Accumulator<E>>;
#if defined(__AVX2__)
  return __builtin_shuffle(load_widened(source), load_widened(source + kN), index);
#else
  Vector<Accumulator<E>> v;
  for (int i = 0; i < kN; ++i) v[i] = to_float(source[index[i] & (2 * kN - 1)]);
  return v;
#endif
}
template <class T>
__attribute__((always_inline)) inline Vector<T> largest_of_each(Vector<T>* rows) {
  return fold_lanes<T>(rows, [](Vector<T> a, Vector<T> b) { return maximum<T>(a, b); });
}
template <class T>
__attribute__((always_inline)) inline Integers<T> smallest_of_each(Integers<T>* rows) {
  return fold_lanes<T>(rows, [](Integers<T> a, Integers<T> b) { return a < b ? a : b; });
}

template <class T>
inline bool any(Integers<T> mask) {
  int64_t parts[kVectorBytes / 8], bits = 0;
  std::memcpy(parts, &mask, sizeof mask);
  for (const int64_t part : parts) bits |= part;
  return bits != 0;
}

// ---------------------------------------------------------------------------------------------- folding rows

// Calls block(column, number of vectors) until vectors cover a line; the last one ends where the line does. A line
// shorter than a vector has one.
template <class T, class Block>
inline void for_each_block(int64_t columns, const Block& block) {
  constexpr int64_t kN = kLanes<T>;
  int64_t column = 0;
  for (; column + 4 * kN <= columns; column += 4 * kN) block(column, std::integral_constant<int, 4>());
  for (; column + 2 * kN <= columns; column += 2 * kN) block(column, std::integral_constant<int, 2>());
  for (; column + kN <= columns; column += kN) block(column, std::integral_constant<int, 1>());
  if (column < columns) block(larger(0, columns - kN), std::integral_constant<int, 1>());
}

// A vector of a line of `columns`; zeros follow a shorter one.
template <class E>
inline Vector<Accumulator<E>> load_of_line(const E* p, int64_t columns) {
  return columns >= kLanes<Accumulator<E>> ? load_widened(p) : load_widened(p, int(columns));
}

// line[x] is the largest number of column x of some rows. `least` keeps the smallest of all numbers' bits, taken for
// integers: that is -0 if there is one.
template <class E, class T = Accumulator<E>>
GINGHAM_STEP void fold_rows(const E* rows, int64_t row_stride, int64_t count, int64_t columns, T* line,
                            Integers<T>& least) {
  for_each_block<T>(columns, [&](int64_t column, auto vectors) {
    constexpr int kVectors = vectors;
    Vector<T> best[kVectors];
    Integers<T> smallest[kVectors];
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) best[k] = broadcast(kLowest<T>), smallest[k] = least;
    const E* p = rows + column;
    for (int64_t r = 0; r < count; ++r, p += row_stride) {
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) {
        const Vector<T> x = kVectors > 1 ? load_widened(p + k * kLanes<T>) : load_of_line(p, columns);
        best[k] = maximum<T>(x, best[k]);
        smallest[k] = (Integers<T>)x < smallest[k] ? (Integers<T>)x : smallest[k];
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      store(line + column + k * kLanes<T>, best[k]);
      least = smallest[k] < least ? smallest[k] : least;
    }
  });
}

// The same, and the place of the first such number: row * width + column, `place` for the first.
template <class E, class T = Accumulator<E>>
GINGHAM_STEP void fold_rows(const E* rows, int64_t row_stride, int64_t count, int64_t columns, int64_t place,
                            int64_t width, T* line, Index<T>* places) {
  for_each_block<T>(columns, [&](int64_t column, auto vectors) {
    constexpr int kVectors = vectors;
    Vector<T> best[kVectors];
    Integers<T> best_row[kVectors];
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) best[k] = broadcast(kLowest<T>), best_row[k] = Integers<T>{};
    const E* p = rows + column;
    Integers<T> row = broadcast_index<T>(place + column);
    for (int64_t r = 0; r < count; ++r, p += row_stride, row += Index<T>(width)) {
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) {
        const Vector<T> x = kVectors > 1 ? load_widened(p + k * kLanes<T>) : load_of_line(p, columns);
        const Integers<T> better = x > best[k];
        best[k] = better ? x : best[k];
        best_row[k] = better ? row : best_row[k];
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      store(line + column + k * kLanes<T>, best[k]);
      store(places + column + k * kLanes<T>, best_row[k] + lane_numbers<T>() + Index<T>(k * kLanes<T>));
    }
  });
}

// ---------------------------------------------------------------------------------------------- folding columns

// The columns that lie in each of a vector of bins.
template <class T>
struct Picks {
  int64_t base;             // in the map
  Integers<T> first, last;  // from there
  Picks(const Box<T>& box, int64_t j, int64_t most_base)
      : base(smaller(box.column_begin[j], most_base)),
        first(load(box.column_begin + j) - Index<T>(base)),
        last(load(box.column_end + j) - Index<T>(base + 1)) {}

  Integers<T> is_empty() const { return first > last; }
  Integers<T> step(int64_t s) const {
    const Integers<T> index = first + Index<T>(s);
    return index < last ? index : last;
  }
};

// The largest of `count` numbers is among the lanes; zeros if there are none.
template <class T>
inline Vector<T> fold_columns(const T* line, int64_t count) {
  constexpr int64_t kN = kLanes<T>;
  if (count <= 0) return Vector<T>{};
  Vector<T> best = load(line);
  if (count < kN) return lane_numbers<T>() < broadcast_index<T>(count) ? best : broadcast(kLowest<T>);
  for (int64_t x = kN; x + kN <= count; x += kN) best = maximum<T>(load(line + x), best);
  return maximum<T>(load(line + count - kN), best);
}

// The same with places; lanes without a number are lowest.
template <class T>
inline void fold_columns(const T* line, const Index<T>* places, int64_t count, Vector<T>& best, Integers<T>& place) {
  constexpr int64_t kN = kLanes<T>;
  best = broadcast(kLowest<T>), place = Integers<T>{};
  if (count <= 0) return;
  if (count < kN) {
    best = lane_numbers<T>() < broadcast_index<T>(count) ? load(line) : best;
    place = load(places);
    return;
  }
  for (int64_t x = 0; x < count; x += kN) {
    const int64_t at = smaller(x, count - kN);
    const Vector<T> value = load(line + at);
    const Integers<T> value_place = load(places + at);
    const Integers<T> better = (value > best) | ((value == best) & (value_place < place));
    best = better ? value : best;
    place = better ? value_place : place;
  }
}

// ---------------------------------------------------------------------------------------------- channels first

// What a thread works in: the folded rows of some bin rows, and the places that were found in them, if asked for.
template <class T>
struct Scratch {
  int64_t lines, line_stride, bytes;
  T* values = nullptr;
  Index<T>*places = nullptr, *found = nullptr;

  // A line is followed by two vectors, which are read but not used, and what was found is written in whole vectors.
  Scratch(const RoiPoolShape& shape, bool with_places)
      : line_stride(round_up(shape.columns, kLanes<T>) + 2 * kLanes<T>) {
    lines = smaller(shape.pooled_rows, larger(1, 16 * 1024 / (line_stride * int64_t(sizeof(T)))));
    const int64_t found_size = round_up(lines * shape.pooled_columns, kLanes<T>);
    bytes = (line_stride * lines * (with_places ? 2 : 1) + (with_places ? found_size : 0)) * int64_t(sizeof(T));
  }
  Scratch at(char* memory) const {
    static_assert(sizeof(Index<T>) == sizeof(T));
    Scratch own = *this;
    own.values = reinterpret_cast<T*>(memory);
    own.places = reinterpret_cast<Index<T>*>(own.values + line_stride * lines);
    own.found = own.places + line_stride * lines;
    return own;
  }
};

// One box on one plane.
template <class E>
struct Pooling {
  using T = Accumulator<E>;
  const RoiPoolShape& shape;
  const Box<T>& box;
  const Scratch<T>& scratch;
  const E* features;
  int64_t row_stride;

  int64_t rows_of(int64_t i) const { return box.row_end[i] - box.row_begin[i]; }
  int64_t columns_of(int64_t j) const { return box.column_end[j] - box.column_begin[j]; }
  // The first row of bin row i, from a column on.
  const E* first_row_of(int64_t i, int64_t column) const { return features + box.row_begin[i] * row_stride + column; }

  // Calls bin(lane, where the bin's first column is in the folded lines, number of columns) for the outputs from
  // `index` on, of bin rows from `first_row` on; the number is 0 where there are no pixels or no outputs.
  template <class Bin>
  void for_each_lane(int64_t index, int64_t first_row, const Bin& bin) const {
    int64_t i = index / shape.pooled_columns, j = index % shape.pooled_columns;
    const int64_t end_row = smaller(shape.pooled_rows, first_row + scratch.lines);
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      const int64_t columns = i < end_row && rows_of(i) > 0 ? columns_of(j) : 0;
      bin(lane, (i - first_row) * scratch.line_stride + box.column_begin[j] - box.first_column, columns);
      if (++j == shape.pooled_columns) j = 0, ++i;
    }
  }
};

// Outputs in order: a vector is stored whole where later ones overwrite what is too much.
template <class E>
inline void put(E* output, Vector<Accumulator<E>> v, int64_t index, int64_t outputs) {
  if (index + kLanes<Accumulator<E>> <= outputs) {
    store_narrowed(output + index, v);
  } else {
    store_narrowed(output + index, v, int(outputs - index));
  }
}

template <class E, class T = Accumulator<E>>
GINGHAM_STEP void pool_narrow(const Pooling<E>& at, E* output, Integers<T>& least) {
  const Box<T>& box = at.box;
  const int64_t pooled_columns = at.shape.pooled_columns, outputs = at.shape.pooled_rows * pooled_columns;
  for (int64_t i = 0; i < at.shape.pooled_rows; ++i) {
    const bool has_rows = at.rows_of(i) > 0;
    if (has_rows) {
      fold_rows(at.first_row_of(i, box.first_column), at.row_stride, at.rows_of(i), box.columns, at.scratch.values,
                least);
    }
    for (int64_t j = 0; j < pooled_columns; j += kLanes<T>) {
      const Picks<T> picks(box, j, at.shape.columns);
      const T* line = at.scratch.values + picks.base - box.first_column;
      Vector<T> best = pick(line, picks.first);
      for (int64_t s = 1; s < box.most_columns; ++s) best = maximum<T>(pick(line, picks.step(s)), best);
      best = picks.is_empty() ? Vector<T>{} : best;
      put(output, has_rows ? best : Vector<T>{}, i * pooled_columns + j, outputs);
    }
  }
}

template <class E, class T = Accumulator<E>>
GINGHAM_STEP void pool_wide(const Pooling<E>& at, E* output, Integers<T>& least) {
  const Box<T>& box = at.box;
  const int64_t pooled_columns = at.shape.pooled_columns, outputs = at.shape.pooled_rows * pooled_columns;
  for (int64_t first_row = 0; first_row < at.shape.pooled_rows; first_row += at.scratch.lines) {
    const int64_t end_row = smaller(at.shape.pooled_rows, first_row + at.scratch.lines);
    for (int64_t i = first_row; i < end_row; ++i) {
      T* line = at.scratch.values + (i - first_row) * at.scratch.line_stride;
      fold_rows(at.first_row_of(i, box.first_column), at.row_stride, at.rows_of(i), box.columns, line, least);
    }
    for (int64_t index = first_row * pooled_columns; index < end_row * pooled_columns; index += kLanes<T>) {
      Vector<T> bins[kLanes<T>];
      at.for_each_lane(index, first_row, [&](int lane, int64_t place, int64_t columns) {
        bins[lane] = fold_columns(at.scratch.values + place, columns);
      });
      put(output, largest_of_each<T>(bins), index, outputs);
    }
  }
}

// A maximum of 0 has the sign of the first zero of its bin; folding rows before columns may have met another one first.
template <class E>
void restore_signs_of_zeros(const Pooling<E>& at, E* output) {
  for (int64_t i = 0; i < at.shape.pooled_rows; ++i) {
    for (int64_t j = 0; j < at.shape.pooled_columns; ++j, ++output) {
      if (to_float(*output) != 0 || at.rows_of(i) <= 0 || at.columns_of(j) <= 0) continue;
      const E* p = at.first_row_of(i, at.box.column_begin[j]);
      for (int64_t x = 0; to_float(*output = p[x]) != 0;) {
        if (++x == at.columns_of(j)) x = 0, p += at.row_stride;
      }
    }
  }
}

template <class E>
void pool_plane(const Pooling<E>& at, E* output) {
  using T = Accumulator<E>;
  constexpr Index<T> kNegativeZero = sizeof(T) == 4 ? Index<T>(INT32_MIN) : Index<T>(INT64_MIN);
  Integers<T> least{};
  if (at.box.narrow) {
    pool_narrow(at, output, least);
  } else {
    pool_wide(at, output, least);
  }
  if (any<T>(least == kNegativeZero)) restore_signs_of_zeros(at, output);
}

// Calls take(first bin row, end) whenever scratch.found holds the places of those bin rows' maxima, side by side.
template <class E, class Take>
GINGHAM_STEP void find_narrow(const Pooling<E>& at, const Take& take) {
  using T = Accumulator<E>;
  const Box<T>& box = at.box;
  const int64_t width = at.shape.columns;
  for (int64_t i = 0; i < at.shape.pooled_rows; ++i) {
    for (int64_t j = 0; j < at.shape.pooled_columns; j += kLanes<T>) {
      const Picks<T> picks(box, j, width - 2 * kLanes<T>);
      Vector<T> best = broadcast(kLowest<T>);
      Integers<T> places = broadcast_index<T>(kNowhere);
      const E* p = at.first_row_of(i, picks.base);
      for (int64_t y = box.row_begin[i]; y < box.row_end[i]; ++y, p += at.row_stride) {
        const Integers<T> base = broadcast_index<T>(y * width + picks.base);
        for (int64_t s = 0; s < box.most_columns; ++s) {
          const Integers<T> index = picks.step(s);
          const Vector<T> x = pick(p, index);
          const Integers<T> better = x > best;
          best = better ? x : best;
          places = better ? base + index : places;
        }
      }
      store(at.scratch.found + j, picks.is_empty() ? broadcast_index<T>(kNowhere) : places);
    }
    take(i, i + 1);
  }
}

template <class E, class Take>
GINGHAM_STEP void find_wide(const Pooling<E>& at, const Take& take) {
  using T = Accumulator<E>;
  const Box<T>& box = at.box;
  const int64_t pooled_columns = at.shape.pooled_columns;
  for (int64_t first_row = 0; first_row < at.shape.pooled_rows; first_row += at.scratch.lines) {
    const int64_t end_row = smaller(at.shape.pooled_rows, first_row + at.scratch.lines);
    for (int64_t i = first_row; i < end_row; ++i) {
      const int64_t line = (i - first_row) * at.scratch.line_stride;
      fold_rows(at.first_row_of(i, box.first_column), at.row_stride, at.rows_of(i), box.columns,
                box.row_begin[i] * at.shape.columns + box.first_column, at.shape.columns, at.scratch.values + line,
                at.scratch.places + line);
    }
    for (int64_t index = first_row * pooled_columns; index < end_row * pooled_columns; index += kLanes<T>) {
      Vector<T> bins[kLanes<T>], folded[kLanes<T>];
      Integers<T> places[kLanes<T>];
      at.for_each_lane(index, first_row, [&](int lane, int64_t place, int64_t columns) {
        fold_columns(at.scratch.values + place, at.scratch.places + place, columns, bins[lane], places[lane]);
        folded[lane] = bins[lane];
      });
      const Vector<T> best = largest_of_each<T>(folded);
      const Integers<T> nowhere = broadcast_index<T>(kNowhere);
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        places[lane] = bins[lane] == broadcast(best[lane]) ? places[lane] : nowhere;
      }
      store(at.scratch.found + index - first_row * pooled_columns,
            best > kLowest<T> ? smallest_of_each<T>(places) : nowhere);
    }
    take(first_row, end_row);
  }
}

template <class E, class Take>
void find_places(const Pooling<E>& at, const Take& take) {
  if (at.box.narrow && at.shape.columns >= 2 * kLanes<Accumulator<E>>) {
    find_narrow(at, take);
  } else {
    find_wide(at, take);
  }
}

// The hardware does not foresee where the next box's outputs are, in one plane.
template <class X>
inline void prefetch_row(const X* row, int64_t columns) {
  const char* p = reinterpret_cast<const char*>(row);
  for (int64_t b = 0; b < columns * int64_t(sizeof(X)); b += 64) __builtin_prefetch(p + b, 0, 2);
}

// Adds the gradients of a box's outputs, in order, to the pixels where their maxima were found.
template <class E>
struct Scatter {
  using T = Accumulator<E>;
  const Pooling<E>& at;
  const MapView& grad;
  const E* data;     // of the box
  int64_t next_box;  // from there
  T* sums;           // [row][column]

  void operator()(int64_t first_row, int64_t end_row) const {
    const int64_t columns = at.shape.pooled_columns;
    const Index<T>* place = at.scratch.found;
    for (int64_t i = first_row; i < end_row; ++i, place += columns) {
      const E* g = data + i * grad.row_stride;
      prefetch_row(g + next_box, columns);
      for (int64_t j = 0; j < columns; ++j, g += grad.column_stride) {
        if (place[j] != kNowhere) sums[place[j]] += to_float(*g);
      }
    }
  }
};

// Output and places of one box on one plane.
template <class E>
void pool_and_keep(const Pooling<E>& at, E* output, int32_t* places) {
  using T = Accumulator<E>;
  const int64_t width = at.shape.columns, columns = at.shape.pooled_columns;
  find_places(at, [&](int64_t first_row, int64_t end_row) {
    const Index<T>* found = at.scratch.found;
    for (int64_t i = first_row; i < end_row; ++i) {
      const bool has_rows = at.rows_of(i) > 0;
      for (int64_t j = 0; j < columns; ++j, ++found, ++output, ++places) {
        if (*found != kNowhere) {
          *output = at.row_stride == width ? at.features[*found]
                                           : at.features[*found / width * at.row_stride + *found % width];
          *places = int32_t(*found);
        } else {
          store_narrowed(output, broadcast(has_rows && at.columns_of(j) > 0 ? kLowest<T> : T(0)), 1);
          *places = -1;
        }
      }
    }
  });
}

// As Scatter, where forward kept the places. They are checked, as anybody may call backward.
template <class E, class T = Accumulator<E>>
GINGHAM_STEP void scatter_kept(const RoiPoolBackward& call, const E* grad, const int32_t* places, bool has_next,
                               T* sums) {
  const RoiPoolShape& shape = call.shape;
  const uint64_t pixels = uint64_t(shape.rows * shape.columns);
  for (int64_t i = 0; i < shape.pooled_rows; ++i) {
    const E* g = grad + i * call.grad_output.row_stride;
    const int32_t* place = places + i * call.places.row_stride;
    prefetch_row(g + (has_next ? call.grad_output.batch_stride : 0), shape.pooled_columns);
    prefetch_row(place + (has_next ? call.places.batch_stride : 0), shape.pooled_columns);
    for (int64_t j = 0; j < shape.pooled_columns; ++j, g += call.grad_output.column_stride) {
      if (uint64_t(place[j]) < pixels) sums[place[j]] += to_float(*g);
    }
  }
}

// ---------------------------------------------------------------------------------------------- channels last

// Calls pixel(p, place) for the pixels of a bin in raster order.
template <class E, class T, class Pixel>
inline void for_each_pixel(const RoiPoolShape& shape, const MapView& map, const E* features, const Box<T>& box,
                           int64_t i, int64_t j, const Pixel& pixel) {
  for (int64_t y = box.row_begin[i]; y < box.row_end[i]; ++y) {
    const E* p = features + y * map.row_stride + box.column_begin[j] * map.column_stride;
    for (int64_t x = box.column_begin[j]; x < box.column_end[j]; ++x, p += map.column_stride) {
      pixel(p, y * shape.columns + x);
    }
  }
}

// Some vectors of channels of one box; of a single one, the first `channels` lanes.
template <int kVectors, class E, class T>
GINGHAM_STEP void pool_channels(const RoiPoolForward& call, const Box<T>& box, const E* features, E* output,
                                int64_t channels) {
  const RoiPoolShape& shape = call.shape;
  const auto load_channels = [&](const E* p, int k) {
    return kVectors > 1 ? load_widened(p + k * kLanes<T>) : load_of_line(p, channels);
  };
  for (int64_t i = 0; i < shape.pooled_rows; ++i) {
    for (int64_t j = 0; j < shape.pooled_columns; ++j, output += call.output.column_stride) {
      const bool is_empty = box.row_end[i] <= box.row_begin[i] || box.column_end[j] <= box.column_begin[j];
      Vector<T> best[kVectors];
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) best[k] = broadcast(is_empty ? T(0) : kLowest<T>);
      for_each_pixel(shape, call.features, features, box, i, j, [&](const E* p, int64_t) {
#pragma GCC unroll 4
        for (int k = 0; k < kVectors; ++k) best[k] = maximum<T>(load_channels(p, k), best[k]);
      });
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) put(output + k * kLanes<T>, best[k], 0, channels - k * kLanes<T>);
    }
  }
}

// Calls take(i, j, maxima, their places) for a vector of channels of one box.
template <class E, class T, class Take>
GINGHAM_STEP void find_places_of_channels(const RoiPoolShape& shape, const MapView& map, const Box<T>& box,
                                          const E* features, int64_t channels, const Take& take) {
  for (int64_t i = 0; i < shape.pooled_rows; ++i) {
    for (int64_t j = 0; j < shape.pooled_columns; ++j) {
      Vector<T> best = broadcast(kLowest<T>);
      Integers<T> places = broadcast_index<T>(kNowhere);
      for_each_pixel(shape, map, features, box, i, j, [&](const E* p, int64_t place) {
        const Vector<T> x = load_of_line(p, channels);
        const Integers<T> better = x > best;
        best = better ? x : best;
        places = better ? broadcast_index<T>(place) : places;
      });
      take(i, j, best, places);
    }
  }
}

template <class E, class T>
void pool_and_keep_channels(const RoiPoolForward& call, const Box<T>& box, const E* features, E* output,
                            int32_t* places, int64_t channels) {
  const auto take = [&](int64_t i, int64_t j, Vector<T> best, Integers<T> found) {
    const bool is_empty = box.row_end[i] <= box.row_begin[i] || box.column_end[j] <= box.column_begin[j];
    put(output, is_empty ? Vector<T>{} : best, 0, channels);
    const Integers<T> kept = found == broadcast_index<T>(kNowhere) ? broadcast_index<T>(-1) : found;
    for (int64_t lane = 0; lane < smaller(channels, kLanes<T>); ++lane) places[lane] = int32_t(kept[lane]);
    output += call.output.column_stride, places += call.places.column_stride;
  };
  find_places_of_channels(call.shape, call.features, box, features, channels, take);
}

// sums: [pixel][channel], `stride` from pixel to pixel.
template <class E, class T>
GINGHAM_STEP void collect_kept_channels(const RoiPoolBackward& call, const E* grad, const int32_t* places, T* sums,
                                        int64_t stride, int64_t channels) {
  const RoiPoolShape& shape = call.shape;
  const uint64_t pixels = uint64_t(shape.rows * shape.columns);
  for (int64_t i = 0; i < shape.pooled_rows; ++i) {
    for (int64_t j = 0; j < shape.pooled_columns; ++j) {
      const E* g = grad + i * call.grad_output.row_stride + j * call.grad_output.column_stride;
      const int32_t* place = places + i * call.places.row_stride + j * call.places.column_stride;
      for (int64_t c = 0; c < channels; ++c) {
        if (uint64_t(place[c]) < pixels) sums[place[c] * stride + c] += to_float(g[c]);
      }
    }
  }
}

// sums: [pixel][channel], `stride` from pixel to pixel.
template <class E, class T>
void collect_channels(const RoiPoolBackward& call, const Box<T>& box, const E* features, const E* grad, T* sums,
                      int64_t stride, int64_t channels) {
  const MapView& map = call.grad_output;
  find_places_of_channels(
      call.shape, call.features, box, features, channels, [&](int64_t i, int64_t j, auto, auto places) {
        const E* g = grad + i * map.row_stride + j * map.column_stride;
        const int64_t pixels = larger(0, box.row_end[i] - box.row_begin[i]) * (box.column_end[j] - box.column_begin[j]);
        if (pixels < kLanes<T> / 2) {  // look at every pixel
          const Vector<T> grads = load_of_line(g, channels);
          for_each_pixel(call.shape, call.features, features, box, i, j, [&](const E*, int64_t place) {
            T* sum = sums + place * stride;
            const Vector<T> old = load_part(sum, channels);
            store_part(sum, places == broadcast_index<T>(place) ? old + grads : old, channels);
          });
        } else {
          Index<T> place[kLanes<T>];
          store(place, places);
          for (int64_t lane = 0; lane < channels; ++lane) {
            if (place[lane] != kNowhere) sums[place[lane] * stride + lane] += to_float(g[lane]);
          }
        }
      });
}

// ---------------------------------------------------------------------------------------------- calls

template <class E>
inline E* at_channel(const MapView& map, int64_t image, int64_t channel) {
  return static_cast<E*>(map.data) + image * map.batch_stride + channel * map.channel_stride;
}

// What both directions share: `Items` says how a call is cut into items, what scratch memory a worker has, and does
// one.
template <class Items, class Call>
struct Kernel {
  using T = typename Items::T;
  const Call& call;
  const Items items{call};
  const BoxMemory<T> boxes{call.shape};

  // A thread is worth its start for some thousand outputs.
  int64_t workers(int threads) const {
    const RoiPoolShape& shape = call.shape;
    const int64_t outputs = shape.boxes * shape.channels * shape.pooled_rows * shape.pooled_columns;
    return larger(1, smaller(smaller(items.count(), threads), outputs / 4096));
  }
  size_t workspace(int threads) const {
    return size_t(call.shape.boxes * boxes.bytes + workers(threads) * items.scratch_bytes());
  }
  void run(int threads, char* memory, ParallelFor parallel_for) const {
    const int64_t count = workers(threads), box_count = items.count() > 0 ? call.shape.boxes : 0;
    for_each_index(0, box_count, int(count), parallel_for, [&](int64_t n, int64_t) {
      boxes.fill(call.shape, static_cast<const T*>(call.boxes) + 5 * n, T(call.spatial_scale),
                 memory + n * boxes.bytes);
    });
    char* const scratch = memory + call.shape.boxes * boxes.bytes;
    for_each_index(0, items.count(), int(count), parallel_for, [&](int64_t index, int64_t worker) {
      items.run(index, boxes, memory, scratch + worker * items.scratch_bytes());
    });
  }
};

inline bool channels_first(const MapView& map) { return map.channel_stride != 1 || map.column_stride == 1; }

template <class E>
struct ForwardItems {
  using T = Accumulator<E>;
  const RoiPoolForward& call;
  const RoiPoolShape& shape = call.shape;
  const bool first = channels_first(call.features), keeps = call.places.data != nullptr;
  const Scratch<T> scratch{shape, keeps};
  // An item is some channels of some boxes: where channels come first, planes one after the other, each with as many
  // boxes as leave enough items; otherwise one box and as many channels as registers hold.
  const int64_t channels_of_item = first ? 8 : 4 * kLanes<T>;
  const int64_t channel_blocks = (shape.channels + channels_of_item - 1) / channels_of_item;
  const int64_t box_blocks =
      smaller(shape.boxes, first ? (64 + channel_blocks - 1) / larger(1, channel_blocks) : shape.boxes);

  int64_t count() const { return channel_blocks * box_blocks; }
  int64_t scratch_bytes() const { return first ? scratch.bytes : 0; }

  void run(int64_t index, const BoxMemory<T>& boxes, const char* memory, char* own) const {
    const int64_t block = index % box_blocks, channel = index / box_blocks * channels_of_item;
    const int64_t end = smaller(channel + channels_of_item, shape.channels);
    const int64_t first_box = shape.boxes * block / box_blocks, end_box = shape.boxes * (block + 1) / box_blocks;
    if (!first) return channels_last_item(boxes.at(memory, first_box), first_box, channel, end);
    const int64_t outputs = shape.pooled_rows * shape.pooled_columns;
    const Scratch<T> lines = scratch.at(own);
    for (int64_t c = channel; c < end; ++c) {
      for (int64_t n = first_box; n < end_box; ++n) {
        const Box<T>& box = boxes.at(memory, n);
        const E* features = at_channel<const E>(call.features, box.image, c);
        E* output = at_channel<E>(call.output, n, c);
        int32_t* places = keeps ? at_channel<int32_t>(call.places, n, c) : nullptr;
        const Pooling<E> pooling{shape, box, lines, features, call.features.row_stride};
        if (shape.rows == 0 || shape.columns == 0) {
          std::memset(output, 0, size_t(outputs) * sizeof(E));
          if (keeps) std::memset(places, -1, size_t(outputs) * sizeof(int32_t));
        } else if (keeps) {
          pool_and_keep(pooling, output, places);
        } else {
          pool_plane(pooling, output);
        }
      }
    }
  }
  void channels_last_item(const Box<T>& box, int64_t n, int64_t channel, int64_t end) const {
    const E* features = at_channel<const E>(call.features, box.image, channel);
    E* output = at_channel<E>(call.output, n, channel);
    if (keeps) {
      int32_t* places = at_channel<int32_t>(call.places, n, channel);
      for (; channel < end; channel += kLanes<T>, features += kLanes<T>, output += kLanes<T>, places += kLanes<T>) {
        pool_and_keep_channels(call, box, features, output, places, smaller(kLanes<T>, end - channel));
      }
      return;
    }
    if (end - channel == channels_of_item) return pool_channels<4>(call, box, features, output, end - channel);
    for (; channel < end; channel += kLanes<T>, features += kLanes<T>, output += kLanes<T>) {
      pool_channels<1>(call, box, features, output, smaller(kLanes<T>, end - channel));
    }
  }
};

template <class E>
struct BackwardItems {
  using T = Accumulator<E>;
  static constexpr bool kRounds = !std::is_same_v<E, T>;  // sums have a place of their own
  const RoiPoolBackward& call;
  const RoiPoolShape& shape = call.shape;
  const bool first = channels_first(call.features), kept = call.places.data != nullptr;
  const Scratch<T> scratch{shape, true};
  // An item is one plane, or a vector of channels, of one image, with all its boxes.
  const int64_t channels_of_item = first ? 1 : kLanes<T>;
  const int64_t channel_blocks = (shape.channels + channels_of_item - 1) / channels_of_item;
  const int64_t pixels = shape.rows * shape.columns;

  int64_t count() const { return pixels > 0 ? channel_blocks * shape.batch : 0; }
  int64_t found_bytes() const { return first && !kept ? round_up(scratch.bytes, 64) : 0; }
  int64_t scratch_bytes() const {
    return found_bytes() + (kRounds ? round_up(pixels * channels_of_item * int64_t(sizeof(T)), 64) : 0);
  }

  void run(int64_t index, const BoxMemory<T>& boxes, const char* memory, char* own) const {
    const int64_t image = index / channel_blocks, channel = index % channel_blocks * channels_of_item;
    const int64_t channels = smaller(channels_of_item, shape.channels - channel);
    const E* features = at_channel<const E>(call.features, image, channel);
    E* result = at_channel<E>(call.grad_features, image, channel);
    // Pixels lie side by side, in the scratch memory as in the result.
    T* sums = kRounds ? reinterpret_cast<T*>(own + found_bytes()) : reinterpret_cast<T*>(result);
    const int64_t stride = kRounds ? channels_of_item : call.grad_features.column_stride;
    for_each_pixel_of(sums, stride, channels, [](T* p, int64_t count) { put(p, Vector<T>{}, 0, count); });

    const Scratch<T> lines = scratch.at(own);
    for (int64_t n = 0; n < shape.boxes; ++n) {
      const Box<T>& box = boxes.at(memory, n);
      if (box.image != image) continue;
      const E* grad = at_channel<const E>(call.grad_output, n, channel);
      const int32_t* places = kept ? at_channel<const int32_t>(call.places, n, channel) : nullptr;
      if (kept && first) {
        scatter_kept(call, grad, places, n + 1 < shape.boxes, sums);
      } else if (kept) {
        collect_kept_channels(call, grad, places, sums, stride, channels);
      } else if (first) {
        const Pooling<E> pooling{shape, box, lines, features, call.features.row_stride};
        const int64_t next_box = n + 1 < shape.boxes ? call.grad_output.batch_stride : 0;
        find_places(pooling, Scatter<E>{pooling, call.grad_output, grad, next_box, sums});
      } else {
        collect_channels(call, box, features, grad, sums, stride, channels);
      }
    }
    if constexpr (kRounds) {
      const int64_t result_stride = call.grad_features.column_stride;
      for_each_pixel_of(sums, stride, channels, [&](const T* p, int64_t count) {
        put(result + (p - sums) / stride * result_stride, load(p), 0, count);
      });
    }
  }
  // Calls task(p, count) for vectors of pixels or, where channels come last, of the channels of each pixel.
  template <class Task>
  void for_each_pixel_of(T* sums, int64_t stride, int64_t channels, const Task& task) const {
    if (first) {
      for (int64_t x = 0; x < pixels; x += kLanes<T>) task(sums + x, smaller(kLanes<T>, pixels - x));
    } else {
      for (int64_t x = 0; x < pixels; ++x) task(sums + x * stride, channels);
    }
  }
};

template <class E>
auto items_of(const RoiPoolForward& call) {
  return ForwardItems<E>{call};
}
template <class E>
auto items_of(const RoiPoolBackward& call) {
  return BackwardItems<E>{call};
}

template <class Call, class Function>
auto with_kernel(const Call& call, const Function& function) {
  return with_element(call.dtype, [&](auto element) {
    return function(Kernel<decltype(items_of<decltype(element)>(call)), Call>{call});
  });
}

}  // namespace

namespace gingham::cpu::GINGHAM_ISA {

size_t workspace_size(const RoiPoolForward& call, int threads) {
  return with_kernel(call, [&](const auto& kernel) { return kernel.workspace(threads); });
}
void run(const RoiPoolForward& call, int threads, void* workspace, ParallelFor parallel_for) {
  with_kernel(call, [&](const auto& kernel) { kernel.run(threads, static_cast<char*>(workspace), parallel_for); });
}
size_t workspace_size(const RoiPoolBackward& call, int threads) {
  return with_kernel(call, [&](const auto& kernel) { return kernel.workspace(threads); });
}
void run(const RoiPoolBackward& call, int threads, void* workspace, ParallelFor parallel_for) {
  with_kernel(call, [&](const auto& kernel) { kernel.run(threads, static_cast<char*>(workspace), parallel_for); });
}

}  // namespace gingham::cpu::GINGHAM_ISA
