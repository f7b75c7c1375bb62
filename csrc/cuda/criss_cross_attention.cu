// Criss-cross attention on CUDA, forward and backward, on tensor cores.
//
// A map is a set of lines: its rows, its columns and, in 3-D, the frames behind each pixel. Every kernel treats one
// axis; each position u of a line, the owner, gathers from the other positions p of its line, in the manner of flash
// attention: logits of 16 owners a warp by a tile of others stay in registers, become weights there, and are the left
// operand of the next product. No attention map is stored.
//   lse            log-sum-exp of the logits over the line, merged with what earlier axes left in lse
//   output         u query, p key:  sum_p exp(logit - lse[u]) value[p]
//   grad_value     u key, p query:  sum_p exp(logit - lse[p]) grad_output[p]
//   grad_query     u query, p key:  sum_p dlogit key[p],    dlogit = exp(logit - lse[u]) (grad_output[u] . value[p] -
//   grad_key       u key, p query:  sum_p dlogit query[p]            delta[u]) scale, delta = sum_c output grad_output
// ("p is on u's cross" is symmetric), so all are gathers: no atomics, and the order of every sum is fixed by the shape.
// The row axis holds u itself; the others mask it. Later axes add to earlier ones: in the result itself, or, for
// 16-bit types, in a float32 map, so that the result is rounded once.
//
// A block of 8 warps owns 128 positions, either of one line or, 16 each, of 8 neighbouring lines, and one chunk of the
// result's channels. The latter serves short lines, and columns of channels-first maps, where 8 columns are neighbours
// in memory (a whole sector of float32, half of one in 16 bits) and the positions of one column are not. Channels-last
// tiles arrive in 16-byte asynchronous copies; other layouts, and addresses that are not aligned, element by element.
//
// Floor, forward: 2 (Ck + Cv) (H + W) multiply-adds a position, and query, key, value and output once through memory.
// Above it: logits once more for lse and once a chunk; value once an axis and tile of owners, from L2 where an image
// fits; 8 Cv bytes a position and axis after the first for the float32 map. Backward: 2 (3 Ck + 2 Cv) (H + W)
// multiply-adds a position; above it, logits are formed anew in each of the three gathers, and value . grad_output in
// two of them (and once a chunk of key channels).
#include <algorithm>
#include <cmath>

#include "cp_async.cuh"
#include "gingham/criss_cross_attention.h"
#include "launch.cuh"
#include "ldmatrix.cuh"
#include "mma.cuh"
#include "numbers.cuh"
#include "product.cuh"

namespace gingham::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kOwners = 16 * kWarps;

// ---------------------------------------------------------------------------------------------- lines

// A map as lines along one axis. Line (batch, outer, inner) begins at the sum of index * stride; `inner` counts lines
// that are neighbours.
template <class T>
struct Lines {
  T* data;
  int64_t batch, outer, inner, position, channel;
  bool vectors;  // channels are adjacent, and every address of a vector of 16 bytes is aligned
};

struct Axis {
  int64_t batch, outer, inner, length;
  bool masked;  // a position does not attend to itself
};

// What one block owns: lines [line, line + lines) of (batch, outer), positions from `first`, channels from `chunk`.
struct Tile {
  int64_t batch, outer, line, first, chunk;
  int lines;

  template <class T>
  __device__ int64_t base(const Lines<T>& map) const {
    return batch * map.batch + outer * map.outer + line * map.inner;
  }
};

__host__ __device__ constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int kLines>
__host__ __device__ int64_t tile_count(const Axis& axis, int64_t chunks) {
  return axis.batch * axis.outer * divide_up(axis.inner, kLines) * divide_up(axis.length, kOwners / kLines) * chunks;
}

template <int kLines>
__device__ Tile tile_at(const Axis& axis, int64_t index, int64_t chunks) {
  const int64_t tiles = divide_up(axis.length, kOwners / kLines), groups = divide_up(axis.inner, kLines);
  Tile tile;
  tile.chunk = index % chunks;
  index /= chunks;
  tile.first = index % tiles * (kOwners / kLines);
  index /= tiles;
  tile.line = index % groups * kLines;
  index /= groups;
  tile.outer = index % axis.outer;
  tile.batch = index / axis.outer;
  tile.lines = static_cast<int>(axis.inner - tile.line < kLines ? axis.inner - tile.line : kLines);
  return tile;
}

