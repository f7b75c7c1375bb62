// RoI max pooling on CUDA.
//
// Forward reads a box's part of the map and writes the output once. Channels first: a warp takes one box on two planes.
// For some rows of bins at a time its lanes fold neighbouring columns over the rows, which they load side by side, into
// lines in shared memory, value and row of the first maximum; then a lane takes a bin and folds its line's columns.
// Channels last: a thread takes 16 bytes of channels of one output, or one channel.
//
// Backward is deterministic and needs no atomics: a warp owns a tile of pixels in 32 channels, a lane each, with its
// sums in shared memory. A block of such warps lists the bins that meet its tile, box after box; each warp reads where
// their maxima are, several bins at a time, and adds up the gradients of those that lie in the tile. So a maximum is
// looked at once for each tile that its bin meets, and not once for each pixel of the bin. The edges of all bins are
// found first, once. Lanes are channels in either layout: where channels come first, places and gradients are turned
// around before, for as many channels at a time as the second-level cache holds the places of. Where forward did not
// keep the places of the maxima, the kernels above find them anew, for as many channels.
//
// A box that names no image, or is not finite, is nowhere: its outputs are NaN, and it gives nothing.
#include <cfloat>

#include "elements.cuh"
#include "gingham/roi_pool.h"
#include "pack.cuh"
#include "primitives.cuh"
#include "workspace.cuh"

namespace gingham::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;

template <class Integer>
__host__ __device__ Integer smaller(Integer a, Integer b) {
  return a < b ? a : b;
}
template <class Integer>
__host__ __device__ Integer larger(Integer a, Integer b) {
  return a > b ? a : b;
}
__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ inline int warp_of_block() { return static_cast<int>(threadIdx.x) / 32; }
__device__ inline int lane_of_warp() { return static_cast<int>(threadIdx.x) % 32; }

// ---------------------------------------------------------------------------------------------- the bins of a box

// Rows or columns of the map from `begin` to before `end`; none where that is not behind it.
struct alignas(8) Span {
  int32_t begin, end;

  __device__ bool is_empty() const { return begin >= end; }
  __device__ bool meets(Span other) const { return (begin < other.end) & (end > other.begin); }
};

// Along one axis, in the type of the boxes, without contraction: a product is rounded before it is rounded to a whole
// number.
template <class Number>
struct Axis {
  int64_t start, extent;
  Number bin;

  __device__ static int64_t round_half_away(Number x) {
    const Number rounded = round(x);
    if (rounded >= Number(2147483648.0)) return 2147483647;
    // What is no number (nothing times a scale beyond the type) goes with the smallest.
    return rounded >= Number(-2147483648.0) ? static_cast<int64_t>(rounded) : -int64_t{2147483647} - 1;
  }
  __device__ static Axis of(Number first, Number last, Number scale, int64_t bins, int64_t extent) {
    const int64_t start = round_half_away(first * scale), stop = round_half_away(last * scale);
    const int64_t size = stop - start + 1;
    return {start, extent, Number(size > 1 ? size : 1) / Number(bins)};
  }

  __device__ int32_t on_map(int64_t from_start) const {
    return static_cast<int32_t>(smaller(larger(start + from_start, int64_t{0}), extent));
  }
  __device__ Span of_bins(int64_t first, int64_t last) const {
    return {on_map(static_cast<int64_t>(floor(Number(first) * bin))),
            on_map(static_cast<int64_t>(ceil(Number(last + 1) * bin)))};
  }
  __device__ Span of_bin(int64_t i) const { return of_bins(i, i); }
};

template <class Number>
struct Box {
  int64_t image;  // -1: none
  Axis<Number> rows, columns;
};

template <class Number>
struct Boxes {
  const Number* data;
  Number scale;
  RoiPoolShape shape;

  __device__ Box<Number> at(int64_t n) const {
    Number b[5];  // loaded together: & instead of && keeps the loads from waiting for one another
    for (int i = 0; i < 5; ++i) b[i] = data[5 * n + i];
    bool is_valid = (b[0] >= 0) & (b[0] < Number(shape.batch)) & (b[0] == floor(b[0]));
    for (int i = 1; i < 5; ++i) is_valid &= b[i] - b[i] == 0;  // infinite and NaN are not
    if (!is_valid) return {-1, {0, 0, 1}, {0, 0, 1}};
    return {static_cast<int64_t>(b[0]), Axis<Number>::of(b[2], b[4], scale, shape.pooled_rows, shape.rows),
            Axis<Number>::of(b[1], b[3], scale, shape.pooled_columns, shape.columns)};
  }
};

