// Copies of feature maps that change which of channels and positions are adjacent.
#pragma once

#include <cstdint>

#include "gingham/core.h"
#include "primitives.cuh"

namespace gingham::cuda {

struct MapSizes {
  int64_t batch, channels, frames, rows, columns;

  __host__ __device__ int64_t positions() const { return frames * rows * columns; }
};

template <class T>
struct Transposition {
  MapSizes sizes;
  MapView from, to;
  int64_t channel_tiles, position_tiles;
};

constexpr int kTransposeTile = 64, kTransposeThreads = 256;

// Columns or positions of the source are adjacent and channels of the target, or the other way round. A block copies 64
// channels of 64 positions, so that neighbouring threads have neighbours on both sides.
template <class T, bool to_channels_last>
__global__ void __launch_bounds__(kTransposeThreads) transpose(const __grid_constant__ Transposition<T> pass) {
  GINGHAM_SHARED_MEMORY(memory);
  constexpr int kTile = kTransposeTile, kStride = kTile + 1, kWarps = kTransposeThreads / 32;
  auto* offsets = reinterpret_cast<int64_t*>(memory);   // of the tile's positions, in the source and in the target
  T* tile = reinterpret_cast<T*>(offsets + 2 * kTile);  // [channel][position]
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int64_t block = blockIdx.x;
  const int64_t first_position = block % pass.position_tiles * kTile;
  block /= pass.position_tiles;
  const int64_t first_channel = block % pass.channel_tiles * kTile, image = block / pass.channel_tiles;
  const int64_t positions_left = pass.sizes.positions() - first_position;
  const int64_t channels_left = pass.sizes.channels - first_channel;
  const int positions = positions_left < kTile ? static_cast<int>(positions_left) : kTile;
  const int channels = channels_left < kTile ? static_cast<int>(channels_left) : kTile;

  if (thread < positions) {
    const int64_t x = (first_position + thread) % pass.sizes.columns;
    const int64_t row = (first_position + thread) / pass.sizes.columns;
    const int64_t y = row % pass.sizes.rows, t = row / pass.sizes.rows;
    for (int i = 0; i < 2; ++i) {
      const MapView& view = i == 0 ? pass.from : pass.to;
      offsets[i * kTile + thread] = t * view.frame_stride + y * view.row_stride + x * view.column_stride;
    }
  }
  __syncthreads();

  // visit(place in the tile, place in memory); warps take channels and lanes positions, or the other way round.
  const auto for_each = [&](const MapView& view, const int64_t* offset, bool along_channels, auto visit) {
    T* first = static_cast<T*>(view.data) + image * view.batch_stride + first_channel * view.channel_stride;
    const int across = along_channels ? channels : positions, down = along_channels ? positions : channels;
    for (int i = lane; i < across; i += 32) {
#pragma unroll 8
      for (int j = warp; j < down; j += kWarps) {
        const int c = along_channels ? i : j, p = along_channels ? j : i;
        visit(tile[c * kStride + p], first[c * view.channel_stride + offset[p]]);
      }
    }
  };
  for_each(pass.from, offsets, !to_channels_last, [](T& copy, const T& element) { copy = element; });
  __syncthreads();
  for_each(pass.to, offsets + kTile, to_channels_last, [](const T& copy, T& element) { element = copy; });
}

// Copies `from` to `to`, whose sizes are the same.
template <class T, bool to_channels_last>
void copy_transposed(const MapSizes& sizes, const MapView& from, const MapView& to, void* stream) {
  const auto tiles = [](int64_t size) { return (size + kTransposeTile - 1) / kTransposeTile; };
  const Transposition<T> pass{sizes, from, to, tiles(sizes.channels), tiles(sizes.positions())};
  launch(transpose<T, to_channels_last>, sizes.batch * pass.channel_tiles * pass.position_tiles, kTransposeThreads,
         sizeof(int64_t) * 2 * kTransposeTile + sizeof(T) * kTransposeTile * (kTransposeTile + 1), stream, pass);
}

}  // namespace gingham::cuda