// ---------------------------------------------------------------------------------------------- shared memory

// Widths are fixed in bytes; rows are 16 bytes longer, which spreads the rows of a fragment over the banks.
template <class Product, int kLines>
struct Shared {
  using Element = typename Product::Element;
  using Sum = typename Product::Sum;
  static constexpr int kSize = static_cast<int>(sizeof(Element));
  static constexpr int kSlab = 128 / kSize, kSlabStride = kSlab + 16 / kSize;       // channels of a step of logits
  static constexpr int kChunk = 256 / kSize, kChunkStride = kChunk + 16 / kSize;    // channels of the result in a block
  static constexpr int kPerLine = kLines == 1 ? Product::kTile : kOwners / kLines;  // others of one line
  static constexpr int kOthers = kLines * kPerLine;

  Element owner[kOwners * kSlabStride];
  Element other[kOthers * kSlabStride];
  Element source[kOthers * kChunkStride];
  Sum lse[kOthers], delta[kOthers];
};

// Channels [channel, channel + kWidth) of kPerLine positions from `first` of the tile's lines -> shared[slot][channel],
// slot = line * kPerLine + position. What is outside the map becomes zero.
template <int kLines, int kPerLine, int kWidth, int kStride, class T>
__device__ void load(T* shared, const Lines<const T>& map, const Tile& tile, int64_t first, int64_t length,
                     int64_t channel, int64_t channels) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T)), kSlots = kLines * kPerLine;
  const T* const data = map.data + tile.base(map);
  if (map.vectors) {
    for (int i = threadIdx.x; i < kSlots * (kWidth / kVector); i += kThreads) {
      const int slot = i / (kWidth / kVector), c = i % (kWidth / kVector) * kVector;
      const int line = slot / kPerLine, position = slot % kPerLine;
      const int64_t left = channels - channel - c;
      const bool inside = line < tile.lines && first + position < length && left > 0;
      const int64_t offset = line * map.inner + (first + position) * map.position + channel + c;
      const int bytes = !inside ? 0 : left < kVector ? static_cast<int>(left * sizeof(T)) : 16;
      copy_async(shared + slot * kStride + c, inside ? data + offset : map.data, bytes);
    }
    return;
  }
  // Neighbouring threads take what is neighbours in memory.
  for (int i = threadIdx.x; i < kSlots * kWidth; i += kThreads) {
    int slot, c;
    if (map.channel == 1) {
      slot = i / kWidth;
      c = i % kWidth;
    } else {
      slot = i % kSlots;
      c = i / kSlots;
      if (map.position != 1) slot = slot % kLines * kPerLine + slot / kLines;
    }
    const int line = slot / kPerLine, position = slot % kPerLine;
    const bool inside = line < tile.lines && first + position < length && channel + c < channels;
    shared[slot * kStride + c] =
        inside ? data[line * map.inner + (first + position) * map.position + (channel + c) * map.channel] : T{};
  }
}

// ---------------------------------------------------------------------------------------------- logits

// sums[owner][other] = owners . others over all channels; the whole block calls it. Barriers before and after.
// resident: the owners' only slab is in shared memory already.
template <class Product, int kLines, int kTiles>
__device__ void dot(typename Product::Sum (&sums)[kTiles][4], Shared<Product, kLines>& shared,
                    const Lines<const typename Product::Element>& owner,
                    const Lines<const typename Product::Element>& other, int64_t channels, const Tile& tile,
                    int64_t first_other, int64_t length, bool resident, bool active) {
  using S = Shared<Product, kLines>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[j][e] = 0;
  }
  for (int64_t channel = 0; channel < channels; channel += S::kSlab) {
    if (!resident) {
      load<kLines, kOwners / kLines, S::kSlab, S::kSlabStride>(shared.owner, owner, tile, tile.first, length, channel,
                                                               channels);
    }
    load<kLines, S::kPerLine, S::kSlab, S::kSlabStride>(shared.other, other, tile, first_other, length, channel,
                                                        channels);
    wait_for_copies();
    __syncthreads();
    if (active) {
      const auto* const left_rows = shared.owner + warp * 16 * S::kSlabStride;
      const auto* const right_rows = shared.other + (kLines == 1 ? 0 : warp * S::kPerLine * S::kSlabStride);
#pragma unroll
      for (int k = 0; k < S::kSlab; k += Product::kDepth) {
        if (channel + k >= channels) break;
        const auto left = Product::template load_left<true>(left_rows + k, S::kSlabStride, lane);
#pragma unroll
        for (int j = 0; j < kTiles; j += 2) {
          const auto right =
              Product::template load_right<true>(right_rows + j * 8 * S::kSlabStride + k, S::kSlabStride, lane);
          Product::multiply(sums[j], left, right, 0);
          Product::multiply(sums[j + 1], left, right, 1);
        }
      }
    }
    __syncthreads();
  }
}