// ---------------------------------------------------------------------------------------------- finding maxima

__host__ __device__ inline int64_t offset_in(const MapView& map, int64_t n, int64_t c, int64_t i, int64_t j) {
  return n * map.batch_stride + c * map.channel_stride + i * map.row_stride + j * map.column_stride;
}

// All maps begin with the first channel that is wanted. Of output and places either may have no data.
template <class T>
struct Search {
  Boxes<Sum<T>> boxes;
  int64_t channels;
  MapView features, output, places;

  __device__ const T* plane(int64_t image, int64_t c) const {
    return static_cast<const T*>(features.data) + offset_in(features, larger(image, int64_t{0}), c, 0, 0);
  }
};

constexpr int kFolded = 4;  // loads of a thread that are under way

// A maximum is what only greater values beat; the first beats -FLT_MAX, in float64 too.
template <class S>
struct Maximum {
  S value = -FLT_MAX;
  int32_t row = -1;
};

constexpr int kPlanes = 2;  // that a warp takes

template <class S>
struct Maxima {
  Maximum<S> of_plane[kPlanes];

  __device__ void meet(int plane, S value, int32_t row) {
    if (value > of_plane[plane].value) of_plane[plane] = {value, row};
  }
};

// The next kFolded rows, which may end before where not `all` are wanted: the last is looked at again, and does not
// beat itself.
template <bool all, class T>
__device__ void meet_rows(Maxima<Sum<T>>& maxima, const T*& pixel, int64_t to_plane, int64_t to_row, int32_t row,
                          int32_t end) {
  T loaded[kFolded][kPlanes];
#pragma unroll
  for (int k = 0; k < kFolded; ++k) {
#pragma unroll
    for (int q = 0; q < kPlanes; ++q) loaded[k][q] = pixel[q * to_plane];
    if (all || k + 1 < end - row) pixel += to_row;
  }
#pragma unroll
  for (int k = 0; k < kFolded; ++k) {
#pragma unroll
    for (int q = 0; q < kPlanes; ++q) maxima.meet(q, to_sum(loaded[k][q]), row + k);
  }
}

template <class T>
__device__ Maxima<Sum<T>> fold_column(const T* pixel, int64_t to_plane, int64_t to_row, Span rows) {
  Maxima<Sum<T>> maxima;
  int32_t row = rows.begin;
#pragma unroll 1
  for (; rows.end - row >= kFolded; row += kFolded) meet_rows<true>(maxima, pixel, to_plane, to_row, row, rows.end);
  if (row < rows.end) meet_rows<false>(maxima, pixel, to_plane, to_row, row, rows.end);
  return maxima;
}

constexpr int kLine = 320;  // columns of a warp's lines

