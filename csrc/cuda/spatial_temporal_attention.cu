// Spatial-temporal attention on CUDA.
//
// Everything that the operator says of a clip follows from two reductions of its features: the sums of every channel
// over every band of rows, and the energy of every position over the channels. Forward reads the features once and
// forms both (sum_planes or sum_positions, by the memory order); each block takes some channels of a frame and leaves
// the energies of its channels in the workspace, and normalize_frames adds these up. pool_clips works on the sums
// alone. Backward takes the gradients of the scores from the sums, turns them into one factor per position, and reads
// the features once more to write the gradient: a number of the channel and the band, plus the feature times the factor
// of the position. The floor is one pass over the features, and two. All sums are taken in a fixed order.
//
// Channels first: a thread has one chunk of adjacent positions of some channels, so that it keeps their energies in
// registers; the sums of chunks go through shared memory, where bands are added up. Channels last: a lane has a chunk
// of adjacent channels and a warp a position at a time; sums stay in registers, energies are added up over the lanes.
// What a thread has to work out before its first load costs as much as many loads: each takes a good number of them.
#include <initializer_list>
#include <type_traits>

#include "elements.cuh"
#include "gingham/spatial_temporal_attention.h"
#include "reduce.cuh"

namespace gingham::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kInFlight = 4;  // loads of a thread

__host__ __device__ inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ inline int warp_of_block() { return static_cast<int>(threadIdx.x) / 32; }
__device__ inline int lane_of_warp() { return static_cast<int>(threadIdx.x) % 32; }

__device__ inline float square_root(float x) { return sqrtf(x); }
__device__ inline double square_root(double x) { return sqrt(x); }

// ---------------------------------------------------------------------------------------------- frames and their bands

struct Frames {
  SpatialTemporalShape shape;

  __host__ __device__ int64_t count() const { return shape.batch * shape.frames; }
  __host__ __device__ int64_t positions() const { return shape.rows * shape.columns; }
  __host__ __device__ int64_t first_row(int64_t part) const { return part * shape.rows / shape.parts; }
  __host__ __device__ int64_t first_position(int64_t part) const { return first_row(part) * shape.columns; }
  __host__ __device__ int64_t positions_of(int64_t part) const {
    return first_position(part + 1) - first_position(part);
  }
  // The inverse of first_row.
  __device__ int64_t part_of(int64_t position) const {
    return ((position / shape.columns + 1) * shape.parts - 1) / shape.rows;
  }
};

template <class T>
struct FrameMap {
  T* data;
  MapView view;
  int64_t columns;
  bool whole;  // rows follow one another without a gap

  FrameMap(const MapView& view, const SpatialTemporalShape& shape)
      : data(static_cast<T*>(view.data)), view(view), columns(shape.columns) {
    whole = view.row_stride == shape.columns * view.column_stride || shape.rows == 1;
  }
  __device__ T* row(const Frames& frames, int64_t frame, int64_t channel, int64_t y) const {
    return data + frame / frames.shape.frames * view.batch_stride + frame % frames.shape.frames * view.frame_stride +
           channel * view.channel_stride + y * view.row_stride;
  }
  __device__ T* at(const Frames& frames, int64_t frame, int64_t channel, int64_t position) const {
    if (whole) return row(frames, frame, channel, 0) + position * view.column_stride;
    return row(frames, frame, channel, position / columns) + position % columns * view.column_stride;
  }
};

bool is_channels_last(const MapView& map, const Frames& frames) {
  return map.channel_stride == 1 && (map.column_stride != 1 || frames.positions() == 1);
}

// Adjacent elements that are moved together: positions of one band, or channels.
template <class T, int kSize>
struct alignas(kSize * sizeof(T)) Chunk {
  T x[kSize];
};
template <class T>
constexpr int kLargest = 16 / static_cast<int>(sizeof(T));

// Whether the map can be cut into chunks of 16 bytes.
template <class T>
bool has_chunks(const Frames& frames, const MapView& map) {
  const SpatialTemporalShape& shape = frames.shape;
  const bool whole = FrameMap<T>(map, shape).whole;
  int64_t all = (shape.batch > 1 ? map.batch_stride : 0) | (shape.frames > 1 ? map.frame_stride : 0);
  if (!whole) all |= map.row_stride;
  if (is_channels_last(map, frames)) {
    all |= map.column_stride | shape.channels;
  } else {
    if (map.column_stride != 1) return false;  // of a single column
    all |= map.channel_stride | (whole ? frames.positions() : shape.columns);
    for (int64_t k = 0; whole && k < shape.parts; ++k) all |= frames.first_position(k);
  }
  return all % kLargest<T> == 0 && reinterpret_cast<uintptr_t>(map.data) % 16 == 0;
}