// Where a warp's 16 owners are, and which of a tile's sums stand for pairs that attend.
template <int kLines>
struct WarpRows {
  int line;       // of the tile's lines
  int64_t first;  // position of row 0
  int64_t length;
  bool active, masked;

  __device__ WarpRows(const Axis& axis, const Tile& tile)
      : line(kLines == 1 ? 0 : threadIdx.x / 32),
        first(tile.first + (kLines == 1 ? threadIdx.x / 32 * 16 : 0)),
        length(axis.length),
        active(line < tile.lines && first < axis.length),
        masked(axis.masked) {}

  __device__ int64_t owner(int half) const { return first + threadIdx.x % 32 / 4 + half * 8; }
  __device__ bool attends(int64_t owner, int64_t other) const { return other < length && !(masked && other == owner); }
};

// ---------------------------------------------------------------------------------------------- log-sum-exp

template <class Product>
struct LseCall {
  Axis axis;
  typename Product::Sum scale;
  Lines<const typename Product::Element> query, key;
  int64_t key_channels;
  Lines<typename Product::Sum> lse;
  bool merge;  // with what earlier axes wrote
};

template <class Product, int kLines>
__global__ void __launch_bounds__(kThreads) lse_kernel(LseCall<Product> call) {
  using S = Shared<Product, kLines>;
  using Sum = typename Product::Sum;
  constexpr int kTiles = S::kPerLine / 8;
  GINGHAM_SHARED_MEMORY(memory);
  S& shared = *reinterpret_cast<S*>(memory);
  const int lane = threadIdx.x % 32;

  for (int64_t index = blockIdx.x; index < tile_count<kLines>(call.axis, 1); index += gridDim.x) {
    const Tile tile = tile_at<kLines>(call.axis, index, 1);
    const WarpRows<kLines> rows(call.axis, tile);
    Sum maximum[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};  // of the owner's row, and this lane's share
    for (int64_t first = 0; first < call.axis.length; first += S::kPerLine) {
      Sum sums[kTiles][4];
      dot<Product, kLines>(sums, shared, call.query, call.key, call.key_channels, tile, first, call.axis.length,
                           first > 0 && call.key_channels <= S::kSlab, rows.active);
      if (!rows.active) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Sum larger = maximum[half];
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) {
          Sum& logit = sums[i / 2][2 * half + i % 2];
          const bool attends = rows.attends(rows.owner(half), first + i / 2 * 8 + lane % 4 * 2 + i % 2);
          logit = attends ? logit * call.scale : static_cast<Sum>(-INFINITY);
          larger = larger < logit ? logit : larger;
        }
        for (int mask = 1; mask < 4; mask *= 2) {
          const Sum another = shuffle_xor(larger, mask);
          larger = larger < another ? another : larger;
        }
        const Sum origin = larger == static_cast<Sum>(-INFINITY) ? 0 : larger;  // nothing attended to yet
        total[half] *= exponential(maximum[half] - origin);
        maximum[half] = larger;
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) {
          total[half] += exponential(sums[i / 2][2 * half + i % 2] - origin);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      for (int mask = 1; mask < 4; mask *= 2) total[half] += shuffle_xor(total[half], mask);
      if (!rows.active || lane % 4 != 0 || rows.owner(half) >= call.axis.length) continue;
      Sum& lse = call.lse.data[tile.base(call.lse) + rows.line * call.lse.inner + rows.owner(half) * call.lse.position];
      const Sum own = maximum[half] + logarithm(total[half]);
      if (!call.merge) {
        lse = own;
      } else {
        const Sum earlier = lse, larger = earlier < own ? own : earlier, smaller = earlier < own ? earlier : own;
        lse = smaller == static_cast<Sum>(-INFINITY) ? larger : larger + logarithm(1 + exponential(smaller - larger));
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------- gathers

enum class Gather { output, grad_value, grad_query, grad_key };

template <class Product>
struct GatherCall {
  Axis axis;
  typename Product::Sum scale;
  Lines<const typename Product::Element> owner, other;  // of query and key
  int64_t key_channels;
  Lines<const typename Product::Element> owner_value, other_value;  // of grad_output and value, for grad_query and _key
  int64_t value_channels;
  Lines<const typename Product::Element> source;  // what is gathered
  int64_t channels;                               // of source and result
  Lines<const typename Product::Sum> lse, delta;
  Lines<typename Product::Sum> sums;  // where axes add up
  Lines<typename Product::Element> result;
  bool first_axis, last_axis;
};

template <class Product, int kLines, Gather gather>
__global__ void __launch_bounds__(kThreads) gather_kernel(GatherCall<Product> call) {
  using S = Shared<Product, kLines>;
  using Sum = typename Product::Sum;
  constexpr bool kOfLogits = gather == Gather::grad_query || gather == Gather::grad_key;
  constexpr bool kOwnerIsQuery = gather == Gather::output || gather == Gather::grad_query;
  // Probabilities are at most 1. Gradients have any size: for float16, rows are scaled to the largest one met so far.
  constexpr bool kRescale = kOfLogits && Product::kFloat16;
  constexpr int kTiles = S::kPerLine / 8;
  GINGHAM_SHARED_MEMORY(memory);
  S& shared = *reinterpret_cast<S*>(memory);
  const int lane = threadIdx.x % 32;
  const int64_t length = call.axis.length, chunks = divide_up(call.channels, S::kChunk);

  for (int64_t index = blockIdx.x; index < tile_count<kLines>(call.axis, chunks); index += gridDim.x) {
    const Tile tile = tile_at<kLines>(call.axis, index, chunks);
    const WarpRows<kLines> rows(call.axis, tile);
    const int64_t channel = tile.chunk * S::kChunk;
    Sum lse[2] = {}, delta[2] = {};
    if constexpr (kOwnerIsQuery) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (!rows.active || rows.owner(half) >= length) continue;
        const int64_t offset = tile.base(call.lse) + rows.line * call.lse.inner + rows.owner(half) * call.lse.position;
        lse[half] = call.lse.data[offset];
        if constexpr (kOfLogits) delta[half] = call.delta.data[offset];
      }
    }
    Sum results[S::kChunk / 8][4] = {};
    Sum largest[2] = {static_cast<Sum>(1e-30), static_cast<Sum>(1e-30)};

    for (int64_t first = 0; first < length; first += S::kPerLine) {
      // Load what is gathered; it arrives while the logits are formed.
      load<kLines, S::kPerLine, S::kChunk, S::kChunkStride>(shared.source, call.source, tile, first, length, channel,
                                                            call.channels);
      if constexpr (!kOwnerIsQuery) {
        for (int slot = threadIdx.x; slot < S::kOthers; slot += kThreads) {
          const int line = slot / S::kPerLine;
          const int64_t position = first + slot % S::kPerLine;
          const bool inside = line < tile.lines && position < length;
          const int64_t offset = tile.base(call.lse) + line * call.lse.inner + position * call.lse.position;
          shared.lse[slot] = inside ? call.lse.data[offset] : 0;
          if constexpr (kOfLogits) shared.delta[slot] = inside ? call.delta.data[offset] : 0;
        }
      }

      // Weights, in the registers of the logits.
      Sum weights[kTiles][4];
      dot<Product, kLines>(weights, shared, call.owner, call.other, call.key_channels, tile, first, length,
                           !kOfLogits && first > 0 && call.key_channels <= S::kSlab, rows.active);
      Sum gradients[kOfLogits ? kTiles : 1][4];
      if constexpr (kOfLogits) {
        dot<Product, kLines>(gradients, shared, call.owner_value, call.other_value, call.value_channels, tile, first,
                             length, false, rows.active);
      }
      wait_for_copies();
      __syncthreads();
      if (rows.active) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int half = e / 2, in_line = j * 8 + lane % 4 * 2 + e % 2;
            const int slot = rows.line * S::kPerLine + in_line;
            const Sum of_lse = kOwnerIsQuery ? lse[half] : shared.lse[slot];
            Sum weight = exponential(weights[j][e] * call.scale - of_lse);
            if constexpr (kOfLogits) {
              weight *= (gradients[j][e] - (kOwnerIsQuery ? delta[half] : shared.delta[slot])) * call.scale;
            }
            if constexpr (!kRescale) weight *= Product::kLargestWeight;
            weights[j][e] = rows.attends(rows.owner(half), first + in_line) ? weight : 0;
          }
        }
        if constexpr (kRescale) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            Sum larger = largest[half];
#pragma unroll
            for (int i = 0; i < 2 * kTiles; ++i) {
              const Sum weight = weights[i / 2][2 * half + i % 2], size = weight < 0 ? -weight : weight;
              larger = larger < size ? size : larger;
            }
            for (int mask = 1; mask < 4; mask *= 2) {
              const Sum another = shuffle_xor(larger, mask);
              larger = larger < another ? another : larger;
            }
            const Sum shrink = largest[half] / larger, factor = Product::kLargestWeight / larger;
            largest[half] = larger;
#pragma unroll
            for (int i = 0; i < 2 * kTiles; ++i) weights[i / 2][2 * half + i % 2] *= factor;
#pragma unroll
            for (int i = 0; i < S::kChunk / 4; ++i) results[i / 2][2 * half + i % 2] *= shrink;
          }
        }

        // Weights times source.
        const auto* const right_rows = shared.source + rows.line * S::kPerLine * S::kChunkStride;
