// RoI max pooling on CUDA.
//
// Forward reads a box's part of the map and writes the output once. Channels first: a warp takes one box on one plane.
// For each row of bins its lanes fold neighbouring columns over the rows, which they load side by side, into a line in
// shared memory, value and row of the first maximum; then a lane takes a bin and folds the line's columns. Channels
// last: a thread takes one output, and neighbouring threads neighbouring channels.
//
// Backward is deterministic and needs no atomics: every pixel collects from the bins that it lies in, box after box,
// what they give to it. A thread does this for several channels, which share all that is known of the boxes, and a
// block first picks the boxes that meet its tile. Where forward did not keep the places of the maxima, the kernels
// above find them anew, for as many channels at a time as stay within the second-level cache.
//
// A box that names no image, or is not finite, is nowhere: its outputs are NaN, and it gives nothing.
#include <cfloat>

#include "elements.cuh"
#include "gingham/roi_pool.h"
#include "primitives.cuh"

namespace gingham::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kLine = 256;    // columns of a line in shared memory
constexpr int kChannels = 8;  // of a thread that collects
constexpr int64_t kPlacesBytes = 32 << 20;

// ---------------------------------------------------------------------------------------------- the bins of a box

// Along one axis, in the type of the boxes, without contraction: a product is rounded before it is rounded to a whole
// number. A bin that is empty ends where it begins, or before.
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
  // Counted from the start of the box.
  __device__ int64_t first_of(int64_t i) const { return static_cast<int64_t>(floor(Number(i) * bin)); }
  __device__ int64_t end_of(int64_t i) const { return static_cast<int64_t>(ceil(Number(i + 1) * bin)); }

  __device__ int64_t clamped(int64_t x) const { return x < 0 ? 0 : x > extent ? extent : x; }
  __device__ int64_t begin(int64_t i) const { return clamped(start + first_of(i)); }
  __device__ int64_t end(int64_t i) const { return clamped(start + end_of(i)); }

  // The first bin that ends behind pixel x, which the box reaches.
  __device__ int64_t first_bin(int64_t x) const {
    int64_t i = static_cast<int64_t>(Number(x - start) / bin) - 2;  // never too far, and at most a few steps too near
    if (i < 0) i = 0;
    while (end_of(i) <= x - start) ++i;
    return i;
  }
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
    const Number* b = data + 5 * n;
    bool is_valid = b[0] >= 0 && b[0] < Number(shape.batch) && b[0] == floor(b[0]);
    for (int i = 1; i < 5; ++i) is_valid = is_valid && b[i] - b[i] == 0;  // infinite and NaN are not
    if (!is_valid) return {-1, {0, 0, 1}, {0, 0, 1}};
    return {static_cast<int64_t>(b[0]), Axis<Number>::of(b[2], b[4], scale, shape.pooled_rows, shape.rows),
            Axis<Number>::of(b[1], b[3], scale, shape.pooled_columns, shape.columns)};
  }
};

// ---------------------------------------------------------------------------------------------- results

template <class T>
struct Maximum {
  Sum<T> value = -FLT_MAX;  // what only greater pixels can beat, in float64 too
  int64_t row = 0, place = -1;

  // In raster order only.
  __device__ void meet(Sum<T> x, int64_t y, int64_t at) {
    if (x > value) value = x, row = y, place = at;
  }
  // In any order of columns, left ones first.
  __device__ void meet_column(Sum<T> x, int64_t y, int64_t at) {
    if (x > value || (x == value && place >= 0 && y < row)) value = x, row = y, place = at;
  }
};

__host__ __device__ inline int64_t offset_in(const MapView& map, int64_t n, int64_t c, int64_t i, int64_t j) {
  return n * map.batch_stride + c * map.channel_stride + i * map.row_stride + j * map.column_stride;
}

// Of either there may be no data; the channels of places are counted from first_channel on.
template <class T>
struct Results {
  MapView output, places;
  int64_t first_channel;

  __device__ void write(int64_t n, int64_t c, int64_t i, int64_t j, bool is_valid, bool is_empty,
                        const Maximum<T>& maximum) const {
    if (output.data) {
      static_cast<T*>(output.data)[offset_in(output, n, c, i, j)] = from_sum<T>(!is_valid  ? Sum<T>(NAN)
                                                                                : is_empty ? Sum<T>(0)
                                                                                           : maximum.value);
    }
    if (places.data) {
      static_cast<int32_t*>(places.data)[offset_in(places, n, c - first_channel, i, j)] =
          static_cast<int32_t>(maximum.place);
    }
  }
};

