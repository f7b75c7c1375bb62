// Feature maps with adjacent channels as sets of lines along one axis, and the part of them that one block works on:
// tiles in shared memory.
//
// A block takes neighbouring lines of one plane; each of its warps owns 16 positions of one line and meets the `other`
// positions of the same line. Tiles hold some channels of those positions.
#pragma once

#include <cstdint>

#include "primitives.cuh"

namespace gingham::cuda {

// A map along one axis. Strides in elements.
template <class T>
struct Lines {
  T* data;
  int64_t image, plane, line, position;
  bool vectors;  // channels can be moved 16 bytes at a time

  __device__ T* at(int64_t i, int64_t p, int64_t l, int64_t x) const {
    return data + i * image + p * plane + l * line + x * position;
  }
};

// Other positions that the products take without asking in between whether there are more.
constexpr int kGroup = 32;

// What one launch covers: all lines of some images along one axis, and of each line a segment of `other` positions.
struct Work {
  int64_t length, lines, planes, first_image;  // of a line; in a plane; in an image
  int64_t line_groups, own_tiles;              // blocks in a plane, blocks along a line
  int lines_per_block, tiles_per_line;         // a tile is the 16 positions of one warp
  int64_t other_begin;
  int other_count, other_padded;  // padded to kGroup
  bool mask_self;                 // a position belongs to its row alone

  __host__ __device__ int own_positions() const { return tiles_per_line * 16; }
  int64_t blocks_of_image() const { return planes * line_groups * own_tiles; }
};

// Where this block and this warp are.
struct Place {
  int64_t image, plane, first_line, own_begin;
  int line_count, own_count;
  int lane, warp, line, tile;  // line and tile of the warp, in the block
  bool active;                 // the warp owns positions that exist

  __device__ explicit Place(const Work& work) {
    int64_t block = blockIdx.x;
    own_begin = block % work.own_tiles * work.own_positions();
    block /= work.own_tiles;
    first_line = block % work.line_groups * work.lines_per_block;
    block /= work.line_groups;
    plane = block % work.planes;
    image = work.first_image + block / work.planes;
    const int64_t lines_left = work.lines - first_line, own_left = work.length - own_begin;
    line_count = lines_left < work.lines_per_block ? static_cast<int>(lines_left) : work.lines_per_block;
    own_count = own_left < work.own_positions() ? static_cast<int>(own_left) : work.own_positions();
    lane = static_cast<int>(threadIdx.x) % 32;
    warp = static_cast<int>(threadIdx.x) / 32;
    line = warp / work.tiles_per_line;
    tile = warp % work.tiles_per_line;
    active = line < line_count && tile * 16 < own_count;
  }
  // Row of the lane's sums: half 0 or 1 of a tile.
  __device__ int own(int half) const { return tile * 16 + lane / 4 + half * 8; }
};

// [line][position][channel] in shared memory. Rows are padded to odd multiples of 16 bytes, which ldmatrix reads
// without bank conflicts.
template <class T, int channels>
struct Tile {
  static constexpr int kStride = channels + 16 / static_cast<int>(sizeof(T));
  int positions;

  __device__ int offset(int line, int position, int channel) const {
    return (line * positions + position) * kStride + channel;
  }
  __host__ __device__ size_t bytes(int lines) const {
    return sizeof(T) * static_cast<size_t>(lines * positions) * kStride;
  }
};

template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T x[kSize];
};

constexpr int kWarps = 8, kThreads = 32 * kWarps;

// How a product's operands are cut.
template <class P>
struct Block {
  using Element = typename P::Element;
  static constexpr int kChannels = 128 / sizeof(Element);  // of a tile
  static constexpr int kVectors = kChannels / Vector<Element>::kSize;
  static constexpr int kBlocksPerProcessor = sizeof(Element) == 2 ? 2 : 1;
  using OperandTile = Tile<Element, kChannels>;
};

// Shared memory of a block, twice, so that one chunk of channels is copied behind the arithmetic on the other: the
// other tiles and the own tiles, which results take when these are done with.
template <class P>
struct BlockMemory {
  using Element = typename P::Element;
  typename Block<P>::OperandTile other_tile, own_tile;
  size_t other_bytes, own_bytes;

  __host__ __device__ explicit BlockMemory(const Work& work)
      : other_tile{work.other_padded}, own_tile{work.own_positions()} {
    other_bytes = other_tile.bytes(work.lines_per_block);
    own_bytes = own_tile.bytes(work.lines_per_block);
  }
  __host__ __device__ size_t bytes() const { return 2 * (other_bytes + own_bytes); }