#pragma unroll
        for (int j = 0; j < kTiles; j += Product::kSumsPerStep) {
          if (first + j * 8 >= length) break;
          const auto left = Product::left_of_sums(weights[j], weights[j + Product::kSumsPerStep - 1]);
#pragma unroll
          for (int n = 0; n < S::kChunk / 8; n += 2) {
            if (channel + n * 8 >= call.channels) break;
            const auto right = Product::template load_right<false>(right_rows + j * 8 * S::kChunkStride + n * 8,
                                                                   S::kChunkStride, lane);
            Product::multiply(results[n], left, right, 0);
            Product::multiply(results[n + 1], left, right, 1);
          }
        }
      }
      __syncthreads();  // the next tile overwrites shared memory
    }

    // Add to the earlier axes, and store.
    if (!rows.active) continue;
#pragma unroll
    for (int n = 0; n < S::kChunk / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t c = channel + n * 8 + lane % 4 * 2 + e % 2, position = rows.owner(e / 2);
        if (c >= call.channels || position >= length) continue;
        const auto offset = [&](const auto& map) {
          return tile.base(map) + rows.line * map.inner + position * map.position + c * map.channel;
        };
        Sum sum = results[n][e] / Product::kLargestWeight;
        if constexpr (kRescale) sum *= largest[e / 2];
        if (!call.first_axis) sum += call.sums.data[offset(call.sums)];
        if (call.last_axis) {
          call.result.data[offset(call.result)] = Product::to_element(sum);
        } else {
          call.sums.data[offset(call.sums)] = sum;
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------- delta

template <class Product>
struct DeltaCall {
  Axis axis;  // of rows
  Lines<const typename Product::Element> output, grad_output;
  int64_t channels;
  Lines<typename Product::Sum> delta;
};

// delta = sum_c output * grad_output; kLanes neighbouring threads share a position where channels are neighbours.
template <class Product, int kLanes>
__global__ void __launch_bounds__(kThreads) delta_kernel(DeltaCall<Product> call) {
  const int64_t count = call.axis.batch * call.axis.outer * call.axis.inner * call.axis.length;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / kLanes);
  const int64_t block_first = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes);
  // All threads of a block take the same number of turns: they shuffle together.
  for (int64_t first = block_first; first < count; first += step) {
    const int64_t index = first + threadIdx.x / kLanes;
    const int64_t position = index % call.axis.length, line = index / call.axis.length;
    const Tile tile{line / call.axis.inner / call.axis.outer,
                    line / call.axis.inner % call.axis.outer,
                    line % call.axis.inner,
                    0,
                    0,
                    1};
    typename Product::Sum sum = 0;
    if (index < count) {
      const auto* const output = call.output.data + tile.base(call.output) + position * call.output.position;
      const auto* const grad =
          call.grad_output.data + tile.base(call.grad_output) + position * call.grad_output.position;
      for (int64_t c = threadIdx.x % kLanes; c < call.channels; c += kLanes) {
        sum += Product::to_sum(output[c * call.output.channel]) * Product::to_sum(grad[c * call.grad_output.channel]);
      }
    }
    for (int mask = 1; mask < kLanes; mask *= 2) sum += shuffle_xor(sum, mask);
    if (index < count && threadIdx.x % kLanes == 0) {
      call.delta.data[tile.base(call.delta) + position * call.delta.position] = sum;
    }
  }
}

