// Feature maps as sets of lines along one axis, and the part of them that one block works on: tiles in shared memory.
//
// A block takes neighbouring lines of one plane; each of its warps owns 16 positions of one line and meets the `other`
// positions of the same line. Tiles hold some channels of those positions. Their order in shared memory follows the
// memory: channels adjacent for channels-last maps, otherwise positions adjacent, so that no load or store scatters.
#pragma once

#include <cstdint>

#include "primitives.cuh"

namespace gingham::cuda {

// What is adjacent in global memory, seen from a line.
enum class Contiguous { channel, position, line };

// A map along one axis. Strides in elements.
template <class T>
struct Lines {
  T* data;
  int64_t image, plane, line, position, channel;
  bool vectors;  // channels can be moved 16 bytes at a time

  __device__ T* at(int64_t i, int64_t p, int64_t l, int64_t x) const {
    return data + i * image + p * plane + l * line + x * position;
  }
};

// What one launch covers: all lines of some images along one axis, and of each line a segment of `other` positions.
struct Work {
  int64_t length, lines, planes, first_image;  // of a line; in a plane; in an image
  int64_t line_groups, own_tiles;              // blocks in a plane, blocks along a line
  int lines_per_block, tiles_per_line;         // a tile is the 16 positions of one warp
  int64_t other_begin;
  int other_count, other_padded;  // padded to 16
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

// [line][position][channel] or [line][channel][position] in shared memory. Rows are padded to odd multiples of 16
// bytes, which ldmatrix reads, and lines are skewed by 16, across which columns are written, without bank conflicts.
template <class T, bool channel_minor, int channels>
struct Tile {
  int positions;

  __host__ __device__ int stride() const {
    return channel_minor ? channels + 16 / static_cast<int>(sizeof(T)) : positions + 8;
  }
  __host__ __device__ int line_stride() const {
    return channel_minor ? positions * stride() : channels * stride() + 16 / static_cast<int>(sizeof(T));
  }
  __device__ int offset(int line, int position, int channel) const {
    return line * line_stride() + (channel_minor ? position * stride() + channel : channel * stride() + position);
  }
  __host__ __device__ size_t bytes(int lines) const { return sizeof(T) * static_cast<size_t>(lines) * line_stride(); }
};

template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T x[kSize];
};

// How a product's operands are cut for a layout.
template <class P, Contiguous contiguous_>
struct Block {
  using Element = typename P::Element;
  using Sum = typename P::Sum;
  static constexpr Contiguous contiguous = contiguous_;
  static constexpr bool kChannelMinor = contiguous == Contiguous::channel;
  // Neighbouring columns that fill one 32-byte sector of memory.
  static constexpr int kLineLanes = contiguous == Contiguous::line ? 32 / sizeof(Element) : 1;
  static constexpr int kWarps = kLineLanes > 8 ? kLineLanes : 8, kThreads = 32 * kWarps;
  static_assert(contiguous != Contiguous::position || (kWarps <= 8 && P::kSegment <= 128), "for_each_element");
  static constexpr int kChannels = contiguous == Contiguous::line ? 16 : 128 / sizeof(Element);
  // Two tiles where the next one can be copied behind the arithmetic.
  static constexpr int kStages = kChannelMinor ? 2 : 1;
  static constexpr int kBlocksPerProcessor = sizeof(Element) == 2 && kWarps == 8 ? 2 : 1;
  using OperandTile = Tile<Element, kChannelMinor, kChannels>;
  using ResultTile = Tile<Sum, kChannelMinor, kChannels>;
};

// Shared memory of a block: the other tiles; the own tiles or, when these are done with, the results; a factor a row.
template <class B>
struct BlockMemory {
  typename B::OperandTile other_tile, own_tile;
  typename B::ResultTile result_tile;
  size_t other_bytes, own_bytes, result_bytes, row_bytes;

  __host__ __device__ explicit BlockMemory(const Work& work)
      : other_tile{work.other_padded}, own_tile{work.own_positions()}, result_tile{work.own_positions()} {
    other_bytes = other_tile.bytes(work.lines_per_block);
    own_bytes = own_tile.bytes(work.lines_per_block);
    result_bytes = result_tile.bytes(work.lines_per_block);
    if (result_bytes < B::kStages * own_bytes) result_bytes = B::kStages * own_bytes;
    row_bytes = sizeof(typename B::Sum) * work.lines_per_block * work.own_positions();
  }
  __host__ __device__ size_t bytes() const { return B::kStages * other_bytes + result_bytes + row_bytes; }

