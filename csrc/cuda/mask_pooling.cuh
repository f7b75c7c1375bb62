// Means of feature maps under masks, and their gradients: what masked_average_pool and masked_similarity share.
//
//   find_weights    a warp gathers the part of the mask that one position of the features takes weight from; where the
//                   mask is resized, a thread takes a position;
//   pool            weighted sums of the features: channels first, a block takes a few channels of all positions;
//                   channels last, a block takes all channels of one part of the positions;
//   mean_of_shots   a block adds up the parts of an image's shots and divides by the masks' sums;
//   spread          the gradient of the features, the outer product of a vector and the weights;
//   and for the gradient of a mask: products of that vector with the features, centred, then interpolated to the mask.
// The features are read once, or their gradient written once; all else is small. No atomics: the order of every sum
// follows from the sizes alone, those of a padded support from what counts of it.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "cosine.cuh"
#include "elements.cuh"
#include "gingham/masked_average_pool.h"
#include "primitives.cuh"
#include "reduce.cuh"

namespace gingham::cuda {

// ---------------------------------------------------------------------------------------------- one axis

// Interpolation of an axis from `from` samples to `to` (align_corners=False). Places are exact: whole numbers of units,
// 2 to of them between neighbouring samples.
struct Axis1d {
  int64_t from, to;

  __device__ int64_t unit() const { return 2 * to; }
  __device__ int64_t place(int64_t result) const {
    const int64_t x = (2 * result + 1) * from - to;
    return x > 0 ? x : 0;
  }
  // The first result whose index is `index` or larger; `to` when there is none.
  __device__ int64_t first_result_of(int64_t index) const {
    if (index <= 0) return 0;
    const int64_t result = ((2 * index + 1) * to + from - 1) / from / 2;
    return result < to ? result : to;
  }
  // What a result takes from a sample, which is one of the two that it reads.
  template <class S>
  __device__ S weight(int64_t result, int64_t index) const {
    const int64_t distance = place(result) - index * unit();
    if (distance > 0 && index == from - 1) return 1;
    return static_cast<S>(unit() - (distance < 0 ? -distance : distance)) / static_cast<S>(unit());
  }
};

// ---------------------------------------------------------------------------------------------- supports

// What counts of one support: the upper left parts of its features and of its mask.
struct Extent {
  int64_t rows, columns, mask_rows, mask_columns;

  __host__ __device__ bool is_empty() const { return rows == 0 || columns == 0 || mask_rows == 0 || mask_columns == 0; }
  __host__ __device__ int64_t positions() const { return is_empty() ? 0 : rows * columns; }
};

__device__ inline int64_t clamped(int64_t value, int64_t most) { return value < 0 ? 0 : value < most ? value : most; }

// Feature maps [batch, shot, channel, row, column] with masks [batch, shot, row, column]; a sample is a batch and a
// shot.
struct Supports {
  int64_t batch, shots, channels;
  Extent full;
  MaskType mask_type;
  MaskResize resize;
  MapView features, mask;
  const int64_t* valid_sizes;  // [batch, shots, 4] or null