template <class S>
struct Lines {
  Maximum<S> columns[kPlanes][kLine];
  Span column_bins[32], row_bins[32];
  Box<S> box;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 4) search_planes(const __grid_constant__ Search<T> p) {
  using S = Sum<T>;
  GINGHAM_SHARED_MEMORY(memory);
  const RoiPoolShape& shape = p.boxes.shape;
  const int lane = lane_of_warp();
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + warp_of_block();
  const int64_t units = ceil_div(p.channels, kPlanes), n = unit / units, c = unit % units * kPlanes;
  if (n >= shape.boxes) return;
  Lines<S>& lines = reinterpret_cast<Lines<S>*>(memory)[warp_of_block()];
  if (lane == 0) lines.box = p.boxes.at(n);
  synchronize_warp();

  const T* plane = p.plane(lines.box.image, c);
  const int planes = static_cast<int>(smaller(p.channels - c, int64_t{kPlanes}));
  const int64_t to_plane = planes == kPlanes ? p.features.channel_stride : 0;  // or the same again, not to be written
  const int pooled_rows = static_cast<int>(shape.pooled_rows), pooled_columns = static_cast<int>(shape.pooled_columns);
  for (int first = 0, bins = 0; first < pooled_columns; first += bins) {
    bins = smaller(pooled_columns - first, 32);  // of a line
    const int line = lane / bins, bin = lane % bins;
    lines.column_bins[lane] = lines.box.columns.of_bin(first + bin);
    synchronize_warp();
    const Span columns = lines.column_bins[lane];
    const int left = lines.column_bins[0].begin, right = lines.column_bins[bins - 1].end;
    const int most = larger(smaller(32 / bins, kLine / larger(right - left, 1)), 1);  // lines at a time
    for (int i = 0, height = 0; i < pooled_rows; i += height) {
      height = smaller(pooled_rows - i, most);
      if (lane < height) lines.row_bins[lane] = lines.box.rows.of_bin(i + lane);
      Maxima<S> maxima;
      int column[kPlanes];
      for (int part = left;; part += kLine) {
        synchronize_warp();
        const int size = smaller(right - part, kLine);
        for (int l = 0; l < height; ++l) {
          const Span rows = lines.row_bins[l];
          const T* row = plane + rows.begin * p.features.row_stride + part * p.features.column_stride;
#pragma unroll 1
          for (int x = lane; x < size; x += 32) {
            const Maxima<S> folded =
                fold_column(row + x * p.features.column_stride, to_plane, p.features.row_stride, rows);
#pragma unroll
            for (int q = 0; q < kPlanes; ++q) lines.columns[q][l * size + x] = folded.of_plane[q];
          }
        }
        synchronize_warp();
        const int end = line < height ? smaller(columns.end - part, size) : 0;
        for (int x = larger(columns.begin - part, 0); x < end; ++x) {
#pragma unroll
          for (int q = 0; q < kPlanes; ++q) {
            const Maximum<S> other = lines.columns[q][line * size + x];
            Maximum<S>& own = maxima.of_plane[q];
            // In raster order an upper pixel comes first, also from a column on the right.
            if (other.value > own.value || (other.value == own.value && other.row < own.row)) {
              own = other, column[q] = part + x;
            }
          }
        }
        if (right - part <= kLine) break;
      }
      const bool is_empty = columns.is_empty() || lines.row_bins[line < height ? line : 0].is_empty();
#pragma unroll
      for (int q = 0; q < kPlanes; ++q) {
        if (q >= planes || line >= height) continue;
        const Maximum<S>& own = maxima.of_plane[q];
        if (p.output.data) {
          static_cast<T*>(p.output.data)[offset_in(p.output, n, c + q, i + line, first + bin)] =
              from_sum<T>(lines.box.image < 0 ? S(NAN)
                          : is_empty          ? S(0)
                                              : own.value);
        }
        if (p.places.data) {
          static_cast<int32_t*>(p.places.data)[offset_in(p.places, n, c + q, i + line, first + bin)] =
              own.row < 0 ? -1 : own.row * static_cast<int32_t>(shape.columns) + column[q];
        }
      }
      synchronize_warp();
    }
  }
}

template <int kCount>
struct alignas(kCount < 4 ? 4 * kCount : 16) Places {
  int32_t x[kCount];
};

