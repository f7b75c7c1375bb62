// Lines of a feature map (rows, columns, or the frames behind one pixel) and their panels.
//
// A pass works on a group of neighbouring lines. Packing copies some channels of the group into panels
// [line][channel][position] (or, for the summed axis of pairs, [line][channel / 2][position] and
// [line][channel][position / 2]); unpacking writes panels of results back. Whichever of the three axes is contiguous in
// memory is read and written by whole vectors; when it is not the panels' last axis, blocks are transposed in
// registers.
#pragma once

#include "gingham/core.h"
#include "panel_gemm.h"
#include "prefetch.h"
#include "simd.h"

namespace {

enum class Axis { row, column, frame };
enum class Contiguous { position, line, channel };

struct LineGroup {
  int64_t batch, frame, row, column;  // of the first position of the first line
  int64_t lines, length;
};

// Where element (channel, line, position) of a group lies.
template <class E>
struct LineView {
  E* data;
  int64_t channel_stride, line_stride, position_stride;
};

template <class E>
inline LineView<E> view_lines(const gingham::MapView& map, Axis axis, const LineGroup& group) {
  const int64_t offset = group.batch * map.batch_stride + group.frame * map.frame_stride + group.row * map.row_stride +
                         group.column * map.column_stride;
  const int64_t position = axis == Axis::row      ? map.column_stride
                           : axis == Axis::column ? map.row_stride
                                                  : map.frame_stride;
  return {static_cast<E*>(map.data) + offset, map.channel_stride,
          axis == Axis::row ? map.row_stride : map.column_stride, position};
}

// Loads units whose first elements are neighbours along the contiguous axis, a whole vector of them or fewer. `second`
// is where the second elements of the pairs are, null when they are zeros (the odd end of an axis).
template <class U, class E>
struct UnitLoader {  // units of one element, widened
  static Vector<typename U::Unit> load_whole(const E* first, const E*) { return load_widened(first); }
  static Vector<typename U::Unit> load_part(const E* first, const E*, int64_t units) {
    return load_widened(first, int(units));
  }
};
#if defined(__AVX512BF16__)
template <>
struct UnitLoader<BFloat16Pair, BFloat16> {
  static Vector<uint32_t> join(__m256i low, __m256i high) {
    return (Vector<uint32_t>)_mm512_or_si512(_mm512_cvtepu16_epi32(low),
                                             _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
  }
  static __m256i load_shorts(const BFloat16* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static __m256i load_shorts(const BFloat16* p, int64_t count) {
    return _mm256_maskz_loadu_epi16(first_lanes(int(count)), p);
  }
  static Vector<uint32_t> load_whole(const BFloat16* first, const BFloat16* second) {
    return join(load_shorts(first), load_shorts(second));
  }
  static Vector<uint32_t> load_part(const BFloat16* first, const BFloat16* second, int64_t units) {
    return join(load_shorts(first, units), second ? load_shorts(second, units) : __m256i{});
  }
  // Pairs along the contiguous axis itself: of all its neighbours, or of `elements` of them, the odd one paired with
  // zero.
  static Vector<uint32_t> load_neighbours(const BFloat16* first) { return (Vector<uint32_t>)_mm512_loadu_si512(first); }
  static Vector<uint32_t> load_neighbours(const BFloat16* first, int64_t elements) {
    return (Vector<uint32_t>)_mm512_maskz_loadu_epi16(__mmask32((1ull << elements) - 1), first);
  }
};
#endif

// Which axis two elements of a unit are neighbours of. Units of one element do not care.
enum class PairAxis { position, channel };

// Units of a summed axis.
template <class U>
inline int64_t summed_units(int64_t elements) {
  const int64_t units = (elements + U::kPair - 1) / U::kPair;
  return U::kTiles ? round_up(units, kTileRows) : units;
}

// Leading dimension of a row of that many units or sums. Tiles need whole vectors.
template <class U>
inline int64_t row_stride(int64_t columns) {
  constexpr int kN = kLanes<typename U::Sum>;
  return U::kTiles ? round_up(columns, kN) : row_length(columns, kN);
}
// The same of a panel whose positions are `length` long.
template <class U, PairAxis pairs>
inline int64_t panel_stride(int64_t length) {
  return row_stride<U>(pairs == PairAxis::position ? (length + U::kPair - 1) / U::kPair : length);
}
template <class U, PairAxis pairs>
inline int64_t panel_rows(int64_t channels) {
  return pairs == PairAxis::channel ? summed_units<U>(channels) : channels;
}

// The unit (c, g, p) of a view; zeros beyond the end.
template <class U, PairAxis pairs, class E>
inline typename U::Unit unit_at(LineView<const E> view, int64_t channels, int64_t length, int64_t c, int64_t g,
                                int64_t p) {
  if (c >= channels || p >= length) return 0;
  const E* first = view.data + c * view.channel_stride + g * view.line_stride + p * view.position_stride;
  if constexpr (U::kPair == 1) {
    return to_float(*first);
  } else {
    const bool whole = pairs == PairAxis::position ? p + 1 < length : c + 1 < channels;
    const int64_t step = pairs == PairAxis::position ? view.position_stride : view.channel_stride;
    return first->bits | (whole ? uint32_t(first[step].bits) << 16 : 0);
  }
}

// Packs channels [0, channels) of the view into panels [line][panel_rows][panel_stride]. What lies beyond the end reads
// as zero. Whole vectors and whole blocks of them, which are nearly all, go through code without conditions.
template <class U, PairAxis pairs, class E>
GINGHAM_STEP void pack(typename U::Unit* panels, LineView<const E> view, int64_t channels, int64_t lines,
                       int64_t length, Contiguous contiguous) {
  using Unit = typename U::Unit;
  using Loader = UnitLoader<U, E>;
  constexpr int kN = kLanes<Unit>;
  constexpr int64_t kStepP = pairs == PairAxis::position ? U::kPair : 1;  // elements per unit, along positions
  constexpr int64_t kStepC = pairs == PairAxis::channel ? U::kPair : 1;   // ... and along channels
  const int64_t rows = panel_rows<U, pairs>(channels), stride = panel_stride<U, pairs>(length);
  const int64_t second = pairs == PairAxis::position ? view.position_stride : view.channel_stride;
  const bool neighbours =
      U::kPair == 2 && contiguous == (pairs == PairAxis::position ? Contiguous::position : Contiguous::channel);
  const auto at = [&](int64_t c, int64_t g, int64_t p) {
    return view.data + c * view.channel_stride + g * view.line_stride + p * view.position_stride;
  };
  const auto load_whole = [&](const E* first) -> Vector<Unit> {
    if constexpr (U::kPair == 2) {
      if (neighbours) return Loader::load_neighbours(first);
    }
    return Loader::load_whole(first, first + second);
  };
  // The vector of units (c, g, p), (c, g, p) + one unit along the contiguous axis, ...; zeros beyond the end.
  const auto load_part = [&](int64_t c, int64_t g, int64_t p) -> Vector<Unit> {
    if (c >= channels || g >= lines || p >= length) return Vector<Unit>{};
    const E* first = at(c, g, p);
    const int64_t left = contiguous == Contiguous::position ? length - p
                         : contiguous == Contiguous::line   ? lines - g
                                                            : channels - c;
    if constexpr (U::kPair == 2) {
      if (neighbours) return Loader::load_neighbours(first, smaller(left, 2 * kN));
    }
    const bool odd = pairs == PairAxis::position ? p + 1 >= length : c + 1 >= channels;
    return Loader::load_part(first, odd ? nullptr : first + second, smaller(left, kN));
  };
  if (contiguous == Contiguous::position) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t whole = (r + 1) * kStepC <= channels ? length / (kN * kStepP) * kN : 0;
      for (int64_t g = 0; g < lines; ++g) {
        Unit* row = panels + (g * rows + r) * stride;
        const E* first = at(r * kStepC, g, 0);
        for (int64_t u = 0; u < whole; u += kN) store(row + u, load_whole(first + u * kStepP));
        for (int64_t u = whole; u < stride; u += kN) {
          store_part(row + u, load_part(r * kStepC, g, u * kStepP), stride - u);
        }
      }
    }
    return;
  }
  // Blocks of kN units along positions, in memory, by kN units along lines or channels, in the lanes.
  const auto pack_block = [&](Unit* to, int64_t to_stride, int64_t valid, bool whole_lanes, int64_t r, int64_t g,
                              int64_t u) {
    const E* first = at(r * kStepC, g, u * kStepP);
    const int64_t step = kStepP * view.position_stride, whole = whole_lanes ? length / kStepP - u : 0;
    Vector<Unit> block[kN];
    if (whole >= kN) {
#pragma GCC unroll 16
      for (int i = 0; i < kN; ++i) block[i] = load_whole(first + i * step);
      transpose<Unit>(block);
#pragma GCC unroll 16
      for (int i = 0; i < kN; ++i) store(to + i * to_stride, block[i]);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < kN; ++i) {
        block[i] = i < whole ? load_whole(first + i * step) : load_part(r * kStepC, g, (u + i) * kStepP);
      }
      transpose<Unit>(block);
      for (int64_t i = 0; i < valid; ++i) store(to + i * to_stride, block[i]);
    }
  };
  // One by one what would be a block of little but padding.
  const auto pack_units = [&](int64_t r, int64_t g, int64_t u, int64_t end) {
    for (; u < end; ++u) {
      panels[(g * rows + r) * stride + u] = unit_at<U, pairs>(view, channels, length, r * kStepC, g, u * kStepP);
    }
  };
  const int64_t blocks_end = stride / kN * kN;
  if (contiguous == Contiguous::line) {
    const int64_t alone = lines % kN == 1 ? lines - 1 : lines;
    for (int64_t r = 0; r < rows; ++r) {
      if (alone < lines) pack_units(r, alone, 0, stride);
      for (int64_t u = 0; u < blocks_end; u += kN) {
        for (int64_t g = 0; g < alone; g += kN) {
          pack_block(panels + (g * rows + r) * stride + u, rows * stride, smaller(kN, lines - g),
                     g + kN <= lines && (r + 1) * kStepC <= channels, r, g, u);
        }
      }
      for (int64_t g = 0; g < alone && blocks_end < stride; ++g) pack_units(r, g, blocks_end, stride);
    }
    return;
  }
  for (int64_t g = 0; g < lines; ++g) {
    for (int64_t u = 0; u < blocks_end; u += kN) {
      for (int64_t r = 0; r < rows; r += kN) {
        pack_block(panels + (g * rows + r) * stride + u, stride, smaller(kN, rows - r), (r + kN) * kStepC <= channels,
                   r, g, u);
      }
    }
    for (int64_t r = 0; r < rows && blocks_end < stride; ++r) pack_units(r, g, blocks_end, stride);
  }
}