  __host__ __device__ int64_t samples() const { return batch * shots; }
  __host__ __device__ int64_t positions() const { return full.rows * full.columns; }
  __device__ Extent extent(int64_t sample) const {
    if (!valid_sizes) return full;
    const int64_t* valid = valid_sizes + 4 * sample;
    return {clamped(valid[0], full.rows), clamped(valid[1], full.columns), clamped(valid[2], full.mask_rows),
            clamped(valid[3], full.mask_columns)};
  }
  __device__ int64_t offset(const MapView& map, int64_t sample) const {
    return sample / shots * map.batch_stride + sample % shots * map.frame_stride;
  }
  // The positions of one sample that count.
  template <class T>
  __device__ PixelMap<T> pixels(const MapView& map, int64_t sample, const Extent& extent) const {
    const bool one_line =
        extent.rows <= 1 || extent.columns <= 1 || map.row_stride == extent.columns * map.column_stride;
    return {static_cast<T*>(map.data) + offset(map, sample),
            0,
            map.channel_stride,
            one_line ? 0 : map.row_stride,
            extent.columns > 1 ? map.column_stride : map.row_stride,
            extent.columns};
  }
};

// Calls read(data) with the data as what it is.
template <class Read>
__device__ void with_mask(MaskType type, const void* data, const Read& read) {
  switch (type) {
    case MaskType::float64:
      return read(static_cast<const double*>(data));
    case MaskType::float16:
      return read(static_cast<const Float16*>(data));
    case MaskType::bfloat16:
      return read(static_cast<const BFloat16*>(data));
    case MaskType::uint8:
      return read(static_cast<const uint8_t*>(data));
    default:
      return read(static_cast<const float*>(data));
  }
}
template <class S, class M>
__device__ S mask_value(M x) {
  if constexpr (std::is_arithmetic_v<M>) {
    return static_cast<S>(x);
  } else {
    return static_cast<S>(to_sum(x));
  }
}
template <class S>
__device__ void store_mask(MaskType type, void* data, int64_t at, S value) {
  switch (type) {
    case MaskType::float64:
      static_cast<double*>(data)[at] = static_cast<double>(value);
      return;
    case MaskType::float16:
      static_cast<Float16*>(data)[at] = from_sum<Float16>(static_cast<float>(value));
      return;
    case MaskType::bfloat16:
      static_cast<BFloat16*>(data)[at] = from_sum<BFloat16>(static_cast<float>(value));
      return;
    default:
      static_cast<float*>(data)[at] = static_cast<float>(value);
  }
}

// A plane that is read: a mask, or sums.
template <class M>
struct Plane {
  const M* data;
  int64_t row;

  __device__ M at(int64_t y, int64_t x) const { return data[y * row + x]; }
};

template <class S>
struct Gathered {
  S weighted, plain;  // plain: of those whose index, in both axes, is this position
};

// What takes weight from one sample of an axis: results from `first` to before `end`; the sample is the index of those
// from `own` on.
struct Takers {
  int64_t first, own, end;

  __device__ Takers(const Axis1d& axis, int64_t index)
      : first(axis.first_result_of(index - 1)),
        own(axis.first_result_of(index)),
        end(axis.first_result_of(index + 1)) {}
};

constexpr int kGathered = 8;  // rows of which a lane loads values together

// The adjoint of interpolation at one position, by a warp: each lane's share of it. Where 16 or 8 columns give weight,
// the lanes lie in 2 or 4 rows. down: 32 values of the warp, for the weights of rows.
template <class S, class M>
__device__ Gathered<S> gather(const Axis1d& rows, const Axis1d& columns, const Plane<M>& source, int64_t row,
                              int64_t column, S* down) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const Takers below(rows, row), beside(columns, column);
  const int64_t width = beside.end - beside.first;
  const int across = width <= 8 ? 8 : width <= 16 ? 16 : 32, step = 32 / across;
  Gathered<S> sum{0, 0};
  for (int64_t first = below.first; first < below.end; first += 32) {
    const int count = static_cast<int>(below.end - first < 32 ? below.end - first : 32);
    const int own = static_cast<int>(below.own <= first ? 0 : below.own - first < 32 ? below.own - first : 32);
    synchronize_warp();
    if (lane < count) down[lane] = rows.weight<S>(first + lane, row);
    synchronize_warp();
    for (int64_t x = beside.first + lane % across; x < beside.end; x += across) {
      const S weight = columns.weight<S>(x, column);
      S weighted = 0, plain = 0;
      for (int y = lane / across; y < count; y += kGathered * step) {
        M values[kGathered];
#pragma unroll
        for (int k = 0; k < kGathered; ++k) {
          values[k] = source.at(first + (y + k * step < count ? y + k * step : y), x);
        }
#pragma unroll
        for (int k = 0; k < kGathered; ++k) {
          const S value = mask_value<S>(values[k]);
          weighted += y + k * step < count ? down[(y + k * step) % 32] * value : S(0);
          plain += y + k * step >= own && y + k * step < count ? value : S(0);
        }
      }
      sum.weighted += weight * weighted;
      if (x >= beside.own) sum.plain += plain;
    }
  }
  return sum;
}

// The same by a thread, without the plain sum.
template <class S>
__device__ S gather(const Axis1d& rows, const Axis1d& columns, const Plane<S>& source, int64_t row, int64_t column) {
  const Takers below(rows, row), beside(columns, column);
  S sum = 0;
  for (int64_t x = beside.first; x < beside.end; ++x) {
    const S across = columns.weight<S>(x, column);
#pragma unroll 4
    for (int64_t y = below.first; y < below.end; ++y) sum += across * rows.weight<S>(y, row) * source.at(y, x);
  }
  return sum;
}