template <class T, bool wide>
__global__ void __launch_bounds__(kThreads) search_channels(const __grid_constant__ Search<T> p) {
  using S = Sum<T>;
  constexpr int kCount = Pack<T, wide>::kCount;
  const RoiPoolShape& shape = p.boxes.shape;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, packs = p.channels / kCount;
  const int64_t c = index % packs * kCount, output = index / packs;
  const int64_t j = output % shape.pooled_columns, i = output / shape.pooled_columns % shape.pooled_rows;
  const int64_t n = output / shape.pooled_columns / shape.pooled_rows;
  if (n >= shape.boxes) return;
  const Box<S> box = p.boxes.at(n);
  const Span rows = box.rows.of_bin(i), columns = box.columns.of_bin(j);
  const bool is_empty = rows.is_empty() || columns.is_empty();

  S values[kCount];
  Places<kCount> places;
#pragma unroll
  for (int e = 0; e < kCount; ++e) values[e] = -FLT_MAX, places.x[e] = -1;
  const int width = columns.end - columns.begin, columns_beside = static_cast<int>(shape.columns) - width;
  const T* pixel =
      p.plane(box.image, c) + rows.begin * p.features.row_stride + columns.begin * p.features.column_stride;
  const int64_t to_next_row = p.features.row_stride - width * p.features.column_stride;
  int32_t place = rows.begin * static_cast<int32_t>(shape.columns) + columns.begin;
  int column = 0;
#pragma unroll 1
  for (int rest = is_empty ? 0 : (rows.end - rows.begin) * width; rest > 0; rest -= kFolded) {
    Pack<T, wide> loaded[kFolded];
    int32_t at[kFolded];
#pragma unroll
    for (int k = 0; k < kFolded; ++k) {
      loaded[k] = *reinterpret_cast<const Pack<T, wide>*>(pixel);
      at[k] = place;
      if (rest <= k + 1) continue;  // the last pixel may be looked at again
      ++place, ++column, pixel += p.features.column_stride;
      if (column == width) column = 0, place += columns_beside, pixel += to_next_row;
    }
#pragma unroll
    for (int k = 0; k < kFolded; ++k) {
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        const S x = to_sum(loaded[k].x[e]);
        if (x > values[e]) values[e] = x, places.x[e] = at[k];
      }
    }
  }
  if (p.output.data) {
    Pack<T, wide> result;
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      result.x[e] = from_sum<T>(box.image < 0 ? S(NAN) : is_empty ? S(0) : values[e]);
    }
    *reinterpret_cast<Pack<T, wide>*>(static_cast<T*>(p.output.data) + offset_in(p.output, n, c, i, j)) = result;
  }
  if (p.places.data) {
    *reinterpret_cast<Places<kCount>*>(static_cast<int32_t*>(p.places.data) + offset_in(p.places, n, c, i, j)) = places;
  }
}

bool channels_first(const MapView& map) { return map.channel_stride != 1 || map.column_stride == 1; }

template <class T, class Call>
Boxes<Sum<T>> boxes_of(const Call& call) {
  return {static_cast<const Sum<T>*>(call.boxes), static_cast<Sum<T>>(call.spatial_scale), call.shape};
}

template <class T>
void search(const Search<T>& pass, void* stream) {
  const RoiPoolShape& shape = pass.boxes.shape;
  if (channels_first(pass.features)) {
    launch(search_planes<T>, ceil_div(shape.boxes * ceil_div(pass.channels, kPlanes), kWarps), kThreads,
           kWarps * sizeof(Lines<Sum<T>>), stream, pass);
  } else {
    const auto fits = [&](const MapView& map) {
      return is_wide<T>(map.data, {map.batch_stride, map.row_stride, map.column_stride, pass.channels});
    };
    const bool wide = fits(pass.features) && fits(pass.output) && fits(pass.places);
    const int64_t packs = pass.channels / (wide ? Pack<T, true>::kCount : 1);
    launch(wide ? search_channels<T, true> : search_channels<T, false>,
           ceil_div(shape.boxes * shape.pooled_rows * shape.pooled_columns * packs, kThreads), kThreads, 0, stream,
           pass);
  }
}

// ---------------------------------------------------------------------------------------------- the bins of all boxes

struct Frame {
  int64_t image;  // -1: none
  Span rows, columns;
};

struct Bins {
  Frame* boxes;          // what each covers of the map
  Span *rows, *columns;  // [box][bin of the axis]
};

template <class T>
struct Cut {
  Boxes<Sum<T>> boxes;
  Bins bins;
};

// A thread takes a bin of an axis.
template <class T>
__global__ void __launch_bounds__(kThreads) cut_boxes(const __grid_constant__ Cut<T> p) {
  const RoiPoolShape& shape = p.boxes.shape;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t of_box = shape.pooled_rows + shape.pooled_columns, n = index / of_box, k = index % of_box;
  if (n >= shape.boxes) return;
  const Box<Sum<T>> box = p.boxes.at(n);
  if (k < shape.pooled_rows) {
    p.bins.rows[n * shape.pooled_rows + k] = box.rows.of_bin(k);
  } else {
    const int64_t j = k - shape.pooled_rows;
    p.bins.columns[n * shape.pooled_columns + j] = box.columns.of_bin(j);
  }
  if (k > 0) return;
  p.bins.boxes[n] = {box.image, box.rows.of_bins(0, shape.pooled_rows - 1),
                     box.columns.of_bins(0, shape.pooled_columns - 1)};
}

// ---------------------------------------------------------------------------------------------- turning channels last