// Adds `channels` channels of a group of lines to what is to be prefetched.
template <class E>
inline void prefetch_lines(Prefetcher& prefetcher, LineView<E> view, int64_t channels, const LineGroup& group,
                           Contiguous contiguous) {
  constexpr int64_t kSize = sizeof(E);
  const int64_t channel = view.channel_stride * kSize, line = view.line_stride * kSize;
  const int64_t position = view.position_stride * kSize;
  if (contiguous == Contiguous::line) {
    prefetcher.add(view.data, channels, group.length, channel, position, group.lines * kSize);
  } else if (contiguous == Contiguous::position) {
    prefetcher.add(view.data, channels, group.lines, channel, line, group.length * kSize);
  } else {
    prefetcher.add(view.data, group.lines, group.length, line, position, channels * kSize);
  }
}

enum class Merge { write, add, weigh };

// Writes panels [line][channels][stride] of sums back: map = sums, map += sums, or map = map * weights + sums with
// weights [line][weight_stride]. Vectors are read to their end, beyond the last row's.
template <Merge merge, class E, class Sum>
GINGHAM_STEP void unpack(const Sum* panels, int64_t stride, const Sum* weights, int64_t weight_stride, LineView<E> view,
                         int64_t channels, int64_t lines, int64_t length, Contiguous contiguous) {
  constexpr int kN = kLanes<Sum>;
  const auto put_whole = [&](E* target, Vector<Sum> sums, Vector<Sum> weight) {
    if constexpr (merge == Merge::add) sums += load_widened(target);
    if constexpr (merge == Merge::weigh) sums += weight * load_widened(target);
    store_narrowed(target, sums);
  };
  const auto put = [&](E* target, Vector<Sum> sums, Vector<Sum> weight, int64_t count) {
    if (count >= kN) return put_whole(target, sums, weight);
    if constexpr (merge == Merge::add) sums += load_widened(target, int(count));
    if constexpr (merge == Merge::weigh) sums += weight * load_widened(target, int(count));
    store_narrowed(target, sums, int(count));
  };
  const auto at = [&](int64_t c, int64_t g, int64_t p) {
    return view.data + c * view.channel_stride + g * view.line_stride + p * view.position_stride;
  };
  if (contiguous == Contiguous::position) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t g = 0; g < lines; ++g) {
        for (int64_t p = 0; p < length; p += kN) {
          Vector<Sum> weight{};
          if constexpr (merge == Merge::weigh) weight = load(weights + g * weight_stride + p);
          put(at(c, g, p), load(panels + (g * channels + c) * stride + p), weight, length - p);
        }
      }
    }
    return;
  }
  // Blocks of kN sums along positions, in the lanes, by kN along lines or channels. weight_at(i) belongs to block[i].
  const auto unpack_block = [&](const Sum* from, int64_t from_stride, int64_t valid, int64_t steps, E* to,
                                const auto& weight_at) {
    Vector<Sum> block[kN];
    if (valid == kN && steps == kN) {
#pragma GCC unroll 16
      for (int i = 0; i < kN; ++i) block[i] = load(from + i * from_stride);
      transpose<Sum>(block);
#pragma GCC unroll 16
      for (int i = 0; i < kN; ++i) put_whole(to + i * view.position_stride, block[i], weight_at(i));
    } else {
      for (int64_t i = 0; i < kN; ++i) block[i] = i < valid ? load(from + i * from_stride) : Vector<Sum>{};
      transpose<Sum>(block);
      for (int64_t i = 0; i < steps; ++i) put(to + i * view.position_stride, block[i], weight_at(i), valid);
    }
  };
  if (contiguous == Contiguous::line) {
    const int64_t alone = lines % kN == 1 ? lines - 1 : lines;  // a line that would be a block of its own
    for (int64_t c = 0; c < channels && alone < lines; ++c) {
      const Sum* row = panels + (alone * channels + c) * stride;
      for (int64_t p = 0; p < length; p += kN) {
        E old[kN];
        const int64_t count = smaller(kN, length - p);
        if constexpr (merge != Merge::write) {
          for (int64_t i = 0; i < count; ++i) old[i] = *at(c, alone, p + i);
        }
        Vector<Sum> weight{};
        if constexpr (merge == Merge::weigh) weight = load(weights + alone * weight_stride + p);
        put_whole(old, load(row + p), weight);
        for (int64_t i = 0; i < count; ++i) *at(c, alone, p + i) = old[i];
      }
    }
    for (int64_t g = 0; g < alone; g += kN) {
      const int64_t valid = smaller(kN, alone - g);
      for (int64_t p = 0; p < length; p += kN) {
        Vector<Sum> weight[kN];
        if constexpr (merge == Merge::weigh) {
          for (int64_t i = 0; i < kN; ++i)
            weight[i] = i < valid ? load(weights + (g + i) * weight_stride + p) : Vector<Sum>{};
          transpose<Sum>(weight);
        }
        for (int64_t c = 0; c < channels; ++c) {
          unpack_block(panels + (g * channels + c) * stride + p, channels * stride, valid, smaller(kN, length - p),
                       at(c, g, p), [&](int64_t i) { return merge == Merge::weigh ? weight[i] : Vector<Sum>{}; });
        }
      }
    }
    return;
  }
  for (int64_t g = 0; g < lines; ++g) {
    for (int64_t p = 0; p < length; p += kN) {
      const auto weight_at = [&](int64_t i) {
        return merge == Merge::weigh ? broadcast(weights[g * weight_stride + p + i]) : Vector<Sum>{};
      };
      for (int64_t c = 0; c < channels; c += kN) {
        unpack_block(panels + (g * channels + c) * stride + p, stride, smaller(kN, channels - c),
                     smaller(kN, length - p), at(c, g, p), weight_at);
      }
    }
  }
}

}  // namespace