template <class S, class M>
__device__ S interpolate(const Axis1d& rows, const Axis1d& columns, const Plane<M>& source, int64_t row,
                         int64_t column) {
  const int64_t y = rows.place(row), x = columns.place(column);
  const int64_t upper = y / rows.unit(), left = x / columns.unit();
  const int64_t lower = upper + 1 < rows.from ? upper + 1 : upper, right = left + 1 < columns.from ? left + 1 : left;
  const S down = static_cast<S>(y - upper * rows.unit()) / static_cast<S>(rows.unit());
  const S across = static_cast<S>(x - left * columns.unit()) / static_cast<S>(columns.unit());
  const M upper_left = source.at(upper, left), upper_right = source.at(upper, right);
  const M lower_left = source.at(lower, left), lower_right = source.at(lower, right);
  const S above = mask_value<S>(upper_left) * (1 - across) + mask_value<S>(upper_right) * across;
  const S below = mask_value<S>(lower_left) * (1 - across) + mask_value<S>(lower_right) * across;
  return above * (1 - down) + below * down;
}

// ---------------------------------------------------------------------------------------------- weights

constexpr int kWeightWarps = 4;

template <class S>
struct WeightPass {
  Supports supports;
  S* weights;  // [sample][position]: those that count, then zeros
  S* plain;    // what adds up to the total
};

template <class S>
__global__ void __launch_bounds__(kWeightWarps * 32, 6) find_weights(const __grid_constant__ WeightPass<S> pass) {
  GINGHAM_SHARED_MEMORY(memory);
  const Supports& s = pass.supports;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const bool by_warp = s.resize == MaskResize::features;
  const int64_t worker = static_cast<int64_t>(blockIdx.x) * kWeightWarps + warp;
  const int64_t index = by_warp ? worker : worker * 32 + lane;
  const bool active = index < s.samples() * s.positions();
  Gathered<S> sum{0, 0};
  if (active) {
    const int64_t sample = index / s.positions(), position = index % s.positions();
    const Extent extent = s.extent(sample);
    if (position < extent.positions()) {
      const int64_t row = position / extent.columns, column = position % extent.columns;
      with_mask(s.mask_type, s.mask.data, [&](const auto* data) {
        const Plane<std::decay_t<decltype(*data)>> mask{data + s.offset(s.mask, sample), s.mask.row_stride};
        if (by_warp) {
          sum = gather<S>({extent.rows, extent.mask_rows}, {extent.columns, extent.mask_columns}, mask, row, column,
                          reinterpret_cast<S*>(memory) + warp * 32);
        } else {
          sum.weighted = sum.plain =
              interpolate<S>({extent.mask_rows, extent.rows}, {extent.mask_columns, extent.columns}, mask, row, column);
        }
      });
    }
  }
  if (by_warp) sum = {sum_of_warp(sum.weighted), sum_of_warp(sum.plain)};
  if (!active || (by_warp && lane != 0)) return;
  pass.weights[index] = sum.weighted;
  pass.plain[index] = sum.plain;
}

template <class S>
void launch_find_weights(const WeightPass<S>& pass, void* stream) {
  const Supports& s = pass.supports;
  const int64_t of_block = kWeightWarps * (s.resize == MaskResize::features ? 1 : 32);
  launch(find_weights<S>, (s.samples() * s.positions() + of_block - 1) / of_block, kWeightWarps * 32,
         kWeightWarps * 32 * sizeof(S), stream, pass);
}

// ---------------------------------------------------------------------------------------------- weighted sums

constexpr int kPoolWarps = 8, kPoolThreads = kPoolWarps * 32, kPoolChannels = 2, kPoolAhead = 6;

// Channels last: how many parts so many positions are cut into.
__host__ __device__ inline int64_t pool_parts(int64_t positions) {
  return positions < 32 * 64 ? (positions + 31) / 32 : 64;
}

template <class T>
struct PoolPass {
  Supports supports;
  const Sum<T>* weights;  // [sample][position]
  Sum<T>* sums;           // [sample][part][channel]
  int64_t parts;          // 1, or pool_parts of all positions
  int along;              // threads of a block along the channels, where these are last
};