template <class T>
struct Turning {
  RoiPoolShape shape;
  int64_t channels;
  MapView places, gradients;
  int32_t* turned_places;  // [box][bin][channel]
  T* turned_gradients;
};

template <class T>
struct TurnedTile {  // [channel][bin], padded: lanes read down a column
  int32_t places[32][33];
  T gradients[32][33];
};

// A block takes 32 bins of a box in 32 channels.
template <class T>
__global__ void __launch_bounds__(kThreads) turn_outputs(const __grid_constant__ Turning<T> p) {
  GINGHAM_SHARED_MEMORY(memory);
  auto& tile = *reinterpret_cast<TurnedTile<T>*>(memory);
  const int64_t bins = p.shape.pooled_rows * p.shape.pooled_columns, bin_tiles = ceil_div(bins, 32);
  const int64_t first_bin = blockIdx.x % bin_tiles * 32, rest = blockIdx.x / bin_tiles;
  const int64_t channel_tiles = ceil_div(p.channels, 32), first_channel = rest % channel_tiles * 32;
  const int64_t n = rest / channel_tiles, bin = first_bin + lane_of_warp();
  const int64_t i = bin / p.shape.pooled_columns, j = bin % p.shape.pooled_columns;
  const auto* places = static_cast<const int32_t*>(p.places.data) + offset_in(p.places, n, first_channel, i, j);
  const auto* gradients = static_cast<const T*>(p.gradients.data) + offset_in(p.gradients, n, first_channel, i, j);
  int32_t place[32 / kWarps];
  T gradient[32 / kWarps];
#pragma unroll
  for (int k = 0; k < 32 / kWarps; ++k) {
    const int c = warp_of_block() + k * kWarps;
    if (bin >= bins || first_channel + c >= p.channels) continue;
    place[k] = places[c * p.places.channel_stride];
    gradient[k] = gradients[c * p.gradients.channel_stride];
  }
#pragma unroll
  for (int k = 0; k < 32 / kWarps; ++k) {
    const int c = warp_of_block() + k * kWarps;
    if (bin >= bins || first_channel + c >= p.channels) continue;
    tile.places[c][lane_of_warp()] = place[k];
    tile.gradients[c][lane_of_warp()] = gradient[k];
  }
  __syncthreads();
  const int64_t channel = first_channel + lane_of_warp();
  if (channel >= p.channels) return;
#pragma unroll
  for (int b = warp_of_block(); b < 32; b += kWarps) {
    if (first_bin + b >= bins) break;
    const int64_t to = (n * bins + first_bin + b) * p.channels + channel;
    p.turned_places[to] = tile.places[lane_of_warp()][b];
    p.turned_gradients[to] = tile.gradients[lane_of_warp()][b];
  }
}

// ---------------------------------------------------------------------------------------------- collecting gradients

// x / divisor for x < 2^31. For what is more the result is at least the exact quotient.
struct Quotient {
  uint32_t divisor, factor, shift;

  explicit Quotient(int64_t divisor) : divisor(static_cast<uint32_t>(divisor)), shift(31) {
    while (int64_t{1} << (shift - 31) < divisor) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << shift) + this->divisor - 1) / this->divisor);
  }
  __device__ uint32_t of(uint32_t x) const { return static_cast<uint32_t>(static_cast<uint64_t>(x) * factor >> shift); }
};

constexpr int kCollectors = 4;  // warps of a block, at most
constexpr int kTileRows = 4, kTileColumns = 16, kTilePixels = kTileRows * kTileColumns;
constexpr int kInFlight = 8;  // bins that a lane looks at together

// All maps begin with the first channel that is wanted; of places and gradients channels are adjacent.
template <class T>
struct Collection {
  RoiPoolShape shape;
  int64_t channels;
  Bins bins;
  MapView places, gradients, grad_features;
  Quotient by_columns;
  int64_t across, down;  // tiles
  int64_t blocks;        // of a tile
  int warps;             // of a block, each with 32 channels
};

// Bins of an axis are in order, and so are their ends: those that meet `span` follow one another.
struct Some {
  int32_t first, count;
};
__device__ inline Some bins_that_meet(Span span, const Span* bins, int64_t count) {
  Some some{0, 0};
#pragma unroll 1
  for (int64_t first = 0; first < count; first += 32) {
    const int64_t i = first + lane_of_warp();
    const Span bin = bins[smaller(i, count - 1)];
    const uint32_t met = ballot((i < count) & bin.meets(span));
    if (met == 0) continue;
    if (some.count == 0) some.first = static_cast<int32_t>(first) + lowest_bit(met);
    some.count += count_bits(met);
  }
  return some;
}