// Channels first: how the chunks of a frame are spread over the threads of a block. A block takes some channels and,
// one tile after the other, all chunks; each thread has one chunk of a tile and every lanes()-th channel.
struct Tiling {
  int64_t chunks;  // of a frame
  int tile;        // chunks in a tile
  int channels;    // of a block
  int64_t channel_blocks;

  Tiling(const Frames& frames, int chunk_size) {
    chunks = frames.positions() / chunk_size;
    tile = static_cast<int>(smaller(chunks, kThreads));
    channels = static_cast<int>(smaller(4096 / larger(tile, 1), 256));  // whose sums fit shared memory
    channel_blocks = ceil_div(frames.shape.channels, channels);
  }
  __host__ __device__ int lanes() const { return kThreads / tile; }
  // A row of sums is padded: threads of a warp add up rows side by side.
  __host__ __device__ int sum_stride() const { return tile + 1 - tile % 2; }
};

// Channels last: a band as lines of positions at one distance, a single one where rows follow one another.
struct Lines {
  int64_t first_row, count, length;

  __device__ Lines(const Frames& frames, int64_t part, bool whole) {
    first_row = frames.first_row(part), count = frames.first_row(part + 1) - first_row, length = frames.shape.columns;
    if (whole) length *= count, count = 1;
  }
};

// How many warps share a band.
int warps_of_band(const Frames& frames) {
  const int64_t positions = ceil_div(frames.shape.rows, frames.shape.parts) * frames.shape.columns;
  return static_cast<int>(smaller(ceil_div(positions, 32), kWarps));
}

// ---------------------------------------------------------------------------------------------- sums and energies

template <class T>
struct SumsPass {
  Frames frames;
  FrameMap<const T> features;
  Tiling tiling;
  int warps;  // of a band
  int64_t channel_blocks;
  Sum<T>* energies;  // [frame][channel block][position]
  Sum<T>* sums;      // [frame][part][channel]
};

template <class T, int kChunk>
size_t sum_planes_shared(const Tiling& tiling) {
  return sizeof(Sum<T>) * (static_cast<size_t>(tiling.channels) * tiling.sum_stride() + kThreads * kChunk);
}

template <class T, int kChunk>
__global__ void __launch_bounds__(kThreads) sum_planes(const __grid_constant__ SumsPass<T> pass) {
  using S = Sum<T>;
  GINGHAM_SHARED_MEMORY(memory);
  const Frames& frames = pass.frames;
  const Tiling& tiling = pass.tiling;
  S* chunk_sums = reinterpret_cast<S*>(memory);                           // [channel][chunk]
  S* lane_energies = chunk_sums + tiling.channels * tiling.sum_stride();  // [lane][position]
  const int64_t frame = blockIdx.x / pass.channel_blocks, block = blockIdx.x % pass.channel_blocks;
  const int64_t first_channel = block * tiling.channels, parts = frames.shape.parts;
  const int channels = static_cast<int>(smaller(tiling.channels, frames.shape.channels - first_channel));
  const int thread = static_cast<int>(threadIdx.x), chunk = thread % tiling.tile, lane = thread / tiling.tile;
  const int lanes = tiling.lanes();
  const int64_t channel_stride = pass.features.view.channel_stride;

  for (int64_t first_chunk = 0; first_chunk < tiling.chunks; first_chunk += tiling.tile) {
    const int count = static_cast<int>(smaller(tiling.tile, tiling.chunks - first_chunk));
    if (lane < lanes && chunk < count) {
      const T* from = pass.features.at(frames, frame, first_channel, (first_chunk + chunk) * kChunk);
      S energies[kChunk] = {};
      for (int first = lane; first < channels; first += kInFlight * lanes) {
        Chunk<T, kChunk> loaded[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          const int c = first + i * lanes;
          if (c < channels) loaded[i] = *reinterpret_cast<const Chunk<T, kChunk>*>(from + c * channel_stride);
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          const int c = first + i * lanes;
          if (c >= channels) continue;
          S sum = 0;
#pragma unroll
          for (int v = 0; v < kChunk; ++v) {
            const S f = to_sum(loaded[i].x[v]);
            sum += f;
            energies[v] += f * f;
          }
          chunk_sums[c * tiling.sum_stride() + chunk] = sum;
        }
      }
#pragma unroll
      for (int v = 0; v < kChunk; ++v) lane_energies[(lane * tiling.tile + chunk) * kChunk + v] = energies[v];
    }
    __syncthreads();
    for (int64_t pair = thread; pair < parts * channels; pair += kThreads) {
      const int64_t part = pair / channels;
      const int channel = static_cast<int>(pair % channels);
      const int64_t band_begin = frames.first_position(part) / kChunk - first_chunk;
      const int64_t band_end = frames.first_position(part + 1) / kChunk - first_chunk;
      const int64_t begin = larger(band_begin, 0), end = smaller(band_end, count);
      if (begin >= end) continue;
      S* result = pass.sums + (frame * parts + part) * frames.shape.channels + first_channel + channel;
      S sum = band_begin < 0 ? *result : S(0);  // of earlier tiles, by this very thread
      for (int64_t i = begin; i < end; ++i) sum += chunk_sums[channel * tiling.sum_stride() + i];
      *result = sum;
    }
    S* energies = pass.energies + blockIdx.x * frames.positions() + first_chunk * kChunk;
    for (int p = thread; p < count * kChunk; p += kThreads) {
      S sum = 0;
      for (int i = 0; i < lanes; ++i) sum += lane_energies[i * tiling.tile * kChunk + p];
      energies[p] = sum;
    }
    __syncthreads();
  }
}