// Channels first.
template <class T>
__global__ void __launch_bounds__(kPoolThreads, 2) pool_by_position(const __grid_constant__ PoolPass<T> pass) {
  using S = Sum<T>;
  GINGHAM_SHARED_MEMORY(memory);
  S* shared = reinterpret_cast<S*>(memory);
  const Supports& s = pass.supports;
  const int64_t groups = (s.channels + kPoolChannels - 1) / kPoolChannels;
  const int64_t sample = blockIdx.x / groups, first = blockIdx.x % groups * kPoolChannels;
  const Extent extent = s.extent(sample);
  const auto features = s.pixels<const T>(s.features, sample, extent);
  const S* weights = pass.weights + sample * s.positions();
  S totals[kPoolChannels] = {};
  const int64_t positions = extent.positions();
  for (int64_t begin = static_cast<int>(threadIdx.x); begin < positions; begin += kPoolAhead * kPoolThreads) {
    int64_t offsets[kPoolAhead];
    T x[kPoolAhead][kPoolChannels];
    S own[kPoolAhead];
#pragma unroll
    for (int i = 0; i < kPoolAhead; ++i) {
      const int64_t next = begin + i * kPoolThreads;
      offsets[i] = features.offset(next < positions ? next : begin);
    }
#pragma unroll
    for (int i = 0; i < kPoolAhead; ++i) {
      const int64_t next = begin + i * kPoolThreads;
      own[i] = weights[next < positions ? next : begin];
#pragma unroll
      for (int c = 0; c < kPoolChannels; ++c) {
        x[i][c] = features.data[(first + c < s.channels ? first + c : first) * features.channel + offsets[i]];
      }
    }
#pragma unroll
    for (int i = 0; i < kPoolAhead; ++i) {
#pragma unroll
      for (int c = 0; c < kPoolChannels; ++c) {
        totals[c] += begin + i * kPoolThreads < positions ? own[i] * to_sum(x[i][c]) : S(0);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kPoolChannels; ++c) {
    const S total = sum_of_block<kPoolWarps>(totals[c], shared);
    if (threadIdx.x == 0 && first + c < s.channels) pass.sums[sample * s.channels + first + c] = total;
  }
}

// Channels last: a thread takes a pack of channels in every so many positions of the part.
template <class T, bool wide>
__global__ void __launch_bounds__(kPoolThreads, 2) pool_by_channel(const __grid_constant__ PoolPass<T> pass) {
  using S = Sum<T>;
  GINGHAM_SHARED_MEMORY(memory);
  constexpr int kCount = Pack<T, wide>::kCount;
  const Supports& s = pass.supports;
  const int thread = static_cast<int>(threadIdx.x), along = pass.along, beside = kPoolThreads / along;
  const int64_t groups = (s.channels + along * kCount - 1) / (along * kCount);
  const int64_t group = blockIdx.x % groups, part = blockIdx.x / groups % pass.parts;
  const int64_t sample = blockIdx.x / groups / pass.parts;
  const int64_t c = (group * along + thread % along) * kCount;
  const Extent extent = s.extent(sample);
  const int64_t positions = extent.positions(), parts = pool_parts(positions);
  if (part >= parts) return;  // all of the block
  const auto features = s.pixels<const T>(s.features, sample, extent);
  const S* weights = pass.weights + sample * s.positions();
  S totals[kCount] = {};
  const int64_t end = positions * (part + 1) / parts;
  for (int64_t begin = positions * part / parts + thread / along; c < s.channels && begin < end;
       begin += kPoolAhead * beside) {
    int64_t offsets[kPoolAhead];
    Pack<T, wide> packs[kPoolAhead];
    S own[kPoolAhead];
#pragma unroll
    for (int i = 0; i < kPoolAhead; ++i) {
      offsets[i] = c + features.offset(begin + i * beside < end ? begin + i * beside : begin);
    }
#pragma unroll
    for (int i = 0; i < kPoolAhead; ++i) {
      packs[i] = *reinterpret_cast<const Pack<T, wide>*>(features.data + offsets[i]);
      own[i] = weights[begin + i * beside < end ? begin + i * beside : begin];
    }
#pragma unroll
    for (int i = 0; i < kPoolAhead; ++i) {
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        totals[e] += begin + i * beside < end ? own[i] * to_sum(packs[i].x[e]) : S(0);
      }
    }
  }
  sum_beside(totals, along, kPoolThreads, reinterpret_cast<S*>(memory));
  if (thread >= along || c >= s.channels) return;
  S* sums = pass.sums + (sample * pass.parts + part) * s.channels + c;
#pragma unroll
  for (int e = 0; e < kCount; ++e) sums[e] = totals[e];
}

inline bool channels_are_lanes(const Supports& s, const MapView& map) {
  return lanes_are_channels(map, s.full.rows, s.full.columns);
}
// Whether 16 bytes of channels can be read or written at once.
template <class T>
bool is_wide(const Supports& s, const MapView& map) {
  return is_wide<T>(map.data, {map.batch_stride, map.frame_stride, map.row_stride, map.column_stride, s.channels});
}
inline int64_t parts_of_pool(const Supports& s) {
  return channels_are_lanes(s, s.features) ? pool_parts(s.positions()) : 1;
}

template <class T>
void launch_pool(PoolPass<T> pass, void* stream) {
  const Supports& s = pass.supports;
  if (channels_are_lanes(s, s.features)) {
    const bool wide = is_wide<T>(s, s.features);
    const int64_t count = wide ? Pack<T, true>::kCount : 1, packs = (s.channels + count - 1) / count;
    pass.along = threads_along(packs, kPoolThreads);
    launch(wide ? pool_by_channel<T, true> : pool_by_channel<T, false>,
           s.samples() * pass.parts * ((packs + pass.along - 1) / pass.along), kPoolThreads,
           kPoolThreads * static_cast<size_t>(count) * sizeof(Sum<T>), stream, pass);
  } else {
    launch(pool_by_position<T>, s.samples() * ((s.channels + kPoolChannels - 1) / kPoolChannels), kPoolThreads,
           kPoolWarps * sizeof(Sum<T>), stream, pass);
  }
}

constexpr int kMeanWarps = 16, kMeanThreads = kMeanWarps * 32;

// V: T or Sum<T>.
template <class T, class V>
struct MeanPass {
  Supports supports;
  int64_t parts;
  const Sum<T>* plain;  // [sample][position]
  const Sum<T>* sums;   // [sample][part][channel]
  Sum<T>* totals;       // [sample]
  V* means;             // [batch][channel]
  Sum<T>* norms;        // [batch], or null
};

// A block takes an image. The mean is taken in float64, so that a support given twice counts as once.
template <class T, class V>
__global__ void __launch_bounds__(kMeanThreads, 1) mean_of_shots(const __grid_constant__ MeanPass<T, V> pass) {
  using S = Sum<T>;
  GINGHAM_SHARED_MEMORY(memory);
  S* shared = reinterpret_cast<S*>(memory);
  const Supports& s = pass.supports;
  const int64_t image = blockIdx.x, first = image * s.shots;
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t shot = 0; shot < s.shots; ++shot) {
    const S* plain = pass.plain + (first + shot) * s.positions();
    const int64_t positions = s.extent(first + shot).positions();
    const int64_t count = positions > thread ? (positions - thread + kMeanThreads - 1) / kMeanThreads : 0;
    const S total = sum_of_block<kMeanWarps>(sum_of_memory<8>(plain + thread, count, kMeanThreads), shared);
    if (thread == 0) pass.totals[first + shot] = total;
  }
  __syncthreads();
  S square = 0;
  for (int64_t c = thread; c < s.channels; c += kMeanThreads) {
    double mean = 0;
    for (int64_t sample = first; sample < first + s.shots; ++sample) {
      const int64_t positions = s.extent(sample).positions();
      const S total = pass.totals[sample];
      if (positions == 0 || total == 0) continue;
      const int64_t parts = pass.parts == 1 ? 1 : pool_parts(positions);
      const S* sums = pass.sums + sample * pass.parts * s.channels + c;
      mean += static_cast<double>(sum_of_memory<16>(sums, parts, s.channels) / total);
    }
    const S value = static_cast<S>(mean / static_cast<double>(s.shots));
    pass.means[image * s.channels + c] = as_vector<V>(value);
    square += value * value;
  }
  square = sum_of_block<kMeanWarps>(square, shared);
  if (thread == 0 && pass.norms) pass.norms[image] = sqrt(square);
}