  __device__ Element* other(unsigned char* memory, int stage) const {
    return reinterpret_cast<Element*>(memory + stage * other_bytes);
  }
  __device__ Element* own(unsigned char* memory, int stage) const {
    return reinterpret_cast<Element*>(memory + 2 * other_bytes + stage * own_bytes);
  }
};

// Loads `count` positions from `begin` on, some channels from `first_channel` on; what does not exist becomes zero.
template <class P>
__device__ inline void load_tile(typename P::Element* tile, typename Block<P>::OperandTile shape,
                                 const Lines<typename P::Element>& map, const Work& work, const Place& place,
                                 int64_t begin, int count, int64_t first_channel, int64_t channels) {
  using T = typename P::Element;
  using B = Block<P>;
  const T* origin = map.at(place.image, place.plane, place.first_line, begin) + first_channel;
  const int64_t left = channels - first_channel;
  const int channel_count = left < B::kChannels ? static_cast<int>(left) : B::kChannels;
  if (map.vectors) {
    constexpr int kSize = Vector<T>::kSize, kRows = kThreads / B::kVectors;
    const int c = static_cast<int>(threadIdx.x) % B::kVectors * kSize;
    const int first = static_cast<int>(threadIdx.x) / B::kVectors;
    const int filled = channel_count - c < kSize ? channel_count - c : kSize;
    for (int line = 0; line < work.lines_per_block; ++line) {
      const int existing = line < place.line_count && filled > 0 ? count : 0;
      const T* from = origin + line * map.line + first * map.position + c;
      T* to = tile + shape.offset(line, first, c);
#pragma unroll 4
      for (int position = first; position < shape.positions; position += kRows) {
        if (position < existing) {
          copy_async(to, from, filled * static_cast<int>(sizeof(T)));
        } else {
          *reinterpret_cast<Vector<T>*>(to) = {};
        }
        from += kRows * map.position;
        to += kRows * shape.kStride;
      }
    }
    return;
  }
  for (int row = place.warp; row < work.lines_per_block * shape.positions; row += kWarps) {
    const int line = row / shape.positions, position = row % shape.positions;
    for (int c = place.lane; c < B::kChannels; c += 32) {
      const bool exists = line < place.line_count && position < count && c < channel_count;
      tile[shape.offset(line, position, c)] = exists ? origin[line * map.line + position * map.position + c] : T{};
    }
  }
}

// map = the warp's 16 rows of a tile.
template <class P>
__device__ inline void store_rows(const typename P::Element* tile, typename Block<P>::OperandTile shape,
                                  const Lines<typename P::Element>& map, const Place& place, int64_t first_channel,
                                  int64_t channels) {
  using T = typename P::Element;
  using B = Block<P>;
  constexpr int kSize = Vector<T>::kSize, kRows = 32 / B::kVectors;
  const int64_t left = channels - first_channel;
  const int channel_count = left < B::kChannels ? static_cast<int>(left) : B::kChannels;
  const int c = place.lane % B::kVectors * kSize, first = place.tile * 16 + place.lane / B::kVectors;
  const T* from = tile + shape.offset(place.line, first, c);
  T* to = map.at(place.image, place.plane, place.first_line + place.line, place.own_begin + first) + first_channel + c;
#pragma unroll
  for (int i = 0; i < 16; i += kRows) {
    if (first + i < place.own_count) {
      if (map.vectors && c + kSize <= channel_count) {
        *reinterpret_cast<Vector<T>*>(to) = *reinterpret_cast<const Vector<T>*>(from);
      } else {
        for (int e = 0; e < kSize && c + e < channel_count; ++e) to[e] = from[e];
      }
    }
    from += kRows * shape.kStride;
    to += kRows * map.position;
  }
}

// ---------------------------------------------------------------------------------------------- the two products

// Walks the channels in chunks: load(first channel, stage) fills shared memory, use(first channel, stage) works on it
// when all of the block has filled its part; meanwhile the next chunk is copied.
template <class P, class Load, class Use>
__device__ inline void for_each_chunk(int64_t channels, Load load, Use use) {
  constexpr int kChannels = Block<P>::kChannels;
  int stage = 1;
  for (int64_t channel = -kChannels; channel < channels; channel += kChannels) {
    wait_for_copies();
    __syncthreads();
    if (channel + kChannels < channels) load(channel + kChannels, stage ^ 1);
    if (channel >= 0) use(channel, stage);
    stage ^= 1;
  }
}