// A block takes one band of a frame and 32 chunks of channels.
template <class T, int kChunk>
__global__ void __launch_bounds__(kThreads, 4) sum_positions(const __grid_constant__ SumsPass<T> pass) {
  using S = Sum<T>;
  GINGHAM_SHARED_MEMORY(memory);
  S* warp_sums = reinterpret_cast<S*>(memory);  // [warp][channel]
  constexpr int kChannels = 32 * kChunk;
  const Frames& frames = pass.frames;
  const int64_t parts = frames.shape.parts, channels = frames.shape.channels;
  const int64_t block = blockIdx.x % pass.channel_blocks, row = blockIdx.x / pass.channel_blocks;
  const int64_t frame = row / parts, part = row % parts;
  const int64_t first_channel = block * kChannels, channel = first_channel + lane_of_warp() * kChunk;
  const Lines lines(frames, part, pass.features.whole);
  const T* from = pass.features.row(frames, frame, channel, lines.first_row);
  S* energies =
      pass.energies + (frame * pass.channel_blocks + block) * frames.positions() + frames.first_position(part);

  S sums[kChunk] = {};
  for (int64_t line = 0; line < lines.count; ++line, from += pass.features.view.row_stride, energies += lines.length) {
    for (int64_t first = warp_of_block(); first < lines.length; first += kInFlight * pass.warps) {
      Chunk<T, kChunk> loaded[kInFlight] = {};
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t x = first + i * pass.warps;
        if (x >= lines.length || channel >= channels) continue;
        loaded[i] = *reinterpret_cast<const Chunk<T, kChunk>*>(from + x * pass.features.view.column_stride);
      }
      S own = 0;  // lane i keeps the energy of the i-th position
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        S energy = 0;
#pragma unroll
        for (int v = 0; v < kChunk; ++v) {
          const S f = to_sum(loaded[i].x[v]);
          sums[v] += f;
          energy += f * f;
        }
        energy = sum_of_warp(energy);
        if (lane_of_warp() == i) own = energy;
      }
      const int64_t x = first + lane_of_warp() * pass.warps;
      if (lane_of_warp() < kInFlight && x < lines.length) energies[x] = own;
    }
  }
#pragma unroll
  for (int v = 0; v < kChunk; ++v) warp_sums[warp_of_block() * kChannels + lane_of_warp() * kChunk + v] = sums[v];
  __syncthreads();
  for (int c = static_cast<int>(threadIdx.x); c < kChannels && first_channel + c < channels; c += 32 * pass.warps) {
    S sum = 0;
    for (int warp = 0; warp < pass.warps; ++warp) sum += warp_sums[warp * kChannels + c];
    pass.sums[row * channels + first_channel + c] = sum;
  }
}

template <class S>
struct NormalizePass {
  Frames frames;
  SpatialEnergy energy;
  S eps;
  int64_t channel_blocks;
  const S* energies;
  S *map, *shares, *totals;
};