// ---------------------------------------------------------------------------------------------- host

enum class Along { row, column, frame };

bool exists(const CrissCrossShape& shape, Along along) {  // later axes of length 1 hold nothing but the position itself
  return along == Along::row || (along == Along::column ? shape.rows : shape.frames) > 1;
}
Along last_axis(const CrissCrossShape& shape) {
  return exists(shape, Along::frame) ? Along::frame : exists(shape, Along::column) ? Along::column : Along::row;
}
int64_t positions(const CrissCrossShape& shape) { return shape.batch * shape.frames * shape.rows * shape.columns; }

Axis axis_of(const CrissCrossShape& shape, Along along) {
  switch (along) {
    case Along::row:
      return {shape.batch, shape.frames, shape.rows, shape.columns, false};
    case Along::column:
      return {shape.batch, shape.frames, shape.columns, shape.rows, true};
    default:
      return {shape.batch, shape.rows, shape.columns, shape.frames, true};
  }
}

template <class T>
Lines<T> lines(const MapView& map, Along along) {
  constexpr int64_t kVector = 16 / sizeof(T);
  const bool vectors = map.channel_stride == 1 && reinterpret_cast<uintptr_t>(map.data) % 16 == 0 &&
                       map.batch_stride % kVector == 0 && map.frame_stride % kVector == 0 &&
                       map.row_stride % kVector == 0 && map.column_stride % kVector == 0;
  T* const data = static_cast<T*>(map.data);
  switch (along) {
    case Along::row:
      return {data, map.batch_stride, map.frame_stride, map.row_stride, map.column_stride, map.channel_stride, vectors};
    case Along::column:
      return {data, map.batch_stride, map.frame_stride, map.column_stride, map.row_stride, map.channel_stride, vectors};
    default:
      return {data, map.batch_stride, map.row_stride, map.column_stride, map.frame_stride, map.channel_stride, vectors};
  }
}