// ---------------------------------------------------------------------------------------------- finding maxima

template <class T>
struct Search {
  Boxes<Sum<T>> boxes;
  MapView features;
  int64_t first_channel, channels;
  Results<T> results;

  __device__ const T* plane(int64_t image, int64_t c) const {
    return static_cast<const T*>(features.data) + image * features.batch_stride + c * features.channel_stride;
  }
};

template <class T>
__global__ void search_planes(const __grid_constant__ Search<T> p) {
  GINGHAM_SHARED_MEMORY(memory);
  const RoiPoolShape& shape = p.boxes.shape;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (unit >= shape.boxes * p.channels) return;
  const int64_t n = unit / p.channels, c = p.first_channel + unit % p.channels;
  auto* line = reinterpret_cast<Sum<T>*>(memory) + warp * kLine;
  auto* line_row = reinterpret_cast<int32_t*>(reinterpret_cast<Sum<T>*>(memory) + kWarps * kLine) + warp * kLine;

  const Box<Sum<T>> box = p.boxes.at(n);
  const bool is_valid = box.image >= 0;
  const T* plane = p.plane(is_valid ? box.image : 0, c);
  for (int64_t first = 0; first < shape.pooled_columns; first += 32) {
    const int64_t j = first + lane, last = first + 32 < shape.pooled_columns ? first + 31 : shape.pooled_columns - 1;
    const bool has_bin = j < shape.pooled_columns;
    const int64_t left = box.columns.begin(first), right = box.columns.end(last);  // of all the warp's bins
    const int64_t begin = has_bin ? box.columns.begin(j) : 0, end = has_bin ? box.columns.end(j) : 0;
    for (int64_t i = 0; i < shape.pooled_rows; ++i) {
      const int64_t top = box.rows.begin(i), bottom = box.rows.end(i);
      Maximum<T> best;
      for (int64_t part = left; part < right && top < bottom; part += kLine) {
        const int64_t part_end = part + kLine < right ? part + kLine : right;
        for (int64_t x = part + lane; x < part_end; x += 32) {
          Maximum<T> column;
          const T* pixel = plane + top * p.features.row_stride + x * p.features.column_stride;
          for (int64_t y = top; y < bottom; ++y, pixel += p.features.row_stride) column.meet(to_sum(*pixel), y, 0);
          line[x - part] = column.value;
          line_row[x - part] = static_cast<int32_t>(column.row);
        }
        synchronize_warp();
        for (int64_t x = begin > part ? begin : part; x < end && x < part_end; ++x) {
          const int64_t y = line_row[x - part];
          best.meet_column(line[x - part], y, y * shape.columns + x);
        }
        synchronize_warp();
      }
      if (has_bin) p.results.write(n, c, i, j, is_valid, top >= bottom || begin >= end, best);
    }
  }
}

template <class T>
__global__ void search_channels(const __grid_constant__ Search<T> p) {
  const RoiPoolShape& shape = p.boxes.shape;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t c = p.first_channel + index % p.channels, output = index / p.channels;
  const int64_t j = output % shape.pooled_columns, i = output / shape.pooled_columns % shape.pooled_rows;
  const int64_t n = output / shape.pooled_columns / shape.pooled_rows;
  if (n >= shape.boxes) return;
  const Box<Sum<T>> box = p.boxes.at(n);
  const bool is_valid = box.image >= 0;
  const T* plane = p.plane(is_valid ? box.image : 0, c);
  const int64_t top = box.rows.begin(i), bottom = box.rows.end(i);
  const int64_t left = box.columns.begin(j), right = box.columns.end(j);
  Maximum<T> best;
  for (int64_t y = top; y < bottom; ++y) {
    for (int64_t x = left; x < right; ++x) {
      best.meet(to_sum(plane[y * p.features.row_stride + x * p.features.column_stride]), y, y * shape.columns + x);
    }
  }
  p.results.write(n, c, i, j, is_valid, top >= bottom || left >= right, best);
}

bool channels_first(const MapView& map) { return map.channel_stride != 1 || map.column_stride == 1; }