// sums[j] = own rows times other rows, over all channels: logits, or gradients of probabilities.
template <class P>
__device__ inline void multiply_rows(typename P::Sum (&sums)[P::kSegment / 8][4], const Lines<typename P::Element>& own,
                                     const Lines<typename P::Element>& other, int64_t channels, const Work& work,
                                     const Place& place, unsigned char* memory) {
  const BlockMemory<P> layout(work);
  const auto load = [&](int64_t channel, int stage) {
    load_tile<P>(layout.own(memory, stage), layout.own_tile, own, work, place, place.own_begin, place.own_count,
                 channel, channels);
    load_tile<P>(layout.other(memory, stage), layout.other_tile, other, work, place, work.other_begin, work.other_count,
                 channel, channels);
  };
#pragma unroll
  for (int i = 0; i < P::kSegment / 2; ++i) sums[i / 4][i % 4] = 0;

  for_each_chunk<P>(channels, load, [&](int64_t channel, int stage) {
    if (!place.active) return;
    const auto* own_rows = layout.own(memory, stage) + layout.own_tile.offset(place.line, place.tile * 16, 0);
    const auto* other_rows = layout.other(memory, stage) + layout.other_tile.offset(place.line, 0, 0);
#pragma unroll 1
    for (int k = 0; k < Block<P>::kChannels && channel + k < channels; k += P::kDepth) {
      const auto left = P::template load_left<true>(own_rows + k, layout.own_tile.kStride, place.lane);
#pragma unroll
      for (int group = 0; group < P::kSegment; group += kGroup) {
        if (group >= work.other_padded) break;
#pragma unroll
        for (int j = group / 8; j < (group + kGroup) / 8; j += 2) {
          const auto right = P::template load_right<true>(other_rows + j * 8 * layout.other_tile.kStride + k,
                                                          layout.other_tile.kStride, place.lane);
          P::multiply(sums[j], left, right, 0);
          P::multiply(sums[j + 1], left, right, 1);
        }
      }
    }
  });
}

// result = undo * (weights times other rows), plus its old value times the factor (add); undo and factors of the lane's
// rows.
template <class P>
__device__ inline void gather_rows(const typename P::Weights& weights, const Lines<typename P::Element>& other,
                                   const Lines<typename P::Element>& result, int64_t channels,
                                   const typename P::Sum (&undo)[2], bool add, const typename P::Sum (&factors)[2],
                                   const Work& work, const Place& place, unsigned char* memory) {
  constexpr int kChannels = Block<P>::kChannels;
  const BlockMemory<P> layout(work);
  const auto load = [&](int64_t channel, int stage) {
    load_tile<P>(layout.other(memory, stage), layout.other_tile, other, work, place, work.other_begin, work.other_count,
                 channel, channels);
    if (!add) return;
    load_tile<P>(layout.own(memory, stage), layout.own_tile, result, work, place, place.own_begin, place.own_count,
                 channel, channels);
  };
  for_each_chunk<P>(channels, load, [&](int64_t channel, int stage) {
    if (!place.active) return;
    const auto* other_rows = layout.other(memory, stage) + layout.other_tile.offset(place.line, 0, 0);
    typename P::Sum sums[kChannels / 8][4] = {};
#pragma unroll
    for (int group = 0; group < P::kSegment; group += kGroup) {
      if (group >= work.other_padded) break;
#pragma unroll
      for (int step = group / P::kDepth; step < (group + kGroup) / P::kDepth; ++step) {
        const auto left = P::left(weights, step);
#pragma unroll
        for (int j = 0; j < kChannels / 8; j += 2) {
          const auto right = P::template load_right<false>(
              other_rows + step * P::kDepth * layout.other_tile.kStride + j * 8, layout.other_tile.kStride, place.lane);
          P::multiply(sums[j], left, right, 0);
          P::multiply(sums[j + 1], left, right, 1);
        }
      }
    }
    auto* results = layout.own(memory, stage);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      auto* row = results + layout.own_tile.offset(place.line, place.own(half), place.lane % 4 * 2);
#pragma unroll
      for (int j = 0; j < kChannels / 8; ++j) {
        P::merge(row + j * 8, sums[j][2 * half] * undo[half], sums[j][2 * half + 1] * undo[half], add, factors[half]);
      }
    }
    synchronize_warp();
    store_rows<P>(results, layout.own_tile, result, place, channel, channels);
  });
}

}  // namespace gingham::cuda