  __device__ typename B::Element* other(unsigned char* memory, int stage) const {
    return reinterpret_cast<typename B::Element*>(memory + stage * other_bytes);
  }
  __device__ typename B::Element* own(unsigned char* memory, int stage) const {
    return reinterpret_cast<typename B::Element*>(memory + B::kStages * other_bytes + stage * own_bytes);
  }
  __device__ typename B::Sum* results(unsigned char* memory) const {
    return reinterpret_cast<typename B::Sum*>(memory + B::kStages * other_bytes);
  }
  __device__ typename B::Sum* row_factors(unsigned char* memory) const {
    return reinterpret_cast<typename B::Sum*>(memory + B::kStages * other_bytes + result_bytes);
  }
};

// Calls visit(line, position, channel) for all of a tile, so that neighbouring threads take neighbours in memory.
template <class B, class Visit>
__device__ inline void for_each_element(int lines, int positions, int channels, Visit visit) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  if constexpr (B::contiguous == Contiguous::channel) {
    for (int row = warp; row < lines * positions; row += B::kWarps) {
      for (int c = lane; c < channels; c += 32) visit(row / positions, row % positions, c);
    }
  } else if constexpr (B::contiguous == Contiguous::position) {
    // A row has at most 128 positions; four steps written out keep four loads of a lane in flight.
#pragma unroll 2
    for (int row = warp; row < lines * channels; row += B::kWarps) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const int i = lane + step * 32;
        if (i < positions) visit(row / channels, i, row % channels);
      }
    }
  } else {
    const int line = lane % B::kLineLanes;
    if (line >= lines) return;
    for (int c = warp; c < channels; c += B::kWarps) {
#pragma unroll 4
      for (int i = lane / B::kLineLanes; i < positions; i += 32 / B::kLineLanes) visit(line, i, c);
    }
  }
}

// Loads `count` positions from `begin` on, some channels from `first_channel` on; what does not exist becomes zero.
template <class B>
__device__ inline void load_tile(typename B::Element* tile, typename B::OperandTile shape,
                                 const Lines<typename B::Element>& map, const Work& work, const Place& place,
                                 int64_t begin, int count, int64_t first_channel, int64_t channels) {
  using T = typename B::Element;
  const T* origin = map.at(place.image, place.plane, place.first_line, begin) + first_channel * map.channel;
  const int64_t left = channels - first_channel;
  const int channel_count = left < B::kChannels ? static_cast<int>(left) : B::kChannels;
  if (B::kChannelMinor && map.vectors) {
    constexpr int kSize = Vector<T>::kSize, kVectors = B::kChannels / kSize;
    for (int i = threadIdx.x; i < work.lines_per_block * shape.positions * kVectors; i += B::kThreads) {
      const int c = i % kVectors * kSize, row = i / kVectors;
      const int line = row / shape.positions, position = row % shape.positions;
      const bool exists = line < place.line_count && position < count && c < channel_count;
      const int filled = channel_count - c < kSize ? channel_count - c : kSize;
      copy_async(tile + shape.offset(line, position, c),
                 exists ? origin + line * map.line + position * map.position + c : map.data,
                 exists ? filled * static_cast<int>(sizeof(T)) : 0);
    }
    return;
  }
  const int padded_channels = (channel_count + 15) / 16 * 16;
  for_each_element<B>(work.lines_per_block, shape.positions, padded_channels, [&](int line, int position, int c) {
    const bool exists = line < place.line_count && position < count && c < channel_count;
    tile[shape.offset(line, position, c)] =
        exists ? origin[line * map.line + position * map.position + c * map.channel] : T{};
  });
}

// map = results, plus map's old value times the row's factor where there is one (add).
template <class P, class B>
__device__ inline void store_tile(const typename B::Sum* results, typename B::ResultTile shape,
                                  const Lines<typename B::Element>& map, const Place& place, int64_t first_channel,
                                  int64_t channels, bool add, const typename B::Sum* row_factors) {
  using T = typename B::Element;
  using Sum = typename B::Sum;
  T* origin = map.at(place.image, place.plane, place.first_line, place.own_begin) + first_channel * map.channel;
  const int64_t left = channels - first_channel;
  const int channel_count = left < B::kChannels ? static_cast<int>(left) : B::kChannels;
  const auto merged = [&](Sum sum, const T& old, int row) {
    if (add) sum += P::to_sum(old) * (row_factors ? row_factors[row] : Sum(1));
    return P::to_element(sum);
  };
  constexpr int kSize = Vector<T>::kSize;
  if (B::kChannelMinor && map.vectors && channel_count % kSize == 0) {
    const int vectors = channel_count / kSize;
    for (int i = threadIdx.x; i < place.line_count * place.own_count * vectors; i += B::kThreads) {
      const int c = i % vectors * kSize, row = i / vectors;
      const int line = row / place.own_count, position = row % place.own_count;
      auto* target = reinterpret_cast<Vector<T>*>(origin + line * map.line + position * map.position + c);
      Vector<T> elements{};
      if (add) elements = *target;
      const Sum* result = results + shape.offset(line, position, c);
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        elements.x[e] = merged(result[e], elements.x[e], line * shape.positions + position);
      }
      *target = elements;
    }
    return;
  }
  for_each_element<B>(place.line_count, place.own_count, channel_count, [&](int line, int position, int c) {
    T& target = origin[line * map.line + position * map.position + c * map.channel];
    target = merged(results[shape.offset(line, position, c)], add ? target : T{}, line * shape.positions + position);
  });
}