// A block takes a frame.
template <class S>
__global__ void __launch_bounds__(kThreads) normalize_frames(const __grid_constant__ NormalizePass<S> pass) {
  GINGHAM_SHARED_MEMORY(memory);
  const Frames& frames = pass.frames;
  const int64_t frame = blockIdx.x, positions = frames.positions(), parts = frames.shape.parts;
  const S* energies = pass.energies + frame * pass.channel_blocks * positions;
  S *map = pass.map + frame * positions, *shares = pass.shares + frame * parts;
  const bool agrl = pass.energy == SpatialEnergy::agrl;

  S squares = 0;
  for (int64_t p = threadIdx.x; p < positions; p += kThreads) {
    S sum = 0;
    for (int64_t i = 0; i < pass.channel_blocks; ++i) sum += energies[i * positions + p];
    squares += sum;
    map[p] = pass.energy == SpatialEnergy::sq ? sum : square_root(sum);
  }
  squares = sum_of_block<kWarps>(squares, reinterpret_cast<S*>(memory));  // all of the map is written by then
  for (int64_t k = warp_of_block(); k < parts; k += kWarps) {
    S share = 0;
    for (int64_t p = frames.first_position(k) + lane_of_warp(); p < frames.first_position(k + 1); p += 32) {
      share += map[p];
    }
    share = sum_of_warp(share);
    if (lane_of_warp() == 0) shares[k] = share;
  }
  __syncthreads();
  S total = 0;
  for (int64_t k = 0; k < parts; ++k) total += shares[k];
  if (agrl) total = square_root(squares);
  const S divisor = total <= pass.eps ? pass.eps : total;
  __syncthreads();
  for (int64_t p = threadIdx.x; p < positions; p += kThreads) map[p] /= divisor;
  for (int64_t k = threadIdx.x; k < parts; k += kThreads) {
    shares[k] = shares[k] / divisor / (agrl ? static_cast<S>(frames.positions_of(k)) : S(1));
  }
  if (threadIdx.x == 0) pass.totals[frame] = total;
}

// ---------------------------------------------------------------------------------------------- pooling

constexpr int kBands = 64;  // that pool_clips takes at a time
constexpr int kPooled = 4;  // channels of a thread of it, 32 apart
constexpr int kPooledOfBlock = 32 * kPooled;

template <class T>
struct PoolPass {
  Frames frames;
  Sum<T> eps;
  int64_t channel_blocks;
  const Sum<T>*sums, *shares;
  Sum<T>*part_totals, *scores;
  int64_t* chosen;
  T* pooled;
};

template <class S>
struct PoolMemory {
  S halves[2][kWarps][kPooledOfBlock];  // of the pooled vector: top and all
  int64_t chosen[kBands];
  S divisors[kBands];
};