MapView dense(void* data, const CrissCrossShape& shape, int64_t channels, bool channels_last) {
  const int64_t frame = shape.rows * shape.columns;
  if (channels_last) {
    return {data, shape.frames * frame * channels, 1, frame * channels, shape.columns * channels, channels};
  }
  return {data, channels * shape.frames * frame, shape.frames * frame, frame, shape.columns, 1};
}

bool is_channels_last(const MapView& map, int64_t channels) { return map.channel_stride == 1 && channels > 1; }

// Eight lines a block where a line is short, or where neighbours in memory lie across lines.
bool takes_eight_lines(const Axis& axis, bool across_lines) {
  return axis.inner > 1 && (axis.length <= 48 || across_lines);
}

template <class Parameters>
void launch_tiles(void (*kernel)(Parameters), int64_t blocks, size_t shared_bytes, void* stream,
                  const Parameters& parameters) {
  constexpr int64_t kMostBlocks = int64_t{1} << 30;  // a kernel goes on to further tiles itself
  launch(kernel, std::min(blocks, kMostBlocks), kThreads, shared_bytes, stream, parameters);
}

template <class Product>
void launch_lse(const LseCall<Product>& call, void* stream) {
  if (takes_eight_lines(call.axis, call.query.channel != 1 && call.query.position != 1)) {
    launch_tiles(lse_kernel<Product, 8>, tile_count<8>(call.axis, 1), sizeof(Shared<Product, 8>), stream, call);
  } else {
    launch_tiles(lse_kernel<Product, 1>, tile_count<1>(call.axis, 1), sizeof(Shared<Product, 1>), stream, call);
  }
}

