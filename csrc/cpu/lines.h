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

// Loads `count` units whose first elements are neighbours along the contiguous axis.
// `second` is where the second elements of the pairs are, null when they are zeros (the odd end of an axis).
template <class U, class E>
struct UnitLoader {  // units of one element, widened
  static Vector<typename U::Unit> load_units(const E* first, const E*, int64_t count) {
    return count >= kLanes<typename U::Unit> ? load_widened(first) : load_widened(first, int(count));
  }
};
#if defined(__AVX512BF16__)
template <>
struct UnitLoader<BFloat16Pair, BFloat16> {
  static __m256i load_shorts(const BFloat16* p, int64_t count) {
    return _mm256_maskz_loadu_epi16(count >= 16 ? 0xffff : __mmask16((1u << count) - 1), p);
  }
  static Vector<uint32_t> load_units(const BFloat16* first, const BFloat16* second, int64_t count) {
    const __m512i low = _mm512_cvtepu16_epi32(load_shorts(first, count));
    if (!second) return (Vector<uint32_t>)low;
    const __m512i high = _mm512_cvtepu16_epi32(load_shorts(second, count));
    return (Vector<uint32_t>)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
  // Pairs along the contiguous axis itself: `elements` neighbours make elements / 2 units, the odd one paired with
  // zero.
  static Vector<uint32_t> load_neighbours(const BFloat16* first, int64_t elements) {
    return (Vector<uint32_t>)_mm512_maskz_loadu_epi16(elements >= 32 ? 0xffffffffu : __mmask32((1u << elements) - 1),
                                                      first);
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

// Leading dimension of a panel whose positions are `length` long. A panel of pairs along positions is a left operand,
// which is read unit by unit: it needs no padding where the product needs none (97 positions stay 97).
template <class U, PairAxis pairs>
inline int64_t panel_stride(int64_t length) {
  const int64_t units = pairs == PairAxis::position ? (length + U::kPair - 1) / U::kPair : length;
  constexpr int kN = kLanes<typename U::Sum>;
  const bool unpadded = pairs == PairAxis::position && has_single_columns<kN>(units) && !U::kTiles;
  return unpadded ? units : round_up(units, kN);
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

// Packs channels [0, channels) of the view into panels [line][panel_rows][panel_stride]; the padding reads as zero.
template <class U, PairAxis pairs, class E>
inline void pack(typename U::Unit* panels, LineView<const E> view, int64_t channels, int64_t lines, int64_t length,
                 Contiguous contiguous) {
  using Unit = typename U::Unit;
  constexpr int kN = kLanes<Unit>;
  constexpr int64_t kStepP = pairs == PairAxis::position ? U::kPair : 1;  // elements per unit, along positions
  constexpr int64_t kStepC = pairs == PairAxis::channel ? U::kPair : 1;   // ... and along channels
  const int64_t rows = panel_rows<U, pairs>(channels), stride = panel_stride<U, pairs>(length);
  const auto at = [&](int64_t c, int64_t g, int64_t p) {
    return view.data + c * view.channel_stride + g * view.line_stride + p * view.position_stride;
  };
  // The vector of units (c, g, p), (c, g, p) + one unit along the contiguous axis, ...; zeros beyond the end.
  const auto load_at = [&](int64_t c, int64_t g, int64_t p) -> Vector<Unit> {
    if (c >= channels || g >= lines || p >= length) return Vector<Unit>{};
    const E* first = at(c, g, p);
    if constexpr (U::kPair == 2) {
      using Loader = UnitLoader<U, E>;
      if (pairs == PairAxis::position) {
        if (contiguous == Contiguous::position) return Loader::load_neighbours(first, length - p);
        const E* second = p + 1 < length ? first + view.position_stride : nullptr;
        return Loader::load_units(first, second, contiguous == Contiguous::line ? lines - g : channels - c);
      }
      if (contiguous == Contiguous::channel) return Loader::load_neighbours(first, channels - c);
      const E* second = c + 1 < channels ? first + view.channel_stride : nullptr;
      return Loader::load_units(first, second, contiguous == Contiguous::line ? lines - g : length - p);
    } else {
      const int64_t count = contiguous == Contiguous::position ? length - p
                            : contiguous == Contiguous::line   ? lines - g
                                                               : channels - c;
      return UnitLoader<U, E>::load_units(first, nullptr, count);
    }
  };
  if (contiguous == Contiguous::position) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t g = 0; g < lines; ++g) {
        for (int64_t u = 0; u < stride; u += kN)
          store_part(panels + (g * rows + r) * stride + u, load_at(r * kStepC, g, u * kStepP), stride - u);
      }
    }
    return;
  }
  Vector<Unit> block[kN];
  if (contiguous == Contiguous::line) {
    const int64_t alone = lines % kN == 1 ? lines - 1 : lines;  // a line that would be a block of its own
    for (int64_t r = 0; r < rows; ++r) {
      if (alone < lines) {
        Unit* row = panels + (alone * rows + r) * stride;
        for (int64_t u = 0; u < stride; ++u)
          row[u] = unit_at<U, pairs>(view, channels, length, r * kStepC, alone, u * kStepP);
      }
      for (int64_t u = 0; u < stride; u += kN) {
        for (int64_t g = 0; g < alone; g += kN) {
          for (int i = 0; i < kN; ++i) block[i] = load_at(r * kStepC, g, (u + i) * kStepP);
          const int64_t valid = smaller(kN, lines - g);
          transpose<Unit>(block);
          for (int64_t i = 0; i < valid; ++i) {
            store_part(panels + ((g + i) * rows + r) * stride + u, block[i], stride - u);
          }
        }
      }
    }
    return;
  }
  for (int64_t g = 0; g < lines; ++g) {
    for (int64_t u = 0; u < stride; u += kN) {
      for (int64_t r = 0; r < rows; r += kN) {
        for (int i = 0; i < kN; ++i) block[i] = load_at(r * kStepC, g, (u + i) * kStepP);
        transpose<Unit>(block);
        const int64_t valid = smaller(kN, rows - r);
        for (int64_t i = 0; i < valid; ++i) {
          store_part(panels + (g * rows + r + i) * stride + u, block[i], stride - u);
        }
      }
    }
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

// Writes panels [line][channels][padded length] of sums back: map = sums, map += sums, or map = map * weights + sums
// with weights [line][weight_stride].
template <Merge merge, class E, class Sum>
inline void unpack(const Sum* panels, const Sum* weights, int64_t weight_stride, LineView<E> view, int64_t channels,
                   int64_t lines, int64_t length, Contiguous contiguous) {
  constexpr int kN = kLanes<Sum>;
  const int64_t stride = round_up(length, kN);
  const auto put = [&](E* target, Vector<Sum> sums, Vector<Sum> weight, int64_t count) {
    if (count >= kN) {
      if constexpr (merge == Merge::add) sums += load_widened(target);
      if constexpr (merge == Merge::weigh) sums += weight * load_widened(target);
      store_narrowed(target, sums);
    } else {
      if constexpr (merge == Merge::add) sums += load_widened(target, int(count));
      if constexpr (merge == Merge::weigh) sums += weight * load_widened(target, int(count));
      store_narrowed(target, sums, int(count));
    }
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
  Vector<Sum> block[kN];
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
        put(old, load(row + p), weight, kN);
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
        const int64_t steps = smaller(kN, length - p);
        for (int64_t c = 0; c < channels; ++c) {
          for (int64_t i = 0; i < kN; ++i) {
            block[i] = i < valid ? load(panels + ((g + i) * channels + c) * stride + p) : Vector<Sum>{};
          }
          transpose<Sum>(block);
          for (int64_t i = 0; i < steps; ++i) put(at(c, g, p + i), block[i], weight[i], valid);
        }
      }
    }
    return;
  }
  for (int64_t g = 0; g < lines; ++g) {
    for (int64_t p = 0; p < length; p += kN) {
      const int64_t steps = smaller(kN, length - p);
      for (int64_t c = 0; c < channels; c += kN) {
        const int64_t valid = smaller(kN, channels - c);
        for (int64_t i = 0; i < kN; ++i) {
          block[i] = i < valid ? load(panels + (g * channels + c + i) * stride + p) : Vector<Sum>{};
        }
        transpose<Sum>(block);
        for (int64_t i = 0; i < steps; ++i) {
          Vector<Sum> weight{};
          if constexpr (merge == Merge::weigh) weight += weights[g * weight_stride + p + i];
          put(at(c, g, p + i), block[i], weight, valid);
        }
      }
    }
  }
}

}  // namespace