template <class T, class V>
void launch_mean_of_shots(const MeanPass<T, V>& pass, void* stream) {
  launch(mean_of_shots<T, V>, pass.supports.batch, kMeanThreads, kMeanWarps * sizeof(Sum<T>), stream, pass);
}

// ---------------------------------------------------------------------------------------------- gradients

constexpr int kSpreadThreads = 256, kSpreadAhead = 4, kSpreadChannels = 4;

// Blocks whose threads take kSpreadAhead positions each, `beside` of them beside each other.
__host__ __device__ inline int64_t spread_blocks(int64_t positions, int beside) {
  return (positions + kSpreadAhead * beside - 1) / (kSpreadAhead * beside);
}

// slopes [batch][channel], of type V, times `scale`, are the gradients of each shot's pooled vector. The rest of a
// padded map is zero.
template <class T, class V>
struct SpreadPass {
  Supports supports;
  MapView gradient;
  const Sum<T>* weights;  // [sample][position]
  const Sum<T>* totals;   // [sample]
  const V* slopes;
  Sum<T> scale;
  int along;  // threads of a block along the channels, where these are last
};

// What the positions of a sample give each slope.
template <class S>
struct SpreadFactors {
  Extent extent;
  const S* weights;
  S scale;  // 0 where there is no total