template <Gather gather, class Product>
void launch_gather(const GatherCall<Product>& call, void* stream) {
  const int64_t chunks = divide_up(call.channels, Shared<Product, 1>::kChunk);
  if (takes_eight_lines(call.axis, call.source.channel != 1 && call.source.position != 1)) {
    launch_tiles(gather_kernel<Product, 8, gather>, tile_count<8>(call.axis, chunks), sizeof(Shared<Product, 8>),
                 stream, call);
  } else {
    launch_tiles(gather_kernel<Product, 1, gather>, tile_count<1>(call.axis, chunks), sizeof(Shared<Product, 1>),
                 stream, call);
  }
}

template <class Product>
void forward(const CrissCrossForward& call, void* workspace, void* stream) {
  using T = typename Product::Element;
  using Sum = typename Product::Sum;
  const CrissCrossShape& shape = call.shape;
  const auto scale = static_cast<Sum>(call.scale);
  const MapView lse = dense(call.lse, shape, 1, false);
  const bool same_type = sizeof(T) == sizeof(Sum);
  const MapView sums =
      same_type ? call.output
                : dense(workspace, shape, shape.value_channels, is_channels_last(call.output, shape.value_channels));
  for (const Along along : {Along::row, Along::column, Along::frame}) {
    if (!exists(shape, along)) continue;
    launch_lse(LseCall<Product>{axis_of(shape, along), scale, lines<const T>(call.query, along),
                                lines<const T>(call.key, along), shape.key_channels, lines<Sum>(lse, along),
                                along != Along::row},
               stream);
  }
  for (const Along along : {Along::row, Along::column, Along::frame}) {
    if (!exists(shape, along)) continue;
    GatherCall<Product> gather{};
    gather.axis = axis_of(shape, along);
    gather.scale = scale;
    gather.owner = lines<const T>(call.query, along);
    gather.other = lines<const T>(call.key, along);
    gather.key_channels = shape.key_channels;
    gather.source = lines<const T>(call.value, along);
    gather.channels = shape.value_channels;
    gather.lse = lines<const Sum>(lse, along);
    gather.sums = lines<Sum>(sums, along);
    gather.result = lines<T>(call.output, along);
    gather.first_axis = along == Along::row;
    gather.last_axis = along == last_axis(shape);
    launch_gather<Gather::output>(gather, stream);
  }
}

size_t delta_bytes(const CrissCrossBackward& call) {
  const size_t bytes = static_cast<size_t>(positions(call.shape)) * (call.dtype == DType::float64 ? 8 : 4);
  return (bytes + 255) / 256 * 256;
}

template <Gather gather, class Product>
void gather_gradient(const CrissCrossBackward& call, const MapView& source, const MapView& result, int64_t channels,
                     const MapView& delta, void* workspace, void* stream) {
  using T = typename Product::Element;
  using Sum = typename Product::Sum;
  constexpr bool kOwnerIsQuery = gather == Gather::grad_query;
  const CrissCrossShape& shape = call.shape;
  const bool same_type = sizeof(T) == sizeof(Sum);
  const MapView sums = same_type ? result : dense(workspace, shape, channels, is_channels_last(result, channels));
  const MapView lse = dense(const_cast<void*>(call.lse), shape, 1, false);
  for (const Along along : {Along::row, Along::column, Along::frame}) {
    if (!exists(shape, along)) continue;
    GatherCall<Product> parameters{};
    parameters.axis = axis_of(shape, along);
    parameters.scale = static_cast<Sum>(call.scale);
    parameters.owner = lines<const T>(kOwnerIsQuery ? call.query : call.key, along);
    parameters.other = lines<const T>(kOwnerIsQuery ? call.key : call.query, along);
    parameters.key_channels = shape.key_channels;
    parameters.owner_value = lines<const T>(kOwnerIsQuery ? call.grad_output : call.value, along);
    parameters.other_value = lines<const T>(kOwnerIsQuery ? call.value : call.grad_output, along);
    parameters.value_channels = shape.value_channels;
    parameters.source = lines<const T>(source, along);
    parameters.channels = channels;
    parameters.lse = lines<const Sum>(lse, along);
    parameters.delta = lines<const Sum>(delta, along);
    parameters.sums = lines<Sum>(sums, along);
    parameters.result = lines<T>(result, along);
    parameters.first_axis = along == Along::row;
    parameters.last_axis = along == last_axis(shape);
    launch_gather<gather>(parameters, stream);
  }
}