// A block takes a clip and kPooledOfBlock channels; its warps share the rows (frame, part) among themselves.
template <class T>
__global__ void __launch_bounds__(kThreads) pool_clips(const __grid_constant__ PoolPass<T> pass) {
  using S = Sum<T>;
  GINGHAM_SHARED_MEMORY(bytes);
  auto& memory = *reinterpret_cast<PoolMemory<S>*>(bytes);
  const int64_t clip = blockIdx.x / pass.channel_blocks, block = blockIdx.x % pass.channel_blocks;
  const int64_t length = pass.frames.shape.frames, parts = pass.frames.shape.parts;
  const int64_t channels = pass.frames.shape.channels, channel = block * kPooledOfBlock + lane_of_warp();
  const S* shares = pass.shares + clip * length * parts;

  S top[kPooled] = {}, all[kPooled] = {};
  for (int64_t first = 0; first < parts; first += kBands) {
    const int64_t bands = smaller(kBands, parts - first);
    for (int64_t k = warp_of_block(); k < bands; k += kWarps) {
      S total = 0, best = 0;
      int64_t chosen = length;  // none
      for (int64_t t = lane_of_warp(); t < length; t += 32) {
        const S share = shares[t * parts + first + k];
        total += share;
        // What is no number is never chosen, but keeps its place at the first frame, as on the CPU.
        if ((share == share || t == 0) && (chosen == length || share > best)) best = share, chosen = t;
      }
      total = sum_of_warp(total);
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) {
        const S other = shuffle_xor(best, mask);
        const int64_t other_chosen = shuffle_xor(chosen, mask);
        if (other_chosen == length) continue;
        if (chosen == length || other > best || other != other || (other == best && other_chosen < chosen)) {
          best = other, chosen = other_chosen;
        }
      }
      if (lane_of_warp() == 0) {
        memory.chosen[k] = chosen;
        memory.divisors[k] = total <= pass.eps ? pass.eps : total;
        if (block == 0) {
          pass.chosen[clip * parts + first + k] = chosen;
          pass.part_totals[clip * parts + first + k] = total;
        }
      }
    }
    __syncthreads();
    for (int64_t row = warp_of_block(); row < length * bands; row += kWarps) {
      const int64_t t = row / bands, k = row % bands, at = t * parts + first + k;
      const S score = shares[at] / memory.divisors[k];
      if (block == 0 && lane_of_warp() == 0) pass.scores[clip * length * parts + at] = score;
      const bool is_chosen = memory.chosen[k] == t;
      const S* sums = pass.sums + (clip * length * parts + at) * channels + channel;
#pragma unroll
      for (int v = 0; v < kPooled; ++v) {
        const S sum = channel + 32 * v < channels ? sums[32 * v] : S(0);
        all[v] += score * sum;
        if (is_chosen) top[v] += sum;
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int v = 0; v < kPooled; ++v) {
    memory.halves[0][warp_of_block()][lane_of_warp() + 32 * v] = top[v];
    memory.halves[1][warp_of_block()][lane_of_warp() + 32 * v] = all[v];
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < 2 * kPooledOfBlock; i += kThreads) {
    const int half = i / kPooledOfBlock, c = i % kPooledOfBlock;
    if (block * kPooledOfBlock + c >= channels) continue;
    S sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += memory.halves[half][warp][c];
    pass.pooled[(clip * 2 + half) * channels + block * kPooledOfBlock + c] =
        from_sum<T>(sum / static_cast<S>(pass.frames.positions()));
  }
}

// ---------------------------------------------------------------------------------------------- gradient of pooling

template <class T>
struct PoolBackwardPass {
  Frames frames;
  Sum<T> eps;
  bool detach_attention;
  const Sum<T>*sums, *scores;
  const int64_t* chosen;
  const Sum<T>* part_totals;
  const T* grad_pooled;
  const Sum<T>* grad_scores;
  Sum<T>*grad_sums, *grad_shares;
};

// A block takes a part of a frame: gradients of its sums and, in the place of its share's, of its score.
template <class T>
__global__ void __launch_bounds__(kThreads) pool_gradients(const __grid_constant__ PoolBackwardPass<T> pass) {
  using S = Sum<T>;
  GINGHAM_SHARED_MEMORY(memory);
  const int64_t parts = pass.frames.shape.parts, channels = pass.frames.shape.channels, row = blockIdx.x;
  const int64_t length = pass.frames.shape.frames, frame = row / parts, clip = frame / length;
  const T *grad_top = pass.grad_pooled + clip * 2 * channels, *grad_all = grad_top + channels;
  const S positions = static_cast<S>(pass.frames.positions());
  const bool is_chosen = pass.chosen[clip * parts + row % parts] == frame % length;
  const S top = (is_chosen ? S(1) : S(0)) / positions, all = pass.scores[row] / positions;
  const S* sums = pass.sums + row * channels;
  S* grad_sums = pass.grad_sums + row * channels;
  S products = 0;
  for (int64_t first = threadIdx.x; first < channels; first += kInFlight * kThreads) {
    T of_top[kInFlight], of_all[kInFlight];
    S sum[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t c = first + i * kThreads < channels ? first + i * kThreads : first;
      of_top[i] = grad_top[c], of_all[i] = grad_all[c], sum[i] = sums[c];
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * kThreads >= channels) break;
      products += to_sum(of_all[i]) * sum[i];
      grad_sums[first + i * kThreads] = top * to_sum(of_top[i]) + all * to_sum(of_all[i]);
    }
  }
  products = sum_of_block<kWarps>(products, reinterpret_cast<S*>(memory));
  if (threadIdx.x == 0) {
    pass.grad_shares[row] = pass.grad_scores[row] + (pass.detach_attention ? S(0) : products / positions);
  }
}

// A block takes a clip, a thread a part: from the gradients of the scores to those of the shares.
template <class T>
__global__ void __launch_bounds__(kThreads) share_gradients(const __grid_constant__ PoolBackwardPass<T> pass) {
  using S = Sum<T>;
  const int64_t parts = pass.frames.shape.parts, rows = pass.frames.shape.frames * parts, clip = blockIdx.x;
  const S* scores = pass.scores + clip * rows;
  S* grads = pass.grad_shares + clip * rows;
  for (int64_t k = threadIdx.x; k < parts; k += kThreads) {
    const S total = pass.part_totals[clip * parts + k];
    S mean = 0;
    for (int64_t row = k; row < rows; row += parts) mean += scores[row] * grads[row];
    for (int64_t row = k; row < rows; row += parts) {
      grads[row] = total <= pass.eps ? S(0) : (grads[row] - mean) / total;
    }
  }
}

// ---------------------------------------------------------------------------------------------- gradient of features
//
//   grad_features[c, p] = grad_sums[part of p, c] + factors[p] * features[c, p]

template <class T>
struct SumsBackwardPass {
  Frames frames;
  SpatialEnergy energy;
  Sum<T> eps;
  FrameMap<const T> features;
  FrameMap<T> grad_features;
  Tiling tiling;
  int warps;  // of a band
  int64_t channel_blocks;
  const Sum<T>*map, *totals, *grad_sums, *grad_shares, *grad_map;
  Sum<T>* factors;  // [frame][position]
};