  template <class T, class V>
  __device__ SpreadFactors(const SpreadPass<T, V>& pass, int64_t sample)
      : extent(pass.supports.extent(sample)), weights(pass.weights + sample * pass.supports.positions()) {
    const S total = pass.totals[sample];
    scale = extent.is_empty() || total == 0 ? S(0) : pass.scale / total;
  }
  // The number of a position that counts, otherwise -1.
  __device__ int64_t number(int64_t row, int64_t column) const {
    return row < extent.rows && column < extent.columns && scale != 0 ? row * extent.columns + column : -1;
  }
  __device__ S at(int64_t number) const {
    const S weight = weights[number < 0 ? 0 : number];
    return number < 0 ? S(0) : weight * scale;
  }
};

// Channels first: a block takes some positions of kSpreadChannels channels, a thread kSpreadAhead of them.
template <class T, class V>
__global__ void __launch_bounds__(kSpreadThreads) spread_by_position(const __grid_constant__ SpreadPass<T, V> pass) {
  const Supports& s = pass.supports;
  const int64_t groups = spread_blocks(s.positions(), kSpreadThreads);
  const int64_t channel_groups = (s.channels + kSpreadChannels - 1) / kSpreadChannels;
  const int64_t group = blockIdx.x % groups, first = blockIdx.x / groups % channel_groups * kSpreadChannels;
  const int64_t sample = blockIdx.x / groups / channel_groups;
  const int64_t begin = group * kSpreadAhead * kSpreadThreads + static_cast<int>(threadIdx.x);
  const SpreadFactors<Sum<T>> of_sample(pass, sample);
  int64_t offsets[kSpreadAhead], numbers[kSpreadAhead];
  Sum<T> factors[kSpreadAhead];
#pragma unroll
  for (int i = 0; i < kSpreadAhead; ++i) {
    const int64_t at = begin + i * kSpreadThreads < s.positions() ? begin + i * kSpreadThreads : 0;
    const int64_t row = at / s.full.columns, column = at % s.full.columns;
    offsets[i] = row * pass.gradient.row_stride + column * pass.gradient.column_stride;
    numbers[i] = of_sample.number(row, column);
  }
#pragma unroll
  for (int i = 0; i < kSpreadAhead; ++i) factors[i] = of_sample.at(numbers[i]);
  T* to = static_cast<T*>(pass.gradient.data) + s.offset(pass.gradient, sample);
  for (int64_t c = first; c < first + kSpreadChannels && c < s.channels; ++c) {
    const Sum<T> slope = to_sum(pass.slopes[sample / s.shots * s.channels + c]);
#pragma unroll
    for (int i = 0; i < kSpreadAhead; ++i) {
      if (begin + i * kSpreadThreads >= s.positions()) break;
      to[c * pass.gradient.channel_stride + offsets[i]] = from_sum<T>(slope * factors[i]);
    }
  }
}

