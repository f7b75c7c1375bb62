// The nearest of many items to each of them, without ever holding all distances.
//
// Squared distances are |a|^2 + |b|^2 - 2 ab of features less a common centre, which changes no distance but leaves few
// digits to cancel. A tile of some rows by a strip of columns is one product on packed panels; the strip is packed once
// for many rows. Distances are symmetric, so only tiles on and below the diagonal are computed, and each is scanned
// once for both its rows and its columns: almost every vector of it is compared with the thresholds and forgotten, what
// is below goes to a heap of the nearest so far.
//
// Squares and products are summed in one order: kDepth channels from zero, then these sums. So a distance depends on
// its two items and the centre alone, whichever tile or panel it is computed in, and that of duplicates is exactly
// zero.
#pragma once

#include <limits>

#include "elements.h"
#include "panel_gemm.h"
#include "parallel.h"
#include "simd.h"

namespace {

template <class E>
using SumUnit = std::conditional_t<std::is_same_v<E, double>, DoubleUnit, FloatUnit>;

// -------------------------------------------------------------------------------------------------------- items

// Two arrays of rows as one; features are scaled by a power of two, so that no square overflows, and centred.
template <class E>
struct Items {
  using Sum = Accumulator<E>;

  const E *query, *gallery;
  int64_t query_stride, gallery_stride;
  int64_t queries, count, channels;
  Sum scale = 1;
  const Sum* centre = nullptr;  // [channels], up to a whole vector