template <class T, class Call>
void search(const Call& call, int64_t first_channel, int64_t channels, MapView output, MapView places, void* stream) {
  const RoiPoolShape& shape = call.shape;
  const Search<T> parameters = {
      {static_cast<const Sum<T>*>(call.boxes), static_cast<Sum<T>>(call.spatial_scale), shape},
      call.features,
      first_channel,
      channels,
      {output, places, first_channel}};
  if (channels_first(call.features)) {
    const size_t bytes = kWarps * kLine * (sizeof(Sum<T>) + sizeof(int32_t));
    launch(search_planes<T>, (shape.boxes * channels + kWarps - 1) / kWarps, kThreads, bytes, stream, parameters);
  } else {
    const int64_t outputs = shape.boxes * channels * shape.pooled_rows * shape.pooled_columns;
    launch(search_channels<T>, (outputs + kThreads - 1) / kThreads, kThreads, 0, stream, parameters);
  }
}

// ---------------------------------------------------------------------------------------------- collecting gradients

// A tile of pixels: with channels first, a lane has a column and a warp a row, and the thread's channels lie beside
// each other; with channels last, a lane has a channel and a warp a column, and the thread's channels are a warp apart.
struct Tiling {
  bool first;
  int64_t across, down, channel_groups;

  Tiling(const RoiPoolShape& shape, bool first, int64_t channels) : first(first) {
    across = (shape.columns + columns() - 1) / columns(), down = (shape.rows + rows() - 1) / rows();
    const int64_t of_block = kChannels * (first ? 1 : 32);
    channel_groups = (channels + of_block - 1) / of_block;
  }
  __host__ __device__ int64_t columns() const { return first ? 32 : kWarps; }
  __host__ __device__ int64_t rows() const { return first ? kWarps : 1; }
  int64_t blocks(int64_t batch) const { return batch * channel_groups * down * across; }
};

template <class T>
struct Collection {
  Boxes<Sum<T>> boxes;
  Tiling tiling;
  int64_t first_channel, channels;  // that this launch takes
  MapView places;
  MapView grad_output, grad_features;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2) collect(const __grid_constant__ Collection<T> p) {
  GINGHAM_SHARED_MEMORY(memory);
  const RoiPoolShape& shape = p.boxes.shape;
  const Tiling& tiling = p.tiling;
  auto* boxes = reinterpret_cast<Box<Sum<T>>*>(memory);       // those that the block's threads look at, one each
  auto* met = reinterpret_cast<uint32_t*>(boxes + kThreads);  // a bit for each: it meets the tile
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;

  int64_t block = blockIdx.x;
  const int64_t left = block % tiling.across * tiling.columns();
  block /= tiling.across;
  const int64_t top = block % tiling.down * tiling.rows();
  block /= tiling.down;
  const int64_t group = block % tiling.channel_groups, image = block / tiling.channel_groups;
  const int64_t right = left + tiling.columns(), bottom = top + tiling.rows();

  const int64_t x = left + (tiling.first ? lane : warp), y = top + (tiling.first ? warp : 0);
  const int64_t step = tiling.first ? 1 : 32;
  const int64_t channel = p.first_channel + group * kChannels * step + (tiling.first ? 0 : lane);
  const int64_t end_channel = p.first_channel + p.channels;
  const bool has_pixel = x < shape.columns && y < shape.rows && channel < end_channel;
  const int64_t pixel = y * shape.columns + x;

  Sum<T> sums[kChannels] = {};
  for (int64_t first = 0; first < shape.boxes; first += kThreads) {
    const int64_t own = first + threadIdx.x;
    bool meets = false;
    if (own < shape.boxes) {
      const Box<Sum<T>> box = p.boxes.at(own);
      boxes[threadIdx.x] = box;
      meets = box.image == image && box.rows.begin(0) < bottom && box.rows.end(shape.pooled_rows - 1) > top &&
              box.columns.begin(0) < right && box.columns.end(shape.pooled_columns - 1) > left;
    }
    const uint32_t bits = ballot(meets);
    if (lane == 0) met[warp] = bits;
    __syncthreads();
    for (int word = 0; word < kWarps && has_pixel; ++word) {
      for (uint32_t rest = met[word]; rest != 0; rest &= rest - 1) {
        const int bit = lowest_bit(rest);
        const Box<Sum<T>>& box = boxes[word * 32 + bit];
        const int64_t n = first + word * 32 + bit;
        if (y < box.rows.begin(0) || y >= box.rows.end(shape.pooled_rows - 1)) continue;
        if (x < box.columns.begin(0) || x >= box.columns.end(shape.pooled_columns - 1)) continue;
        const int64_t first_column = box.columns.first_bin(x);
        for (int64_t i = box.rows.first_bin(y); i < shape.pooled_rows && box.rows.begin(i) <= y; ++i) {
          for (int64_t j = first_column; j < shape.pooled_columns && box.columns.begin(j) <= x; ++j) {
            const T* grad = static_cast<const T*>(p.grad_output.data) + offset_in(p.grad_output, n, 0, i, j);
            const int32_t* places =
                static_cast<const int32_t*>(p.places.data) + offset_in(p.places, n, -p.first_channel, i, j);
#pragma unroll
            for (int k = 0; k < kChannels; ++k) {
              const int64_t c = channel + k * step;
              if (c < end_channel && places[c * p.places.channel_stride] == pixel) {
                sums[k] += to_sum(grad[c * p.grad_output.channel_stride]);
              }
            }
          }
        }
      }
    }
    __syncthreads();
  }
  if (!has_pixel) return;
  T* result = static_cast<T*>(p.grad_features.data) + offset_in(p.grad_features, image, 0, y, x);
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    const int64_t c = channel + k * step;
    if (c < end_channel) result[c * p.grad_features.channel_stride] = from_sum<T>(sums[k]);
  }
}