// Channels last: a block takes all channels of some positions, a thread the same packs of them in kSpreadAhead.
template <class T, class V, bool wide>
__global__ void __launch_bounds__(kSpreadThreads) spread_by_channel(const __grid_constant__ SpreadPass<T, V> pass) {
  constexpr int kCount = Pack<T, wide>::kCount;
  const Supports& s = pass.supports;
  const int thread = static_cast<int>(threadIdx.x), beside = kSpreadThreads / pass.along;
  const int64_t groups = spread_blocks(s.positions(), beside);
  const int64_t sample = blockIdx.x / groups;
  const int64_t begin = blockIdx.x % groups * kSpreadAhead * beside + thread / pass.along;
  const SpreadFactors<Sum<T>> of_sample(pass, sample);
  int64_t offsets[kSpreadAhead], numbers[kSpreadAhead];
  Sum<T> factors[kSpreadAhead];
#pragma unroll
  for (int i = 0; i < kSpreadAhead; ++i) {
    const int64_t at = begin + i * beside < s.positions() ? begin + i * beside : 0;
    const int64_t row = at / s.full.columns, column = at % s.full.columns;
    offsets[i] = row * pass.gradient.row_stride + column * pass.gradient.column_stride;
    numbers[i] = of_sample.number(row, column);
  }
#pragma unroll
  for (int i = 0; i < kSpreadAhead; ++i) factors[i] = of_sample.at(numbers[i]);
  T* to = static_cast<T*>(pass.gradient.data) + s.offset(pass.gradient, sample);
  for (int64_t c = thread % pass.along * kCount; c < s.channels; c += pass.along * kCount) {
    Sum<T> slopes[kCount];
#pragma unroll
    for (int e = 0; e < kCount; ++e) slopes[e] = to_sum(pass.slopes[sample / s.shots * s.channels + c + e]);
#pragma unroll
    for (int i = 0; i < kSpreadAhead; ++i) {
      if (begin + i * beside >= s.positions()) break;
      Pack<T, wide> pack;
#pragma unroll
      for (int e = 0; e < kCount; ++e) pack.x[e] = from_sum<T>(slopes[e] * factors[i]);
      *reinterpret_cast<Pack<T, wide>*>(to + offsets[i] + c) = pack;
    }
  }
}

template <class T, class V>
void launch_spread(SpreadPass<T, V> pass, void* stream) {
  const Supports& s = pass.supports;
  if (channels_are_lanes(s, pass.gradient)) {
    const bool wide = is_wide<T>(s, pass.gradient);
    pass.along = threads_along(s.channels / (wide ? Pack<T, true>::kCount : 1), kSpreadThreads);
    const auto kernel = wide ? spread_by_channel<T, V, true> : spread_by_channel<T, V, false>;
    launch(kernel, s.samples() * spread_blocks(s.positions(), kSpreadThreads / pass.along), kSpreadThreads, 0, stream,
           pass);
  } else {
    const int64_t channel_groups = (s.channels + kSpreadChannels - 1) / kSpreadChannels;
    launch(spread_by_position<T, V>, s.samples() * channel_groups * spread_blocks(s.positions(), kSpreadThreads),
           kSpreadThreads, 0, stream, pass);
  }
}

// With D[q] = scale sum_c slopes[c] features[c, q], the weights have the gradient E[q] = (D[q] - sum_q weights D /
// total) / total, also where the total is the mask's, as interpolation's rows sum to one; the mask has U E or R^T E.
template <class T, class V>
struct MaskPass {
  Supports supports;
  MapView gradient;
  const Sum<T>* weights;
  const Sum<T>* totals;
  const V* slopes;
  Sum<T> scale;
  Sum<T>* products;  // [sample][position]: D, then E
  bool channels_last;
};

constexpr int kProductWarps = 8;