  const E* row(int64_t index) const {
    return index < queries ? query + index * query_stride : gallery + (index - queries) * gallery_stride;
  }
  // Channels [first, first + steps) of the items [begin, end).
  void prefetch(Prefetcher& prefetcher, int64_t begin, int64_t end, int64_t first, int64_t steps) const {
    const int64_t border = larger(begin, smaller(end, queries)), bytes = steps * int64_t(sizeof(E));
    const auto add = [&](int64_t from, int64_t to, int64_t stride) {
      if (from < to) prefetcher.add(row(from) + first, to - from, 1, stride * int64_t(sizeof(E)), 0, bytes);
    };
    add(begin, border, query_stride);
    add(border, end, gallery_stride);
  }
  // Channels k, k + 1, ... of a row; zeros beyond the last.
  Vector<Sum> features(const E* row, int64_t k) const {
    const int64_t left = channels - k;
    const Vector<Sum> raw = left >= kLanes<Sum> ? load_widened(row + k) : load_widened(row + k, int(left));
    return raw * scale - load(centre + k);
  }
};

// The largest magnitude of a row; infinite or NaN when one of its features is.
template <class E>
inline Accumulator<E> peak(const E* row, int64_t channels) {
  using Sum = Accumulator<E>;
  using Integer = typename IntegerOf<Sum>::type;
  constexpr int kN = kLanes<Sum>;
  constexpr Integer kMagnitude = std::numeric_limits<Integer>::max();
  Integers<Sum> most{};  // magnitudes have the order of their bits, with infinity above all numbers and NaN above it
  for (int64_t k = 0; k < channels; k += kN) {
    const Vector<Sum> part = channels - k >= kN ? load_widened(row + k) : load_widened(row + k, int(channels - k));
    const Integers<Sum> magnitude = (Integers<Sum>)part & kMagnitude;
    most = magnitude > most ? magnitude : most;
  }
  Integer bits = 0;
  for (int i = 0; i < kN; ++i) bits = most[i] > bits ? most[i] : bits;
  Sum result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// A power of two that brings magnitudes up to `peak` near 1.
template <class Sum>
inline Sum scale_of(Sum peak) {
  using Integer = typename IntegerOf<Sum>::type;
  constexpr int kMantissa = std::numeric_limits<Sum>::digits - 1;
  constexpr int64_t kBias = std::numeric_limits<Sum>::max_exponent - 1;
  Integer bits;
  std::memcpy(&bits, &peak, sizeof bits);
  const int64_t exponent = smaller(larger(bits >> kMantissa, 1), 2 * kBias - 1);
  bits = Integer(2 * kBias - exponent) << kMantissa;
  Sum scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return scale;
}

// The mean of up to 256 items: as good a centre as the mean of all.
template <class E>
inline void find_centre(const Items<E>& items, Accumulator<E>* centre) {
  using Sum = Accumulator<E>;
  constexpr int kN = kLanes<Sum>;
  constexpr int64_t kSample = 256;
  const int64_t padded = round_up(items.channels, kN), sample = smaller(items.count, kSample);
  for (int64_t k = 0; k < padded; ++k) centre[k] = 0;
  for (int64_t n = 0; n < sample; ++n) {
    const E* row = items.row(items.count * n / sample);
    for (int64_t k = 0; k < padded; k += kN) {
      const int64_t left = items.channels - k;
      const Vector<Sum> part = left >= kN ? load_widened(row + k) : load_widened(row + k, int(left));
      store(centre + k, load(centre + k) + part * items.scale);
    }
  }
  for (int64_t k = 0; k < padded; ++k) centre[k] /= Sum(sample);
}

// ------------------------------------------------------------------------------------------------------- panels

constexpr int64_t kDepth = 256;      // channels of a left panel
constexpr int64_t kTileItems = 192;  // rows of a tile
constexpr int64_t kStripItems = 512;
constexpr int64_t kStripFeatures = int64_t(1) << 20;
template <class Sum>
constexpr int64_t kStripeItems = kMostVectors * kLanes<Sum>;  // columns of a register block

// Left panel [row][kDepth] of channels [first, first + steps).
template <class E>
GINGHAM_STEP void pack_rows(const Items<E>& items, int64_t begin, int64_t end, int64_t first, int64_t steps,
                            Accumulator<E>* panel) {
  constexpr int kN = kLanes<Accumulator<E> >;
  for (int64_t i = begin; i < end; ++i, panel += kDepth) {
    const E* row = items.row(i);
    for (int64_t k = 0; k < steps; k += kN) store(panel + k, items.features(row, first + k));
  }
}

// Right panel [channel][stride] of the items item_of(0), ..., item_of(count - 1); zeros up to a whole vector.
template <class E, class ItemOf>
GINGHAM_STEP void pack_columns(const Items<E>& items, int64_t count, const ItemOf& item_of, int64_t first,
                               int64_t steps, Accumulator<E>* panel, int64_t stride) {
  using Sum = Accumulator<E>;
  constexpr int kN = kLanes<Sum>;
  for (int64_t n = 0; n < count; n += kN) {
    const int64_t valid = smaller(kN, count - n);
    const E* rows[kN];
    for (int64_t i = 0; i < valid; ++i) rows[i] = items.row(item_of(n + i));
    for (int64_t k = 0; k < steps; k += kN) {
      Vector<Sum> block[kN];
      if (valid == kN) {
#pragma GCC unroll 16
        for (int i = 0; i < kN; ++i) block[i] = items.features(rows[i], first + k);
      } else {
        for (int i = 0; i < kN; ++i) block[i] = i < valid ? items.features(rows[i], first + k) : Vector<Sum>{};
      }
      transpose<Sum>(block);
      for (int64_t i = 0; i < smaller(kN, steps - k); ++i) store(panel + (k + i) * stride + n, block[i]);
    }
  }
}

// Squares of up to a stripe of items from `begin` on, summed as products are.
template <class E>
GINGHAM_STEP void square_items(const Items<E>& items, int64_t begin, int64_t count, Accumulator<E>* panel,
                               Accumulator<E>* squares) {
  using Sum = Accumulator<E>;
  constexpr int kN = kLanes<Sum>;
  constexpr int64_t kStride = kStripeItems<Sum>;
  for (int64_t n = 0; n < count; n += kN) store(squares + n, Vector<Sum>{});
  for (int64_t first = 0; first < items.channels; first += kDepth) {
    const int64_t steps = smaller(kDepth, items.channels - first);
    pack_columns(items, count, [&](int64_t n) { return begin + n; }, first, steps, panel, kStride);
    for (int64_t n = 0; n < count; n += kN) {
      Vector<Sum> sum{};
      for (int64_t k = 0; k < steps; ++k) {
        const Vector<Sum> feature = load(panel + k * kStride + n);
        sum = SumUnit<E>::multiply_add(feature, feature, sum);
      }
      store(squares + n, load(squares + n) + sum);
    }
  }
}

// -------------------------------------------------------------------------------------------------- nearest lists

template <class Sum>
struct Neighbour {
  Sum distance;
  int32_t item;

  bool operator<(const Neighbour& other) const {
    return distance < other.distance || (distance == other.distance && item < other.item);
  }
};

// Puts `neighbour` where the root of heap[0, size) was and restores the heap, whose root is the furthest.
template <class Sum>
inline void replace_root(Neighbour<Sum>* heap, int64_t size, Neighbour<Sum> neighbour) {
  int64_t at = 0;
  for (;;) {
    int64_t child = 2 * at + 1;
    if (child >= size) break;
    if (child + 1 < size && heap[child] < heap[child + 1]) ++child;
    if (!(neighbour < heap[child])) break;
    heap[at] = heap[child];
    at = child;
  }
  heap[at] = neighbour;
}
// From a heap to ascending order.
template <class Sum>
inline void sort_heap(Neighbour<Sum>* heap, int64_t size) {
  while (size > 1) {
    const Neighbour<Sum> last = heap[--size];
    heap[size] = heap[0];
    replace_root(heap, size, last);
  }
}

// A bit for every lane that is not zero; lanes are zero or all ones.
template <class T>
inline uint32_t lane_bits(Vector<T> mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 8) return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask);
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 8) return uint32_t(_mm256_movemask_pd((__m256d)mask));
  return uint32_t(_mm256_movemask_ps((__m256)mask));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) bits |= uint32_t(mask[lane] & 1) << lane;
  return bits;