struct MetBox {
  int32_t box;  // which of those that the block looks at together
  Some rows, columns;
};
struct ListedBin {
  int64_t place, gradient;  // where in memory
};

template <class S>
struct Tile {
  S sums[kCollectors][kTilePixels * 32];  // [warp][pixel][lane]
  ListedBin list[kCollectors * 32];
  MetBox boxes[kCollectors * 32];
  uint32_t met[kCollectors];  // a bit for each box
};

// Finds which of the boxes from `first` on, one a thread, meet the tile, and which bins of theirs. Returns how
// many boxes these are; all threads of the block see them.
template <class T>
__device__ int meet_boxes(const Collection<T>& p, Tile<Sum<T>>& tile, int64_t first, int64_t image, Span rows,
                          Span columns) {
  const RoiPoolShape& shape = p.shape;
  const int64_t own = first + threadIdx.x;
  const Frame box = p.bins.boxes[smaller(own, shape.boxes - 1)];
  const uint32_t bits =
      ballot((own < shape.boxes) & (box.image == image) & box.rows.meets(rows) & box.columns.meets(columns));
  if (lane_of_warp() == 0) tile.met[warp_of_block()] = bits;
  __syncthreads();
  int count = 0;
  for (int word = 0; word < p.warps; ++word) {
    for (uint32_t rest = tile.met[word]; rest != 0; rest &= rest - 1, ++count) {
      if (count % p.warps != warp_of_block()) continue;
      const int index = word * 32 + lowest_bit(rest);
      const int64_t n = first + index;
      const Some down = bins_that_meet(rows, p.bins.rows + n * shape.pooled_rows, shape.pooled_rows);
      const Some across = bins_that_meet(columns, p.bins.columns + n * shape.pooled_columns, shape.pooled_columns);
      if (lane_of_warp() == 0) tile.boxes[count] = {index, down, across};
    }
  }
  __syncthreads();
  return count;
}

// Lists the bins that meet the tile from `first` on, one a thread, and returns how many they are from there on.
template <class T>
__device__ int64_t list_bins(const Collection<T>& p, Tile<Sum<T>>& tile, int64_t first_box, int boxes, int64_t first) {
  int64_t own = first + threadIdx.x, all = -first;
#pragma unroll 1
  for (int k = 0; k < boxes; ++k) {
    const MetBox box = tile.boxes[k];
    const int32_t count = box.rows.count * box.columns.count;
    all += count;
    if (own >= 0 && own < count) {
      const int64_t n = first_box + box.box, i = box.rows.first + static_cast<int32_t>(own) / box.columns.count;
      const int64_t j = box.columns.first + static_cast<int32_t>(own) % box.columns.count;
      tile.list[threadIdx.x] = {offset_in(p.places, n, 0, i, j), offset_in(p.gradients, n, 0, i, j)};
    }
    own -= count;
  }
  return all;
}

// What the first `count` bins of the list give to the lane's channel.
template <class T>
__device__ void add_listed(const Collection<T>& p, Tile<Sum<T>>& tile, int count, int64_t channel, Span rows,
                           Span columns) {
  const auto* places = static_cast<const int32_t*>(p.places.data) + channel;
  const auto* gradients = static_cast<const T*>(p.gradients.data) + channel;
  Sum<T>* sums = tile.sums[warp_of_block()] + lane_of_warp();
#pragma unroll 1
  for (int first = 0; first < count; first += kInFlight) {
    uint32_t place[kInFlight];
    T gradient[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const ListedBin bin = tile.list[smaller(first + k, count - 1)];
      place[k] = static_cast<uint32_t>(places[bin.place]);
      gradient[k] = gradients[bin.gradient];
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const uint32_t row = p.by_columns.of(place[k]), column = place[k] - row * p.by_columns.divisor;
      const uint32_t y = row - static_cast<uint32_t>(rows.begin), x = column - static_cast<uint32_t>(columns.begin);
      // Nowhere, -1, is a row below the map: twice as far down, at least, as the map has rows.
      if (y < kTileRows && x < kTileColumns && first + k < count) {
        sums[(y * kTileColumns + x) * 32] += to_sum(gradient[k]);
      }
    }
  }
}