template <class Product>
void backward(const CrissCrossBackward& call, void* workspace, void* stream) {
  using T = typename Product::Element;
  using Sum = typename Product::Sum;
  const CrissCrossShape& shape = call.shape;
  const MapView delta = dense(workspace, shape, 1, false);
  void* const sums = static_cast<unsigned char*>(workspace) + delta_bytes(call);

  const DeltaCall<Product> of_delta{axis_of(shape, Along::row), lines<const T>(call.output, Along::row),
                                    lines<const T>(call.grad_output, Along::row), shape.value_channels,
                                    lines<Sum>(delta, Along::row)};
  if (is_channels_last(call.output, shape.value_channels)) {
    launch_tiles(delta_kernel<Product, 32>, divide_up(positions(shape), kThreads / 32), 0, stream, of_delta);
  } else {
    launch_tiles(delta_kernel<Product, 1>, divide_up(positions(shape), kThreads), 0, stream, of_delta);
  }
  gather_gradient<Gather::grad_query, Product>(call, call.key, call.grad_query, shape.key_channels, delta, sums,
                                               stream);
  gather_gradient<Gather::grad_key, Product>(call, call.query, call.grad_key, shape.key_channels, delta, sums, stream);
  gather_gradient<Gather::grad_value, Product>(call, call.grad_output, call.grad_value, shape.value_channels, delta,
                                               sums, stream);
}

// The float32 map in which the axes of a 16-bit result add up.
size_t sums_bytes(const CrissCrossShape& shape, DType dtype, int64_t channels) {
  const bool needed = element_size(dtype) == 2 && last_axis(shape) != Along::row;
  return needed ? static_cast<size_t>(positions(shape) * channels) * 4 : 0;
}

}  // namespace

size_t workspace_size(const CrissCrossForward& call) {
  return sums_bytes(call.shape, call.dtype, call.shape.value_channels);
}

size_t workspace_size(const CrissCrossBackward& call) {
  return delta_bytes(call) +
         sums_bytes(call.shape, call.dtype, std::max(call.shape.key_channels, call.shape.value_channels));
}

void criss_cross_attention(const CrissCrossForward& call, bool allow_tf32, void* workspace, void* stream) {
  if (positions(call.shape) == 0) return;
  switch (call.dtype) {
    case DType::float32:
      return allow_tf32 ? forward<Tf32Product<false>>(call, workspace, stream)
                        : forward<Tf32Product<true>>(call, workspace, stream);
    case DType::float64:
      return forward<Float64Product>(call, workspace, stream);
    case DType::float16:
      return forward<PackedProduct<Float16>>(call, workspace, stream);
    case DType::bfloat16:
      return forward<PackedProduct<BFloat16>>(call, workspace, stream);
  }
}

void criss_cross_attention_backward(const CrissCrossBackward& call, bool allow_tf32, void* workspace, void* stream) {
  if (positions(call.shape) == 0) return;
  switch (call.dtype) {
    case DType::float32:
      return allow_tf32 ? backward<Tf32Product<false>>(call, workspace, stream)
                        : backward<Tf32Product<true>>(call, workspace, stream);
    case DType::float64:
      return backward<Float64Product>(call, workspace, stream);
    case DType::float16:
      return backward<PackedProduct<Float16>>(call, workspace, stream);
    case DType::bfloat16:
      return backward<PackedProduct<BFloat16>>(call, workspace, stream);
  }
}

}  // namespace gingham::cuda