#endif
}

// What is known of every item. The squares of the items that pad the arrays are NaN: never below a threshold.
template <class Sum>
struct Nearest {
  int64_t others;              // in a list: the item itself, which comes first, is not in it
  Neighbour<Sum>* neighbours;  // [item][others]
  Sum* squares;                // [item], up to a whole vector, as the next two
  Sum* thresholds;             // distance of the last neighbour
  Sum* furthest;               // largest distance to any item

  Neighbour<Sum>* list(int64_t item) const { return neighbours + item * others; }

  // Before the first tile, when squares are known.
  void start(int64_t items) const {
    const int64_t padded = round_up(items, kLanes<Sum>);
    constexpr Sum kInfinity = std::numeric_limits<Sum>::infinity();
    for (int64_t i = 0; i < items * others; ++i) neighbours[i] = {kInfinity, std::numeric_limits<int32_t>::max()};
    for (int64_t i = 0; i < padded; ++i) thresholds[i] = kInfinity, furthest[i] = 0;
    for (int64_t i = items; i < padded; ++i) squares[i] = std::numeric_limits<Sum>::quiet_NaN();
  }
  void offer(int64_t item, Neighbour<Sum> neighbour) const {
    Neighbour<Sum>* heap = list(item);
    if (!(neighbour < heap[0])) return;
    replace_root(heap, others, neighbour);
    thresholds[item] = heap[0].distance;
  }
};