// A block takes a frame.
template <class T>
__global__ void __launch_bounds__(kThreads) position_factors(const __grid_constant__ SumsBackwardPass<T> pass) {
  using S = Sum<T>;
  GINGHAM_SHARED_MEMORY(memory);
  const Frames& frames = pass.frames;
  const int64_t parts = frames.shape.parts, positions = frames.positions(), frame = blockIdx.x;
  const S *map = pass.map + frame * positions, total = pass.totals[frame];
  const bool agrl = pass.energy == SpatialEnergy::agrl;
  const auto grad_map = [&](int64_t p) {
    const int64_t part = frames.part_of(p);
    const S grad = pass.grad_shares[frame * parts + part];
    const S of_position = agrl ? grad / static_cast<S>(frames.positions_of(part)) : grad;
    return pass.grad_map ? of_position + pass.grad_map[frame * positions + p] : of_position;
  };
  S along = 0;  // what the normalisation over positions takes away
  for (int64_t p = threadIdx.x; p < positions; p += kThreads) along += map[p] * grad_map(p);
  along = sum_of_block<kWarps>(along, reinterpret_cast<S*>(memory));
  for (int64_t p = threadIdx.x; p < positions; p += kThreads) {
    const S norm = map[p] * total;  // in the kinds l2 and agrl, where its gradient is features / norm
    S factor = 0;
    if (total <= pass.eps) {
      factor = 0;
    } else if (pass.energy == SpatialEnergy::sq) {
      factor = 2 * (grad_map(p) - along) / total;
    } else if (norm > 0 || norm != norm) {
      factor = (grad_map(p) - (agrl ? map[p] * along : along)) / total / norm;
    }
    pass.factors[frame * positions + p] = factor;
  }
}

template <class T, int kChunk>
__device__ inline Chunk<T, kChunk> applied(const Chunk<T, kChunk>& features, const Sum<T> (&factors)[kChunk],
                                           const Sum<T> (&addends)[kChunk]) {
  Chunk<T, kChunk> result;
#pragma unroll
  for (int v = 0; v < kChunk; ++v) result.x[v] = from_sum<T>(to_sum(features.x[v]) * factors[v] + addends[v]);
  return result;
}

template <class T, int kChunk>
__global__ void __launch_bounds__(kThreads) apply_to_planes(const __grid_constant__ SumsBackwardPass<T> pass) {
  using S = Sum<T>;
  const Frames& frames = pass.frames;
  const Tiling& tiling = pass.tiling;
  const int64_t frame = blockIdx.x / pass.channel_blocks, block = blockIdx.x % pass.channel_blocks;
  const int64_t first_channel = block * tiling.channels;
  const int channels = static_cast<int>(smaller(tiling.channels, frames.shape.channels - first_channel));
  const int thread = static_cast<int>(threadIdx.x), lane = thread / tiling.tile, lanes = tiling.lanes();
  if (lane >= lanes) return;
  for (int64_t chunk = thread % tiling.tile; chunk < tiling.chunks; chunk += tiling.tile) {
    const int64_t position = chunk * kChunk;
    const T* from = pass.features.at(frames, frame, first_channel, position);
    T* to = pass.grad_features.at(frames, frame, first_channel, position);
    const S* grad_sums = pass.grad_sums +
                         (frame * frames.shape.parts + frames.part_of(position)) * frames.shape.channels +
                         first_channel;
    S factors[kChunk], addends[kChunk];
#pragma unroll
    for (int v = 0; v < kChunk; ++v) factors[v] = pass.factors[frame * frames.positions() + position + v];
    for (int first = lane; first < channels; first += kInFlight * lanes) {
      Chunk<T, kChunk> loaded[kInFlight];
      S grads[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int c = first + i * lanes;
        if (c >= channels) continue;
        loaded[i] = *reinterpret_cast<const Chunk<T, kChunk>*>(from + c * pass.features.view.channel_stride);
        grads[i] = grad_sums[c];
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int c = first + i * lanes;
        if (c >= channels) continue;
#pragma unroll
        for (int v = 0; v < kChunk; ++v) addends[v] = grads[i];
        *reinterpret_cast<Chunk<T, kChunk>*>(to + c * pass.grad_features.view.channel_stride) =
            applied<T, kChunk>(loaded[i], factors, addends);
      }
    }
  }
}