// How many channels are taken at a time.
int64_t channels_at_a_time(const RoiPoolBackward& call) {
  const RoiPoolShape& shape = call.shape;
  if (call.places.data) return shape.channels;
  const int64_t bytes = shape.boxes * shape.pooled_rows * shape.pooled_columns * int64_t{sizeof(int32_t)};
  const int64_t of_block = kChannels * (channels_first(call.features) ? 1 : 32);
  const int64_t fit = bytes > 0 ? kPlacesBytes / bytes / of_block * of_block : shape.channels;
  const int64_t some = fit > of_block ? fit : of_block;
  return some < shape.channels ? some : shape.channels;
}

}  // namespace

size_t workspace_size(const RoiPoolForward&) { return 0; }
size_t workspace_size(const RoiPoolBackward& call) {
  if (call.places.data) return 0;
  const RoiPoolShape& shape = call.shape;
  return static_cast<size_t>(shape.boxes * shape.pooled_rows * shape.pooled_columns * channels_at_a_time(call)) *
         sizeof(int32_t);
}

void run(const RoiPoolForward& call, void*, void* stream) {
  if (call.shape.channels == 0) return;
  with_element(call.dtype, [&](auto element) {
    using T = decltype(element);
    search<T>(call, 0, call.shape.channels, call.output, call.places, stream);
  });
}

void run(const RoiPoolBackward& call, void* workspace, void* stream) {
  const RoiPoolShape& shape = call.shape;
  if (shape.batch * shape.channels * shape.rows * shape.columns == 0) return;
  const bool first = channels_first(call.features);
  const int64_t most = channels_at_a_time(call), outputs = shape.pooled_rows * shape.pooled_columns;
  with_element(call.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t channel = 0; channel < shape.channels; channel += most) {
      const int64_t channels = channel + most < shape.channels ? most : shape.channels - channel;
      const int64_t column = first ? 1 : channels;
      MapView places = call.places;
      if (!places.data) {
        places = {workspace, channels * outputs, first ? outputs : 1, 0, shape.pooled_columns * column, column};
        search<T>(call, channel, channels, {}, places, stream);
      }
      const Tiling tiling(shape, first, channels);
      const Collection<T> parameters = {
          {static_cast<const Sum<T>*>(call.boxes), static_cast<Sum<T>>(call.spatial_scale), shape},
          tiling,
          channel,
          channels,
          places,
          call.grad_output,
          call.grad_features};
      const size_t bytes = kThreads * sizeof(Box<Sum<T>>) + kWarps * sizeof(uint32_t);
      launch(collect<T>, tiling.blocks(shape.batch), kThreads, bytes, stream, parameters);
    }
  });
}

}  // namespace gingham::cuda