// Channels first, a block takes 32 positions and a warp every kProductWarps-th channel; channels last, a warp takes a
// position.
template <class T, class V>
__global__ void __launch_bounds__(kProductWarps * 32) multiply_slopes(const __grid_constant__ MaskPass<T, V> pass) {
  using S = Sum<T>;
  GINGHAM_SHARED_MEMORY(memory);
  S* shared = reinterpret_cast<S*>(memory);  // [warp][lane]
  const Supports& s = pass.supports;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int of_block = pass.channels_last ? kProductWarps : 32;
  const int64_t groups = (s.positions() + of_block - 1) / of_block;
  const int64_t sample = blockIdx.x / groups;
  const int64_t at = blockIdx.x % groups * of_block + (pass.channels_last ? warp : lane);
  const Extent extent = s.extent(sample);
  const auto features = s.pixels<const T>(s.features, sample, extent);
  const V* slopes = pass.slopes + sample / s.shots * s.channels;
  S total = 0;
  if (at < extent.positions()) {
    const int64_t first = pass.channels_last ? lane : warp, step = pass.channels_last ? 32 : kProductWarps;
    const T* p = features.at(0, 0, at);
#pragma unroll 8
    for (int64_t c = first; c < s.channels; c += step) total += to_sum(slopes[c]) * to_sum(p[c * features.channel]);
  }
  if (pass.channels_last) {
    total = sum_of_warp(total);
  } else {
    shared[warp * 32 + lane] = total;
    __syncthreads();
    total = 0;
    for (int w = 0; w < kProductWarps; ++w) total += shared[w * 32 + lane];
  }
  if (at < extent.positions() && (pass.channels_last ? lane == 0 : warp == 0)) {
    pass.products[sample * s.positions() + at] = total * pass.scale;
  }
}

// A block takes a sample.
template <class T, class V>
__global__ void __launch_bounds__(kMeanThreads) center_products(const __grid_constant__ MaskPass<T, V> pass) {
  using S = Sum<T>;
  GINGHAM_SHARED_MEMORY(memory);
  S* shared = reinterpret_cast<S*>(memory);
  const Supports& s = pass.supports;
  const int64_t sample = blockIdx.x, count = s.extent(sample).positions();
  const S* weights = pass.weights + sample * s.positions();
  S* products = pass.products + sample * s.positions();
  const S inverse = pass.totals[sample] == 0 ? S(0) : 1 / pass.totals[sample];
  S mean = 0;
  for (int64_t at = static_cast<int>(threadIdx.x); at < count; at += kMeanThreads) mean += weights[at] * products[at];
  mean = sum_of_block<kMeanWarps>(mean, shared) * inverse;
  for (int64_t at = static_cast<int>(threadIdx.x); at < count; at += kMeanThreads) {
    products[at] = inverse == 0 ? S(0) : (products[at] - mean) * inverse;
  }
}

constexpr int kMaskThreads = 128;

// A thread takes a pixel of a mask.
template <class T, class V>
__global__ void __launch_bounds__(kMaskThreads) spread_to_mask(const __grid_constant__ MaskPass<T, V> pass) {
  using S = Sum<T>;
  const Supports& s = pass.supports;
  const int64_t pixels = s.full.mask_rows * s.full.mask_columns;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kMaskThreads + static_cast<int>(threadIdx.x);
  if (index >= s.samples() * pixels) return;
  const int64_t sample = index / pixels;
  const int64_t row = index % pixels / s.full.mask_columns, column = index % pixels % s.full.mask_columns;
  const Extent extent = s.extent(sample);
  S value = 0;
  if (!extent.is_empty() && row < extent.mask_rows && column < extent.mask_columns) {
    const Plane<S> source{pass.products + sample * s.positions(), extent.columns};
    if (s.resize == MaskResize::features) {
      value =
          interpolate<S>({extent.rows, extent.mask_rows}, {extent.columns, extent.mask_columns}, source, row, column);
    } else {
      value = gather<S>({extent.mask_rows, extent.rows}, {extent.mask_columns, extent.columns}, source, row, column);
    }
  }
  store_mask(s.mask_type, pass.gradient.data, s.offset(pass.gradient, sample) + row * pass.gradient.row_stride + column,
             value);
}

template <class T, class V>
void launch_mask_gradient(MaskPass<T, V> pass, void* stream) {
  const Supports& s = pass.supports;
  pass.channels_last = channels_are_lanes(s, s.features);
  const int64_t of_block = pass.channels_last ? kProductWarps : 32;
  launch(multiply_slopes<T, V>, s.samples() * ((s.positions() + of_block - 1) / of_block), kProductWarps * 32,
         kProductWarps * 32 * sizeof(Sum<T>), stream, pass);
  launch(center_products<T, V>, s.samples(), kMeanThreads, kMeanWarps * sizeof(Sum<T>), stream, pass);
  launch(spread_to_mask<T, V>, (s.samples() * s.full.mask_rows * s.full.mask_columns + kMaskThreads - 1) / kMaskThreads,
         kMaskThreads, 0, stream, pass);
}

}  // namespace gingham::cuda