// A block takes one band of a frame and 32 chunks of channels.
template <class T, int kChunk>
__global__ void __launch_bounds__(kThreads, 4) apply_to_positions(const __grid_constant__ SumsBackwardPass<T> pass) {
  using S = Sum<T>;
  const Frames& frames = pass.frames;
  const int64_t parts = frames.shape.parts, channels = frames.shape.channels;
  const int64_t block = blockIdx.x % pass.channel_blocks, row = blockIdx.x / pass.channel_blocks;
  const int64_t frame = row / parts, part = row % parts;
  const int64_t channel = (block * 32 + lane_of_warp()) * kChunk;
  if (channel >= channels) return;
  const Lines lines(frames, part, pass.features.whole && pass.grad_features.whole);
  const T* from = pass.features.row(frames, frame, channel, lines.first_row);
  T* to = pass.grad_features.row(frames, frame, channel, lines.first_row);
  const S* factors_of_line = pass.factors + frame * frames.positions() + frames.first_position(part);
  S addends[kChunk];
#pragma unroll
  for (int v = 0; v < kChunk; ++v) addends[v] = pass.grad_sums[row * channels + channel + v];
  for (int64_t line = 0; line < lines.count; ++line) {
    for (int64_t first = warp_of_block(); first < lines.length; first += kInFlight * pass.warps) {
      Chunk<T, kChunk> loaded[kInFlight];
      S factor[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t x = first + i * pass.warps;
        if (x >= lines.length) continue;
        loaded[i] = *reinterpret_cast<const Chunk<T, kChunk>*>(from + x * pass.features.view.column_stride);
        factor[i] = factors_of_line[x];
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t x = first + i * pass.warps;
        if (x >= lines.length) continue;
        S factors[kChunk];
#pragma unroll
        for (int v = 0; v < kChunk; ++v) factors[v] = factor[i];
        *reinterpret_cast<Chunk<T, kChunk>*>(to + x * pass.grad_features.view.column_stride) =
            applied<T, kChunk>(loaded[i], factors, addends);
      }
    }
    from += pass.features.view.row_stride, to += pass.grad_features.view.row_stride, factors_of_line += lines.length;
  }
}

// ---------------------------------------------------------------------------------------------- launches

// Calls run(size) with the size of chunks, as a constant, that fit all maps.
template <class T, class Run>
void with_chunk_size(const Frames& frames, std::initializer_list<MapView> maps, const Run& run) {
  bool fit = true;
  for (const MapView& map : maps) fit = fit && has_chunks<T>(frames, map);
  if (fit) {
    run(std::integral_constant<int, kLargest<T>>{});
  } else {
    run(std::integral_constant<int, 1>{});
  }
}

int64_t channel_blocks(const Frames& frames, const Tiling& tiling, bool channels_last, int chunk_size) {
  return channels_last ? ceil_div(frames.shape.channels, 32 * chunk_size) : tiling.channel_blocks;
}

template <class T>
int64_t energy_count(const SpatialTemporalSums& call) {
  const Frames frames{call.shape};
  int64_t count = 0;
  with_chunk_size<T>(frames, {call.features}, [&](auto size) {
    const Tiling tiling(frames, size);
    const bool last = is_channels_last(call.features, frames);
    count = frames.count() * channel_blocks(frames, tiling, last, size) * frames.positions();
  });
  return count;
}

template <class T>
void sum_frames(const SpatialTemporalSums& call, void* workspace, void* stream) {
  using S = Sum<T>;
  const Frames frames{call.shape};
  const bool last = is_channels_last(call.features, frames);
  int64_t blocks_of_frame = 0;
  with_chunk_size<T>(frames, {call.features}, [&](auto size) {
    constexpr int kChunk = decltype(size)::value;
    const Tiling tiling(frames, kChunk);
    blocks_of_frame = channel_blocks(frames, tiling, last, kChunk);
    const int warps = warps_of_band(frames);
    const SumsPass<T> pass{frames,
                           {call.features, call.shape},
                           tiling,
                           warps,
                           blocks_of_frame,
                           static_cast<S*>(workspace),
                           static_cast<S*>(call.sums)};
    if (last) {
      launch(sum_positions<T, kChunk>, frames.count() * call.shape.parts * blocks_of_frame, 32 * warps,
             sizeof(S) * static_cast<size_t>(32 * warps * kChunk), stream, pass);
    } else {
      launch(sum_planes<T, kChunk>, frames.count() * blocks_of_frame, kThreads, sum_planes_shared<T, kChunk>(tiling),
             stream, pass);
    }
  });
  const NormalizePass<S> pass{frames,
                              call.energy,
                              static_cast<S>(call.eps),
                              blocks_of_frame,
                              static_cast<const S*>(workspace),
                              static_cast<S*>(call.map),
                              static_cast<S*>(call.shares),
                              static_cast<S*>(call.totals)};
  launch(normalize_frames<S>, frames.count(), kThreads, sizeof(S) * kWarps, stream, pass);
}