// From products to distances, in place, of the items [row, row_end) and [column, column_end), which are the same items
// where the tile is on the diagonal. It then has both halves and offers to its rows only.
template <class Sum>
GINGHAM_STEP void scan_tile(const Nearest<Sum>& nearest, Sum* products, int64_t stride, int64_t row, int64_t row_end,
                            int64_t column, int64_t column_end, bool on_diagonal) {
  constexpr int kN = kLanes<Sum>;
  constexpr Sum kNone = std::numeric_limits<Sum>::quiet_NaN();
  for (int64_t i = row; i < row_end; ++i, products += stride) {
    if (on_diagonal) products[i - column] = kNone;
    const Vector<Sum> square = broadcast(nearest.squares[i]);
    Vector<Sum> threshold = broadcast(nearest.thresholds[i]), most{};
    for (int64_t j = column; j < column_end; j += kN) {
      Sum* at = products + (j - column);
      Vector<Sum> distance = square + load(nearest.squares + j) - 2 * load(at);
      distance = distance < 0 ? Vector<Sum>{} : distance;
      store(at, distance);
      most = distance > most ? distance : most;
      Integers<Sum> below = distance <= threshold;
      if (!on_diagonal) {
        const Vector<Sum> furthest = load(nearest.furthest + j);
        store(nearest.furthest + j, distance > furthest ? distance : furthest);
        below |= distance <= load(nearest.thresholds + j);
      }
      uint32_t lanes = lane_bits<typename IntegerOf<Sum>::type>(below);
      if (__builtin_expect(lanes == 0, 1)) continue;
      for (; lanes; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        nearest.offer(i, {at[lane], int32_t(j + lane)});
        if (!on_diagonal) nearest.offer(j + lane, {at[lane], int32_t(i)});
      }
      threshold = broadcast(nearest.thresholds[i]);
    }
    for (int lane = 0; lane < kN; ++lane) {
      if (most[lane] > nearest.furthest[i]) nearest.furthest[i] = most[lane];
    }
    if (on_diagonal) products[i - column] = 0;
  }
}

// ------------------------------------------------------------------------------------------------------- tiles

// How the items are cut: strips of columns, as many as a thread's panel holds, and tasks of a strip and some strips of
// rows, those above it and itself.
struct Strips {
  int64_t items, width, count, rows_of_a_task;  // the last in strips

  Strips(int64_t items, int64_t channels, int64_t stripe) : items(items) {
    const int64_t fit = larger(1, kStripFeatures / (larger(1, channels) * stripe));
    width = smaller(round_up(items, stripe), stripe * smaller(fit, kStripItems / stripe));
    count = (items + width - 1) / width;
    rows_of_a_task = larger(1, smaller(4, count / 8));
  }
  int64_t begin(int64_t strip) const { return strip * width; }
  int64_t end(int64_t strip) const { return smaller(items, (strip + 1) * width); }
  int64_t tasks_of(int64_t strip) const { return (strip + rows_of_a_task) / rows_of_a_task; }
  int64_t tasks() const {
    int64_t total = 0;
    for (int64_t strip = 0; strip < count; ++strip) total += tasks_of(strip);
    return total;
  }
};

// A lock for a few microseconds of work on the lists of a strip, between milliseconds of products.
inline void lock(int32_t* held) {
  while (__atomic_exchange_n(held, 1, __ATOMIC_ACQUIRE)) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}
inline void unlock(int32_t* held) { __atomic_store_n(held, 0, __ATOMIC_RELEASE); }

// The scratch of one thread for tiles.
template <class Sum>
struct TileScratch {
  Sum *columns = nullptr, *rows = nullptr,
      *products = nullptr;  // [stripe][channel][stripe], [row][kDepth], [row][strip]

  static int64_t size(const Strips& strips, int64_t channels) {
    return (strips.width * channels + kTileItems * (kDepth + strips.width)) * int64_t(sizeof(Sum));
  }
  TileScratch() = default;
  TileScratch(const Strips& strips, int64_t channels, void* memory)
      : columns(static_cast<Sum*>(memory)),
        rows(columns + strips.width * channels),
        products(rows + kTileItems * kDepth) {}
};