// Lanes become columns: two channels of a row at a time, [channel][column] with columns permuted against conflicts.
__device__ inline int turned(int channel, int column) {
  return channel * kTileColumns + (column ^ (channel / 2 % kTileColumns));
}
template <class S>
__device__ void turn_row(S* row) {
  S own[kTileColumns];
#pragma unroll
  for (int x = 0; x < kTileColumns; ++x) own[x] = row[x * 32 + lane_of_warp()];
  synchronize_warp();
#pragma unroll
  for (int x = 0; x < kTileColumns; ++x) row[turned(lane_of_warp(), x)] = own[x];
  synchronize_warp();
}

// A block takes a tile; what it lists serves all its warps.
template <class T>
__global__ void __launch_bounds__(kCollectors * 32, 6) collect(const __grid_constant__ Collection<T> p) {
  using S = Sum<T>;
  GINGHAM_SHARED_MEMORY(memory);
  auto& tile = *reinterpret_cast<Tile<S>*>(memory);
  const RoiPoolShape& shape = p.shape;
  const int lane = lane_of_warp();
  const int64_t first_channel = (blockIdx.x % p.blocks * p.warps + warp_of_block()) * 32, index = blockIdx.x / p.blocks;
  const int64_t left = index % p.across * kTileColumns, top = index / p.across % p.down * kTileRows;
  const int64_t image = index / p.across / p.down, channel = first_channel + lane;
  const Span rows{static_cast<int32_t>(top), static_cast<int32_t>(smaller(top + kTileRows, shape.rows))};
  const Span columns{static_cast<int32_t>(left), static_cast<int32_t>(smaller(left + kTileColumns, shape.columns))};

  S* sums = tile.sums[warp_of_block()];
#pragma unroll
  for (int pixel = 0; pixel < kTilePixels; ++pixel) sums[pixel * 32 + lane] = 0;
  for (int64_t first = 0; first < shape.boxes; first += p.warps * 32) {
    const int boxes = meet_boxes(p, tile, first, image, rows, columns);
    for (int64_t bin = 0, rest = 1; boxes > 0 && rest > 0; bin += p.warps * 32) {
      rest = list_bins(p, tile, first, boxes, bin);
      const int listed = static_cast<int>(smaller(rest, int64_t{32} * p.warps));
      __syncthreads();
      add_listed(p, tile, listed, smaller(channel, p.channels - 1), rows, columns);
      __syncthreads();
      rest -= listed;
    }
  }
  if (first_channel >= p.channels) return;

  T* result = static_cast<T*>(p.grad_features.data) + offset_in(p.grad_features, image, first_channel, top, left);
  const int height = rows.end - rows.begin, width = columns.end - columns.begin;
  if (p.grad_features.channel_stride == 1) {
    for (int y = 0; y < height && channel < p.channels; ++y, result += p.grad_features.row_stride) {
      T* to = result + lane;
#pragma unroll 4
      for (int x = 0; x < width; ++x, to += p.grad_features.column_stride) {
        *to = from_sum<T>(sums[(y * kTileColumns + x) * 32 + lane]);
      }
    }
  } else {
    const int channels = static_cast<int>(smaller(p.channels - first_channel, int64_t{32}));
    const int c = lane / kTileColumns, x = lane % kTileColumns, step = 32 / kTileColumns;
    result += c * p.grad_features.channel_stride + x * p.grad_features.column_stride;
    for (int y = 0; y < height; ++y, result += p.grad_features.row_stride) {
      S* row = sums + y * kTileColumns * 32;
      turn_row(row);
      if (x >= width) continue;
      T* to = result;
#pragma unroll 4
      for (int k = c; k < channels; k += step, to += step * p.grad_features.channel_stride) {
        *to = from_sum<T>(row[turned(k, x)]);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------- backward

MapView from_channel(MapView map, int64_t channel, size_t element) {
  if (map.data) map.data = static_cast<char*>(map.data) + channel * map.channel_stride * static_cast<int64_t>(element);
  return map;
}

template <class T>
struct Backward {
  const RoiPoolBackward& call;
  bool first;
  int64_t pooled, most;  // channels at a time
  Bins bins;
  int32_t *found, *turned_places;
  T* turned_gradients;

  Backward(const RoiPoolBackward& call, Workspace& workspace)
      : call(call),
        first(channels_first(call.features)),
        pooled(call.shape.pooled_rows * call.shape.pooled_columns),
        most(channels_at_a_time()) {
    const RoiPoolShape& shape = call.shape;
    const int64_t places = shape.boxes * pooled * most;
    bins.boxes = workspace.take<Frame>(shape.boxes);
    bins.rows = workspace.take<Span>(shape.boxes * shape.pooled_rows);
    bins.columns = workspace.take<Span>(shape.boxes * shape.pooled_columns);
    found = workspace.take<int32_t>(call.places.data ? 0 : places);
    turned_places = workspace.take<int32_t>(first ? places : 0);
    turned_gradients = workspace.take<T>(first ? places : 0);
  }

  int64_t channels_at_a_time() const {
    if (call.places.data && !first) return call.shape.channels;
    const int64_t bytes = larger(call.shape.boxes * pooled * int64_t{sizeof(int32_t)}, int64_t{1});
    return smaller(larger(cache_bytes() / bytes / 32 * 32, int64_t{32}), call.shape.channels);
  }

  void run(void* stream) const {
    const RoiPoolShape& shape = call.shape;
    if (shape.batch * shape.channels * shape.rows * shape.columns == 0) return;
    launch(cut_boxes<T>, ceil_div(shape.boxes * (shape.pooled_rows + shape.pooled_columns), kThreads), kThreads, 0,
           stream, Cut<T>{boxes_of<T>(call), bins});
    for (int64_t channel = 0; channel < shape.channels; channel += most) {
      collect_channels(channel, smaller(most, shape.channels - channel), stream);
    }
  }

  // A map of [box][bin][channel], or [box][channel][bin].
  MapView map_of_outputs(void* data, int64_t channels, bool channels_last) const {
    const int64_t column = channels_last ? channels : 1;
    return {data, channels * pooled, channels_last ? 1 : pooled, 0, call.shape.pooled_columns * column, column};
  }

  void collect_channels(int64_t channel, int64_t channels, void* stream) const {
    const RoiPoolShape& shape = call.shape;
    MapView places = from_channel(call.places, channel, sizeof(int32_t));
    MapView gradients = from_channel(call.grad_output, channel, sizeof(T));
    if (!places.data) {
      places = map_of_outputs(found, channels, !first);
      search<T>({boxes_of<T>(call), channels, from_channel(call.features, channel, sizeof(T)), {}, places}, stream);
    }
    if (first) {
      launch(turn_outputs<T>, shape.boxes * ceil_div(pooled, 32) * ceil_div(channels, 32), kThreads,
             sizeof(TurnedTile<T>), stream,
             Turning<T>{shape, channels, places, gradients, turned_places, turned_gradients});
      places = map_of_outputs(turned_places, channels, true);
      gradients = map_of_outputs(turned_gradients, channels, true);
    }
    const int64_t across = ceil_div(shape.columns, kTileColumns), down = ceil_div(shape.rows, kTileRows);
    const int64_t groups = ceil_div(channels, 32), blocks = ceil_div(groups, kCollectors);
    const int warps = static_cast<int>(ceil_div(groups, blocks));
    launch(collect<T>, shape.batch * across * down * blocks, warps * 32, sizeof(Tile<Sum<T>>), stream,
           Collection<T>{shape, channels, bins, places, gradients, from_channel(call.grad_features, channel, sizeof(T)),
                         Quotient(shape.columns), across, down, blocks, warps});
  }
};

}  // namespace

size_t workspace_size(const RoiPoolForward&) { return 0; }
size_t workspace_size(const RoiPoolBackward& call) { return size_of_workspace<Backward>(call); }

void run(const RoiPoolForward& call, void*, void* stream) {
  if (call.shape.channels == 0) return;
  with_element(call.dtype, [&](auto element) {
    using T = decltype(element);
    search<T>({boxes_of<T>(call), call.shape.channels, call.features, call.output, call.places}, stream);
  });
}
void run(const RoiPoolBackward& call, void* workspace, void* stream) {
  run_in_workspace<Backward>(call, workspace, stream);
}

}  // namespace gingham::cuda