// ---------------------------------------------------------------------------------------------- the two products

// Walks the channels in chunks: load(first channel, stage) fills shared memory, use(first channel, stage) works on it
// when all of the block has filled its part. With two stages the next chunk is copied during the work on this one.
template <class B, class Load, class Use>
__device__ inline void for_each_chunk(int64_t channels, Load load, Use use) {
  if constexpr (B::kStages == 1) {
    for (int64_t channel = 0; channel < channels; channel += B::kChannels) {
      __syncthreads();  // shared memory is free
      load(channel, 0);
      __syncthreads();
      use(channel, 0);
    }
  } else {
    int stage = 1;
    for (int64_t channel = -B::kChannels; channel < channels; channel += B::kChannels) {
      wait_for_copies();
      __syncthreads();
      if (channel + B::kChannels < channels) load(channel + B::kChannels, stage ^ 1);
      if (channel >= 0) use(channel, stage);
      stage ^= 1;
    }
  }
}

// sums[j] = own rows times other rows, over all channels: logits, or gradients of probabilities.
template <class P, class B>
__device__ inline void multiply_rows(typename P::Sum (&sums)[P::kSegment / 8][4], const Lines<typename P::Element>& own,
                                     const Lines<typename P::Element>& other, int64_t channels, const Work& work,
                                     const Place& place, unsigned char* memory) {
  const BlockMemory<B> layout(work);
  const auto load = [&](int64_t channel, int stage) {
    load_tile<B>(layout.own(memory, stage), layout.own_tile, own, work, place, place.own_begin, place.own_count,
                 channel, channels);
    load_tile<B>(layout.other(memory, stage), layout.other_tile, other, work, place, work.other_begin, work.other_count,
                 channel, channels);
  };
#pragma unroll
  for (int i = 0; i < P::kSegment / 2; ++i) sums[i / 4][i % 4] = 0;

  for_each_chunk<B>(channels, load, [&](int64_t channel, int stage) {
    if (!place.active) return;
    const auto* own_rows = layout.own(memory, stage);
    const auto* other_rows = layout.other(memory, stage);
#pragma unroll 1
    for (int k = 0; k < B::kChannels && channel + k < channels; k += P::kDepth) {
      const auto left = P::template load_left<B::kChannelMinor>(
          own_rows + layout.own_tile.offset(place.line, place.tile * 16, k), layout.own_tile.stride(), place.lane);
#pragma unroll
      for (int j = 0; j < P::kSegment / 8; j += 2) {
        if (j * 8 < work.other_padded) {
          const auto right = P::template load_right<B::kChannelMinor>(
              other_rows + layout.other_tile.offset(place.line, j * 8, k), layout.other_tile.stride(), place.lane);
          P::multiply(sums[j], left, right, 0);
          P::multiply(sums[j + 1], left, right, 1);
        }
      }
    }
  });
}

// result = undo * (weights times other rows), merged as store_tile says; undo of the lane's rows.
template <class P, class B>
__device__ inline void gather_rows(const typename P::Weights& weights, const Lines<typename P::Element>& other,
                                   const Lines<typename P::Element>& result, int64_t channels,
                                   const typename P::Sum (&undo)[2], bool add, const typename P::Sum* row_factors,
                                   const Work& work, const Place& place, unsigned char* memory) {
  const BlockMemory<B> layout(work);
  const auto load = [&](int64_t channel, int stage) {
    load_tile<B>(layout.other(memory, stage), layout.other_tile, other, work, place, work.other_begin, work.other_count,
                 channel, channels);
  };
  // The barriers of for_each_chunk also show the row factors to all.
  for_each_chunk<B>(channels, load, [&](int64_t channel, int stage) {
    if (place.active) {
      typename P::Sum sums[B::kChannels / 8][4] = {};
      const auto* other_rows = layout.other(memory, stage);
#pragma unroll
      for (int step = 0; step < P::kSegment / P::kDepth; ++step) {
        if (step * P::kDepth < work.other_padded) {
          const auto left = P::left(weights, step);
#pragma unroll
          for (int j = 0; j < B::kChannels / 8; j += 2) {
            if (channel + j * 8 < channels) {
              const auto right = P::template load_right<!B::kChannelMinor>(
                  other_rows + layout.other_tile.offset(place.line, step * P::kDepth, j * 8),
                  layout.other_tile.stride(), place.lane);
              P::multiply(sums[j], left, right, 0);
              P::multiply(sums[j + 1], left, right, 1);
            }
          }
        }
      }
      auto* results = layout.results(memory);
#pragma unroll
      for (int j = 0; j < B::kChannels / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int c = j * 8 + place.lane % 4 * 2 + e % 2;
          results[layout.result_tile.offset(place.line, place.own(e / 2), c)] = sums[j][e] * undo[e / 2];
        }
      }
    }
    __syncthreads();
    store_tile<P, B>(layout.results(memory), layout.result_tile, result, place, channel, channels, add, row_factors);
  });
}

}  // namespace gingham::cuda