// Products of the items [row, row_end) with those of a packed strip.
template <class E>
inline void multiply_tile(const Items<E>& items, int64_t row, int64_t row_end, int64_t columns, int64_t stride,
                          const TileScratch<Accumulator<E> >& scratch) {
  using Sum = Accumulator<E>;
  constexpr int64_t kWidth = kStripeItems<Sum>;
  const int64_t products = (columns + kWidth - 1) / kWidth;
  for (int64_t first = 0; first < items.channels; first += kDepth) {
    const int64_t steps = smaller(kDepth, items.channels - first), next = first + steps;
    pack_rows(items, row, row_end, first, steps, scratch.rows);
    Prefetcher prefetcher;
    items.prefetch(prefetcher, row, row_end, next, smaller(kDepth, items.channels - next));
    prefetcher.spread(products * Stripes<SumUnit<E> >(kWidth).prefetches(row_end - row, steps));
    for (int64_t n = 0; n < columns; n += kWidth) {
      multiply<SumUnit<E> >(row_end - row, kWidth, steps, {scratch.rows, kDepth, 1},
                            scratch.columns + n * items.channels + first * kWidth, kWidth, nullptr, 0,
                            scratch.products + n, stride, first > 0, nullptr, prefetcher);
    }
  }
}

// One task of find_nearest. take(row, row_end, column, column_end, distances, stride) sees every tile.
template <class E, class Take>
inline void find_nearest_in(const Items<E>& items, const Strips& strips, int64_t task,
                            const Nearest<Accumulator<E> >& nearest, int32_t* locks,
                            const TileScratch<Accumulator<E> >& scratch, const Take& take) {
  constexpr int64_t kWidth = kStripeItems<Accumulator<E> >;
  int64_t strip = 0;
  for (; task >= strips.tasks_of(strip); ++strip) task -= strips.tasks_of(strip);
  const int64_t column = strips.begin(strip), column_end = strips.end(strip);
  for (int64_t n = 0; n < column_end - column; n += kWidth) {
    pack_columns(
        items, smaller(kWidth, column_end - column - n), [&](int64_t i) { return column + n + i; }, 0, items.channels,
        scratch.columns + n * items.channels, kWidth);
  }
  const int64_t first = task * strips.rows_of_a_task, last = smaller(strip + 1, first + strips.rows_of_a_task);
  for (int64_t rows = first; rows < last; ++rows) {
    for (int64_t row = strips.begin(rows); row < strips.end(rows); row += kTileItems) {
      const int64_t row_end = smaller(strips.end(rows), row + kTileItems);
      multiply_tile(items, row, row_end, column_end - column, strips.width, scratch);
      lock(locks + rows);
      if (rows != strip) lock(locks + strip);
      scan_tile(nearest, scratch.products, strips.width, row, row_end, column, column_end, rows == strip);
      if (rows != strip) unlock(locks + strip);
      unlock(locks + rows);
      take(row, row_end, column, column_end, scratch.products, strips.width);
    }
  }
}

// Distances from one item to up to a stripe of others, as tiles have them.
template <class E>
GINGHAM_STEP void find_distances(const Items<E>& items, const Nearest<Accumulator<E> >& nearest, int64_t item,
                                 const int32_t* others, int64_t count, const TileScratch<Accumulator<E> >& scratch,
                                 Accumulator<E>* distances) {
  using Sum = Accumulator<E>;
  const int64_t padded = round_up(count, kLanes<Sum>);
  Prefetcher nothing;
  for (int64_t first = 0; first < items.channels; first += kDepth) {
    const int64_t steps = smaller(kDepth, items.channels - first);
    pack_rows(items, item, item + 1, first, steps, scratch.rows);
    pack_columns(items, count, [&](int64_t n) { return int64_t(others[n]); }, first, steps, scratch.columns, padded);
    multiply<SumUnit<E> >(1, padded, steps, {scratch.rows, kDepth, 1}, scratch.columns, padded, nullptr, 0,
                          scratch.products, padded, first > 0, nullptr, nothing);
  }
  for (int64_t n = 0; n < count; ++n) {
    const Sum distance = nearest.squares[item] + nearest.squares[others[n]] - 2 * scratch.products[n];
    distances[n] = distance < 0 ? 0 : distance;
  }
}

}  // namespace