template <class T>
void pool(const SpatialTemporalPooling& call, void* stream) {
  using S = Sum<T>;
  const int64_t blocks_of_clip =
      larger(1, ceil_div(call.shape.channels, kPooledOfBlock));  // the first gives the scores
  const PoolPass<T> pass{{call.shape},
                         static_cast<S>(call.eps),
                         blocks_of_clip,
                         static_cast<const S*>(call.sums),
                         static_cast<const S*>(call.shares),
                         static_cast<S*>(call.part_totals),
                         static_cast<S*>(call.scores),
                         call.chosen,
                         static_cast<T*>(call.pooled)};
  launch(pool_clips<T>, call.shape.batch * blocks_of_clip, kThreads, sizeof(PoolMemory<S>), stream, pass);
}

template <class T>
void differentiate_pooling(const SpatialTemporalPoolingBackward& call, void* stream) {
  using S = Sum<T>;
  const PoolBackwardPass<T> pass{{call.shape},
                                 static_cast<S>(call.eps),
                                 call.detach_attention,
                                 static_cast<const S*>(call.sums),
                                 static_cast<const S*>(call.scores),
                                 call.chosen,
                                 static_cast<const S*>(call.part_totals),
                                 static_cast<const T*>(call.grad_pooled),
                                 static_cast<const S*>(call.grad_scores),
                                 static_cast<S*>(call.grad_sums),
                                 static_cast<S*>(call.grad_shares)};
  launch(pool_gradients<T>, pass.frames.count() * call.shape.parts, kThreads, sizeof(S) * kWarps, stream, pass);
  launch(share_gradients<T>, call.shape.batch, kThreads, 0, stream, pass);
}

template <class T>
void differentiate_sums(const SpatialTemporalSumsBackward& call, void* workspace, void* stream) {
  using S = Sum<T>;
  const Frames frames{call.shape};
  const bool last = is_channels_last(call.features, frames);
  with_chunk_size<T>(frames, {call.features, call.grad_features}, [&](auto size) {
    constexpr int kChunk = decltype(size)::value;
    const Tiling tiling(frames, kChunk);
    const int64_t blocks_of_frame = channel_blocks(frames, tiling, last, kChunk);
    const SumsBackwardPass<T> pass{frames,
                                   call.energy,
                                   static_cast<S>(call.eps),
                                   {call.features, call.shape},
                                   {call.grad_features, call.shape},
                                   tiling,
                                   warps_of_band(frames),
                                   blocks_of_frame,
                                   static_cast<const S*>(call.map),
                                   static_cast<const S*>(call.totals),
                                   static_cast<const S*>(call.grad_sums),
                                   static_cast<const S*>(call.grad_shares),
                                   static_cast<const S*>(call.grad_map),
                                   static_cast<S*>(workspace)};
    launch(position_factors<T>, frames.count(), kThreads, sizeof(S) * kWarps, stream, pass);
    if (last) {
      launch(apply_to_positions<T, kChunk>, frames.count() * call.shape.parts * blocks_of_frame, 32 * pass.warps, 0,
             stream, pass);
    } else {
      launch(apply_to_planes<T, kChunk>, frames.count() * blocks_of_frame, kThreads, 0, stream, pass);
    }
  });
}

size_t sum_size(DType dtype) { return dtype == DType::float64 ? sizeof(double) : sizeof(float); }

}  // namespace

size_t workspace_size(const SpatialTemporalSums& call) {
  int64_t count = 0;
  with_element(call.dtype, [&](auto element) { count = energy_count<decltype(element)>(call); });
  return static_cast<size_t>(count) * sum_size(call.dtype);
}
void run(const SpatialTemporalSums& call, void* workspace, void* stream) {
  with_element(call.dtype, [&](auto element) { sum_frames<decltype(element)>(call, workspace, stream); });
}

size_t workspace_size(const SpatialTemporalSumsBackward& call) {
  const Frames frames{call.shape};
  return static_cast<size_t>(frames.count() * frames.positions()) * sum_size(call.dtype);
}
void run(const SpatialTemporalSumsBackward& call, void* workspace, void* stream) {
  with_element(call.dtype, [&](auto element) { differentiate_sums<decltype(element)>(call, workspace, stream); });
}

size_t workspace_size(const SpatialTemporalPooling&) { return 0; }
void run(const SpatialTemporalPooling& call, void*, void* stream) {
  with_element(call.dtype, [&](auto element) { pool<decltype(element)>(call, stream); });
}

size_t workspace_size(const SpatialTemporalPoolingBackward&) { return 0; }
void run(const SpatialTemporalPoolingBackward& call, void*, void* stream) {
  with_element(call.dtype, [&](auto element) { differentiate_pooling<decltype(element)>(call, stream); });
}

}  // namespace gingham::cuda
