// Criss-cross attention on the CPU, forward and backward; compiled once per instruction set.
//
// A map is a set of lines: its rows, its columns and, in 3-D, the frames behind each pixel. One pass per axis works on
// groups of neighbouring lines, one group per task:
//   pack      some channels of the group into panels [line][channel][position]: any layout and any storage type becomes
//             the same operands, and memory is read in long stretches whichever axis is contiguous;
//   logits    key x query products give logits^T[j][i] per line, lanes over the queries i, so softmax is lane-wise;
//   softmax   in place; the first pass (rows, which hold the pixel itself) writes normalised results and the
//             log-sum-exp lse; each later pass (diagonal masked) merges: output = output * exp(lse_old - lse) + its own
//             part. lse is a double, used as two Sums: next to a large logit a float has no room for log(total);
//   output    value x probability products, some channels at a time, unpacked into the output.
// Backward recomputes the probabilities from lse, with lanes over the keys. With delta = sum_c output * grad_output,
//   dlogits = probability * (value . grad_output - delta) * scale
// gives grad_key, its transpose grad_query, and the probabilities grad_value; grad_output is read once for both of its
// products. "p lies on u's cross" is symmetric, so all three are gathers: no atomics, and the order of every sum is
// fixed by the shape alone.
//
// What is held: the logits of a group (L x L sums a line, 16 lines where lanes run across lines), in backward units of
// the probabilities beside them, and panels of a few channels. A group's keys or queries are taken in parts where that
// would exceed a ninth of one image's attention weights (Kernel::passes_of): 0.82 MB a thread at 97 x 97 in float32,
// 0.4 MB in 16 bits, 3 MB for large maps. Nothing grows with the map but lse and delta.
// What bounds it: arithmetic first. Forward takes 2 (Ck + Cv) (H + W) operations a position, backward
// 2 (3 Ck + 2 Cv) (H + W). As bench/profile_cpu.sh saw it on Zen 5 at 97 x 97: multiply_block 47 to 63 % of the time,
// pack and unpack together 24 to 41 % (most in 16 bits, where the products take half as long), softmax 2 to 5 %, a lone
// 97th column 3 to 4 %, delta 3 to 7 % of backward. Channels-first maps cost more than channels-last ones, because 16
// neighbouring columns lie on two cache lines in most rows, and each is fetched twice; and 16 lines leave scratch for
// short sums only.
#include "gingham/criss_cross_attention.h"

#include <cmath>
#include <type_traits>

#include "dispatch.h"
#include "elements.h"
#include "lines.h"
#include "panel_gemm.h"
#include "parallel.h"
#include "passes.h"
#include "simd.h"

namespace {

using gingham::CrissCrossBackward;
using gingham::CrissCrossForward;

// ---------------------------------------------------------------------------------------------- steps of a pass

template <class E>
LineView<E> from_channel(LineView<E> view, int64_t channel) {
  view.data += channel * view.channel_stride;
  return view;
}

// sheet[line][d][a] = sum over channels of left[c, d] * right[c, a], d in the part `down` of the lines, a in `across`.
template <class U, class E>
void correlate(LineView<const E> left, const LineGroup& down, LineView<const E> right, const LineGroup& across,
               int64_t channels, Contiguous contiguous, const Scratch<U>& scratch, typename U::Sum* sheet,
               int64_t sheet_size) {
  using Unit = typename U::Unit;
  const int64_t lines = down.lines, stride = scratch.across_stride;
  const int64_t left_stride = panel_stride<U, PairAxis::channel>(down.length);
  const int64_t right_stride = panel_stride<U, PairAxis::channel>(across.length);
  const int64_t chunk = scratch.chunk(lines * scratch.units_of_two(down.length, across.length), channels);
  Unit* left_panels = scratch.pool;
  Unit* right_panels = left_panels + lines * panel_rows<U, PairAxis::channel>(chunk) * left_stride;
  if (channels == 0) __builtin_memset(sheet, 0, size_t(lines * sheet_size) * sizeof(*sheet));
  for (int64_t c = 0; c < channels; c += chunk) {
    const int64_t count = smaller(chunk, channels - c), rows = panel_rows<U, PairAxis::channel>(count);
    pack<U, PairAxis::channel>(left_panels, from_channel(left, c), count, lines, down.length, contiguous);
    pack<U, PairAxis::channel>(right_panels, from_channel(right, c), count, lines, across.length, contiguous);
    const int64_t next = c + count, next_count = smaller(chunk, channels - next);
    Prefetcher prefetcher;
    prefetch_lines(prefetcher, from_channel(left, next), next_count, down, contiguous);
    prefetch_lines(prefetcher, from_channel(right, next), next_count, across, contiguous);
    prefetcher.spread(lines * Stripes<U>(across.length).prefetches(down.length, rows));
    for (int64_t g = 0; g < lines; ++g) {
      multiply<U>(down.length, across.length, rows, {left_panels + g * rows * left_stride, 1, left_stride},
                  right_panels + g * rows * right_stride, right_stride, nullptr, 0, sheet + g * sheet_size, stride,
                  c > 0, scratch.product, prefetcher);
    }
  }
}

// The right operand of a product that sums over `summed` positions: units [line][position / pair][stride].
template <class U>
struct Operand {
  const typename U::Unit* data;
  int64_t line_stride, stride;
};

template <class U>
void gather_single_columns(const Operand<U>& operand, const LineGroup& summed, int64_t length,
                           const Scratch<U>& scratch) {
  for (int64_t g = 0; g < summed.lines; ++g) {
    gather_single_columns<U>(
        operand.data + g * operand.line_stride, operand.stride, length, summed_units<U>(summed.length),
        scratch.single_columns + g * scratch.single_count * scratch.single_stride, scratch.single_stride);
  }
}

// panels[line][c][n] = sum over positions k of source[line][c][k] * operand[line][k][n], both panels of `channels`; the
// single columns of the operand were gathered.
template <class U>
void multiply_by_operand(const typename U::Unit* source, const LineGroup& summed, const Operand<U>& operand,
                         typename U::Sum* panels, int64_t length, int64_t channels, const Scratch<U>& scratch,
                         Prefetcher& prefetcher) {
  const int64_t source_stride = panel_stride<U, PairAxis::position>(summed.length);
  const int64_t sum_stride = row_stride<U>(length), steps = summed_units<U>(summed.length);
  prefetcher.spread(summed.lines * Stripes<U>(length).prefetches(channels, steps));
  for (int64_t g = 0; g < summed.lines; ++g) {
    multiply<U>(channels, length, steps, {source + g * channels * source_stride, source_stride, 1},
                operand.data + g * operand.line_stride, operand.stride,
                scratch.single_columns + g * scratch.single_count * scratch.single_stride, scratch.single_stride,
                panels + g * channels * sum_stride, sum_stride, false, scratch.product, prefetcher);
  }
}

template <class E, class Sum>
void merge_panels(Merge merge, const Sum* panels, int64_t panel_stride, const Sum* weights, int64_t weight_stride,
                  LineView<E> target, const LineGroup& part, int64_t channels, Contiguous contiguous) {
  const auto with = [&](auto how) {
    unpack<decltype(how)::value>(panels, panel_stride, weights, weight_stride, target, channels, part.lines,
                                 part.length, contiguous);
  };
  if (merge == Merge::write) with(std::integral_constant<Merge, Merge::write>());
  if (merge == Merge::add) with(std::integral_constant<Merge, Merge::add>());
  if (merge == Merge::weigh) with(std::integral_constant<Merge, Merge::weigh>());
}

// target[c, n] (merged) = sum over positions k of source[c, k] * operand[line][k][n], k in one part of the lines and n
// in another.
template <class U, class E>
void aggregate(Merge merge, LineView<const E> source, const LineGroup& source_part, const Operand<U>& operand,
               LineView<E> target, const LineGroup& target_part, const typename U::Sum* weights, int64_t channels,
               Contiguous contiguous, const Scratch<U>& scratch) {
  using Unit = typename U::Unit;
  using Sum = typename U::Sum;
  const int64_t lines = source_part.lines;
  const int64_t source_stride = panel_stride<U, PairAxis::position>(source_part.length);
  const int64_t target_stride = row_stride<U>(target_part.length);
  const int64_t chunk =
      scratch.chunk(lines * scratch.units_of_product(source_part.length, target_part.length), channels);
  Unit* source_panels = scratch.pool;
  Sum* target_panels = reinterpret_cast<Sum*>(source_panels + lines * chunk * source_stride);
  gather_single_columns(operand, source_part, target_part.length, scratch);
  for (int64_t c = 0; c < channels; c += chunk) {
    const int64_t count = smaller(chunk, channels - c);
    pack<U, PairAxis::position>(source_panels, from_channel(source, c), count, lines, source_part.length, contiguous);
    const int64_t next = c + count, next_count = smaller(chunk, channels - next);
    Prefetcher prefetcher;
    prefetch_lines(prefetcher, from_channel(target, c), count, target_part, contiguous);
    prefetch_lines(prefetcher, from_channel(source, next), next_count, source_part, contiguous);
    multiply_by_operand<U>(source_panels, source_part, operand, target_panels, target_part.length, count, scratch,
                           prefetcher);
    merge_panels(merge, target_panels, target_stride, weights, scratch.value_stride, from_channel(target, c),
                 target_part, count, contiguous);
  }
}

// Turns rows [k][n] of sums into rows [k / pair][n] of units, for use as the right operand. `units` may be the same
// memory as `sums`: a row of units is written after the rows it is made of were read.
template <class U>
GINGHAM_STEP void to_units(const typename U::Sum* sums, typename U::Unit* units, int64_t length, int64_t stride) {
#if defined(__AVX512BF16__)
  if constexpr (U::kPair == 2) {
    for (int64_t k = 0; k < round_up(length, 2); k += 2) {
      for (int64_t n = 0; n < stride; n += kLanes<float>) {
        const Vector<float> high = k + 1 < length ? load(sums + (k + 1) * stride + n) : Vector<float>{};
        store_part(units + k / 2 * stride + n, pair_bits(load(sums + k * stride + n), high), stride - n);
      }
    }
    for (int64_t k = (length + 1) / 2 * stride; k < summed_units<U>(length) * stride; ++k) units[k] = 0;
    return;
  }
#endif
  if constexpr (U::kPair == 1) {
    if (units != sums) __builtin_memcpy(units, sums, size_t(length * stride) * sizeof(*units));
  }
}

// The same of the transposed sheet: sums [n][k] with `stride` become units [k / pair][n] with `unit_stride`.
template <class U>
GINGHAM_STEP void transpose_to_units(const typename U::Sum* sums, int64_t length, int64_t stride,
                                     typename U::Unit* units, int64_t unit_length, int64_t unit_stride) {
  using Sum = typename U::Sum;
  constexpr int kN = kLanes<Sum>;
  for (int64_t n = 0; n < unit_length; n += kN) {
    for (int64_t k = 0; k < length; k += kN) {
      Vector<Sum> block[kN];
      for (int i = 0; i < kN; ++i) block[i] = n + i < unit_length ? load(sums + (n + i) * stride + k) : Vector<Sum>{};
      transpose<Sum>(block);
      const int64_t valid = smaller(kN, length - k);
      for (int64_t i = 0; i < valid; i += U::kPair) {
        typename U::Unit* to = units + (k + i) / U::kPair * unit_stride + n;
#if defined(__AVX512BF16__)
        if constexpr (U::kPair == 2) {
          store_part(to, pair_bits(block[i], i + 1 < valid ? block[i + 1] : Vector<Sum>{}), unit_stride - n);
        }
#endif
        if constexpr (U::kPair == 1) store_part(to, block[i], unit_stride - n);
      }
    }
  }
  const int64_t written = (length + U::kPair - 1) / U::kPair;
  for (int64_t k = written * unit_stride; k < summed_units<U>(length) * unit_stride; ++k) units[k] = 0;
}

// Prepares the logits of a line for the factor `scale`, which softmax applies: the pixel itself belongs to the row pass
// only, so elsewhere the entries where both positions are the same, `diagonal` places to the right of the first row's
// own, become what scales to minus infinity. Returns the factor to apply: not 0, which would make NaN of that.
template <class Sum>
Sum mask_logits(Sum* sheet, Sum scale, bool mask, int64_t diagonal, int64_t down, int64_t across, int64_t stride) {
  if (scale == 0) {
    for (int64_t i = 0; i < down * stride; ++i) sheet[i] *= 0;  // what is not finite becomes NaN
    scale = 1;
  }
  const Sum masked = scale > 0 ? -HUGE_VAL : HUGE_VAL;
  for (int64_t d = larger(0, -diagonal); mask && d < smaller(down, across - diagonal); ++d) {
    sheet[d * stride + d + diagonal] = masked;
  }
  return scale;
}

// A contiguous [batch, frames, rows, columns] array of one number per position, seen as lines.
template <class Sum>
LineView<Sum> position_values(Sum* data, const CrissCrossShape& shape, Axis axis, const LineGroup& group) {
  const int64_t row = shape.columns, frame = shape.rows * row, batch = shape.frames * frame;
  return view_lines<Sum>(MapView{const_cast<void*>(static_cast<const void*>(data)), batch, 0, frame, row, 1}, axis,
                         group);
}

// Those of one line, with zeros up to the end of the last vector.
template <class Sum>
void gather(LineView<const Sum> values, int64_t line, int64_t length, Sum* to) {
  for (int64_t p = 0; p < round_up(length, kLanes<Sum>); ++p) {
    to[p] = p < length ? values.data[line * values.line_stride + p * values.position_stride] : Sum(0);
  }
}

// The same of lse, as the sum of two numbers.
template <class Sum>
void gather_lse(LineView<const double> lse, int64_t line, int64_t length, Sum* high, Sum* low) {
  for (int64_t p = 0; p < round_up(length, kLanes<Sum>); ++p) {
    const double x = p < length ? lse.data[line * lse.line_stride + p * lse.position_stride] : 0;
    high[p] = Sum(x);
    low[p] = std::isfinite(Sum(x)) ? Sum(x - double(Sum(x))) : Sum(0);
  }
}

// ---------------------------------------------------------------------------------------------- forward

// Which part of the joint softmax a pass is.
struct Turn {
  bool first;  // nothing to merge with yet
  bool last;
};

// logits^T[j][i] of one line -> probabilities^T, scaled so that they sum to one together with what the passes before
// contributed, whose log-sum-exp is high + low: `weights` receives the factor by which the output so far shrinks, and
// lse[i * lse_stride] the joint log-sum-exp. A line may have none but infinitely small logits as long as the last pass
// has seen others: a cross without any is NaN.
template <class Sum>
GINGHAM_STEP void softmax_line(Sum* logits, const Sum* high, const Sum* low, Sum* weights, double* lse,
                               int64_t lse_stride, Sum scale, Turn turn, int64_t keys, int64_t queries,
                               int64_t stride) {
  constexpr int kN = kLanes<Sum>;
  for (int64_t i = 0; i < queries; i += kN) {
    const int64_t room = stride - i;
    Vector<Sum> top = load(logits + i) * scale;
    for (int64_t j = 0; j < keys; ++j) {
      const Vector<Sum> logit = load(logits + j * stride + i) * scale;
      store_part(logits + j * stride + i, logit, room);
      top = maximum<Sum>(logit, top);
    }
    if (!turn.first) top = maximum<Sum>(top, load(high + i));
    const Vector<Sum> base = (top == Sum(-HUGE_VAL)) ? Vector<Sum>{} : top;
    Vector<Sum> total{};
    for (int64_t j = 0; j < keys; ++j) {
      const Vector<Sum> p = exponential(load(logits + j * stride + i) - base);
      store_part(logits + j * stride + i, p, room);
      total += p;
    }
    Vector<Sum> before{};
    if (!turn.first) {
      before = exponential((load(high + i) - base) + load(low + i));
      total += before;
    }
    Vector<Sum> factor = Sum(1) / total;
    if (!turn.last) factor = (total == Sum(0)) ? Vector<Sum>{} : factor;
    for (int64_t j = 0; j < keys; ++j) {
      store_part(logits + j * stride + i, load(logits + j * stride + i) * factor, room);
    }
    store(weights + i, before * factor);
    for (int64_t lane = 0; lane < smaller(kN, queries - i); ++lane) {
      lse[(i + lane) * lse_stride] = double(base[lane]) + double(std::log(total[lane]));
    }
  }
}

// The parts of the lines that a sheet is about, and whether it holds positions beside themselves, `diagonal` places to
// the right, that the row pass has dealt with.
struct Parts {
  LineGroup across, down;
  bool mask;
  int64_t diagonal;

  Parts(const Pass& pass, const LineGroup& group, int64_t across_index, int64_t down_index)
      : across(pass.part(group, pass.across, across_index)),
        down(pass.part(group, pass.down, down_index)),
        mask(pass.axis != Axis::row),
        diagonal(pass.down.begin(down_index) - pass.across.begin(across_index)) {}
};

// Queries run across the sheet, keys down.
template <class U, class E>
void forward_part(const CrissCrossForward& call, const Pass& pass, const Parts& parts, Turn turn, Contiguous contiguous,
                  const Scratch<U>& scratch) {
  using Sum = typename U::Sum;
  using Unit = typename U::Unit;
  const LineGroup &queries = parts.across, &keys = parts.down;
  const int64_t stride = scratch.across_stride, size = scratch.sheet_sizes[0];
  Sum *logits = scratch.sheets[0], *lse_high = scratch.values[0], *lse_low = scratch.values[1];

  correlate<U, E>(view_lines<const E>(call.key, pass.axis, keys), keys,
                  view_lines<const E>(call.query, pass.axis, queries), queries, call.shape.key_channels, contiguous,
                  scratch, logits, size);

  const LineView<double> lse = position_values(call.lse, call.shape, pass.axis, queries);
  const LineView<const double> lse_before{lse.data, 0, lse.line_stride, lse.position_stride};
  for (int64_t g = 0; g < queries.lines; ++g) {
    Sum* sheet = logits + g * size;
    if (!turn.first) gather_lse<Sum>(lse_before, g, queries.length, lse_high, lse_low);
    const Sum scale =
        mask_logits(sheet, Sum(call.scale), parts.mask, parts.diagonal, keys.length, queries.length, stride);
    softmax_line(sheet, lse_high, lse_low, scratch.weights + g * scratch.value_stride, lse.data + g * lse.line_stride,
                 lse.position_stride, scale, turn, keys.length, queries.length, stride);
    to_units<U>(sheet, reinterpret_cast<Unit*>(sheet), keys.length, stride);
  }

  aggregate<U, E>(turn.first ? Merge::write : Merge::weigh, view_lines<const E>(call.value, pass.axis, keys), keys,
                  {reinterpret_cast<const Unit*>(logits), size, stride}, view_lines<E>(call.output, pass.axis, queries),
                  queries, scratch.weights, call.shape.value_channels, contiguous, scratch);
}

template <class U, class E>
void forward_group(const CrissCrossForward& call, const Pass& pass, bool channels_are_first, int64_t index,
                   char* memory) {
  [[maybe_unused]] const std::conditional_t<U::kTiles, TileScope, int> tiles{};
  Scratch<U> scratch;
  scratch.lay_out(pass, false, memory);
  const LineGroup group = pass.group(call.shape, index);
  const Contiguous contiguous = contiguous_axis(channels_are_first, pass.axis);
  for (int64_t across = 0; across < pass.across.count; ++across) {
    for (int64_t down = 0; down < pass.down.count; ++down) {
      const Turn turn{pass.axis == Axis::row && down == 0, pass.is_last && down + 1 == pass.down.count};
      forward_part<U, E>(call, pass, Parts(pass, group, across, down), turn, contiguous, scratch);
    }
  }
}

// Maps so small that packing them would take longer than the sums: position by position, as the definition reads.
template <class E>
struct TinyForward {
  using Sum = Accumulator<E>;
  static constexpr int64_t kMostOperations = 4096;
  static constexpr int kMostCross = 64;  // its square is at most kMostOperations

  // Asks for one image: results must not depend on how many there are.
  static bool takes(const CrissCrossShape& shape) {
    const int64_t channels = larger(1, shape.key_channels + shape.value_channels);
    return weights_of_an_image(shape) * channels <= kMostOperations;
  }

  static void image(const CrissCrossForward& call, int64_t batch) {
    const CrissCrossShape& shape = call.shape;
    double* lse = call.lse + batch * shape.frames * shape.rows * shape.columns;
    for (int64_t t = 0; t < shape.frames; ++t) {
      for (int64_t y = 0; y < shape.rows; ++y) {
        for (int64_t x = 0; x < shape.columns; ++x) position(call, batch, t, y, x, lse++);
      }
    }
  }

 private:
  static const E* at(const MapView& map, int64_t batch, int64_t t, int64_t y, int64_t x) {
    return static_cast<const E*>(map.data) + batch * map.batch_stride + t * map.frame_stride + y * map.row_stride +
           x * map.column_stride;
  }

  static void position(const CrissCrossForward& call, int64_t batch, int64_t t, int64_t y, int64_t x, double* lse) {
    constexpr int kN = kLanes<Sum>;
    const CrissCrossShape& shape = call.shape;
    const E *query = at(call.query, batch, t, y, x), *values[kMostCross];
    Sum weights[kMostCross + kN], top = -HUGE_VAL;
    int count = 0;
    const auto attend = [&](int64_t t2, int64_t y2, int64_t x2) {
      const E* key = at(call.key, batch, t2, y2, x2);
      Sum logit = 0;
      for (int64_t c = 0; c < shape.key_channels; ++c) {
        logit += to_float(query[c * call.query.channel_stride]) * to_float(key[c * call.key.channel_stride]);
      }
      logit *= Sum(call.scale);
      top = logit > top ? logit : top;
      values[count] = at(call.value, batch, t2, y2, x2);
      weights[count++] = logit;
    };
    for (int64_t other = 0; other < shape.columns; ++other) attend(t, y, other);
    for (int64_t other = 0; other < shape.rows; ++other) {
      if (other != y) attend(t, other, x);
    }
    for (int64_t other = 0; other < shape.frames; ++other) {
      if (other != t) attend(other, y, x);
    }

    const Sum base = top == Sum(-HUGE_VAL) ? Sum(0) : top;
    Vector<Sum> totals{};
    store(weights + count, broadcast(Sum(-HUGE_VAL)));
    for (int i = 0; i < count; i += kN) {
      const Vector<Sum> p = exponential(load(weights + i) - base);
      store(weights + i, p);
      totals += p;
    }
    const Sum total = sum_of_lanes(totals), factor = Sum(1) / total;
    *lse = double(base) + double(std::log(total));

    E* output = const_cast<E*>(at(call.output, batch, t, y, x));
    for (int64_t begin = 0; begin < shape.value_channels; begin += kN) {
      const int64_t channels = smaller(kN, shape.value_channels - begin);
      Sum sums[kN] = {};
      for (int i = 0; i < count; ++i) {
        const E* value = values[i] + begin * call.value.channel_stride;
        for (int64_t c = 0; c < channels; ++c) {
          sums[c] += weights[i] * factor * to_float(value[c * call.value.channel_stride]);
        }
      }
      E narrowed[kN];
      store_narrowed(narrowed, load(sums));
      for (int64_t c = 0; c < channels; ++c) output[(begin + c) * call.output.channel_stride] = narrowed[c];
    }
  }
};

// ---------------------------------------------------------------------------------------------- backward

// delta[u] = sum_c output[c, u] * grad_output[c, u], one row of positions at a time.
template <class E, class Sum>
GINGHAM_STEP void delta_row(const CrissCrossBackward& call, bool channels_are_first, int64_t index, Sum* delta) {
  constexpr int kN = kLanes<Sum>;
  const CrissCrossShape& shape = call.shape;
  const int64_t row = index % shape.rows, frame = index / shape.rows % shape.frames;
  const LineGroup line{index / shape.rows / shape.frames, frame, row, 0, 1, shape.columns};
  const auto output = view_lines<const E>(call.output, Axis::row, line);
  const auto grad = view_lines<const E>(call.grad_output, Axis::row, line);
  delta += index * shape.columns;
  if (channels_are_first) {
    for (int64_t x = 0; x < shape.columns; x += kN) {
      const int count = int(smaller(kN, shape.columns - x));
      Vector<Sum> sum{};
      for (int64_t c = 0; c < shape.value_channels; ++c) {
        const E *o = output.data + c * output.channel_stride + x, *g = grad.data + c * grad.channel_stride + x;
        sum += count == kN ? load_widened(o) * load_widened(g) : load_widened(o, count) * load_widened(g, count);
      }
      store_narrowed(delta + x, sum, count);
    }
    return;
  }
  for (int64_t x = 0; x < shape.columns; ++x) {
    const E *o = output.data + x * output.position_stride, *g = grad.data + x * grad.position_stride;
    Vector<Sum> sum{};
    int64_t c = 0;
    for (; c + kN <= shape.value_channels; c += kN) sum += load_widened(o + c) * load_widened(g + c);
    if (c < shape.value_channels) {
      const int count = int(shape.value_channels - c);
      sum += load_widened(o + c, count) * load_widened(g + c, count);
    }
    delta[x] = sum_of_lanes(sum);
  }
}

// logits[i][j] of a line -> probabilities[i][j] as units; the logits are used up.
template <class U>
GINGHAM_STEP void probabilities_line(typename U::Sum* logits, typename U::Unit* probabilities,
                                     const typename U::Sum* lse_high, const typename U::Sum* lse_low,
                                     typename U::Sum scale, int64_t queries, int64_t keys, int64_t stride) {
  using Sum = typename U::Sum;
  Sum* to = U::kPair == 1 ? reinterpret_cast<Sum*>(probabilities) : logits;
  for (int64_t i = 0; i < queries; ++i) {
    for (int64_t j = 0; j < keys; j += kLanes<Sum>) {
      const Vector<Sum> logit = load(logits + i * stride + j) * scale;
      store_part(to + i * stride + j, exponential((logit - lse_high[i]) - lse_low[i]), stride - j);
    }
  }
  to_units<U>(to, probabilities, queries, stride);
}

// products[i][j] = value_j . grad_output_i -> dlogits[i][j], in place.
template <class U>
GINGHAM_STEP void dlogits_line(typename U::Sum* products, const typename U::Unit* probabilities,
                               const typename U::Sum* delta, typename U::Sum scale, int64_t queries, int64_t keys,
                               int64_t stride) {
  using Sum = typename U::Sum;
  for (int64_t i = 0; i < queries; ++i) {
    for (int64_t j = 0; j < keys; j += kLanes<Sum>) {
      const Vector<Sum> p = sum_of_unit<U>(load(probabilities + i / U::kPair * stride + j), i % U::kPair);
      Sum* at = products + i * stride + j;
      store_part(at, p * (load(at) - delta[i]) * scale, stride - j);
    }
  }
}

// Both uses of grad_output, some channels at a time: products[i][j] = sum_c grad_output[c, i] * value[c, j], and
// grad_value[c, j] (merged) = sum_i grad_output[c, i] * probabilities[i][j].
template <class U, class E>
void value_gradients(LineView<const E> value, LineView<const E> grad_output, const Parts& parts,
                     const Operand<U>& probabilities, typename U::Sum* products, int64_t products_size, Merge merge,
                     LineView<E> grad_value, int64_t channels, Contiguous contiguous, const Scratch<U>& scratch) {
  using Unit = typename U::Unit;
  using Sum = typename U::Sum;
  // Units of one element are the same along either axis: then grad_output is packed once.
  constexpr PairAxis kGradPairs = U::kPair == 1 ? PairAxis::position : PairAxis::channel;
  const LineGroup &keys = parts.across, &queries = parts.down;
  const int64_t lines = queries.lines;
  const int64_t value_stride = panel_stride<U, PairAxis::channel>(keys.length);
  const int64_t grad_stride = panel_stride<U, kGradPairs>(queries.length);
  // Each memory serves twice.
  const int64_t key_units = scratch.units_of_keys(keys.length), query_units = scratch.units_of_queries(queries.length);
  const int64_t chunk = scratch.chunk(lines * (key_units + query_units), channels);
  Unit* value_panels = scratch.pool;
  Unit* grad_panels = value_panels + lines * chunk * key_units;
  Sum* sums = reinterpret_cast<Sum*>(value_panels);
  if (channels == 0) __builtin_memset(products, 0, size_t(lines * products_size) * sizeof(*products));
  gather_single_columns(probabilities, queries, keys.length, scratch);
  for (int64_t c = 0; c < channels; c += chunk) {
    const int64_t count = smaller(chunk, channels - c), rows = panel_rows<U, kGradPairs>(count);
    const int64_t value_rows = panel_rows<U, PairAxis::channel>(count);
    pack<U, PairAxis::channel>(value_panels, from_channel(value, c), count, lines, keys.length, contiguous);
    pack<U, kGradPairs>(grad_panels, from_channel(grad_output, c), count, lines, queries.length, contiguous);
    Prefetcher target;
    prefetch_lines(target, from_channel(grad_value, c), count, keys, contiguous);
    target.spread(lines * Stripes<U>(keys.length).prefetches(queries.length, value_rows));
    for (int64_t g = 0; g < lines; ++g) {
      multiply<U>(queries.length, keys.length, value_rows, {grad_panels + g * rows * grad_stride, 1, grad_stride},
                  value_panels + g * value_rows * value_stride, value_stride, nullptr, 0, products + g * products_size,
                  scratch.across_stride, c > 0, scratch.product, target);
    }
    if constexpr (kGradPairs != PairAxis::position) {
      pack<U, PairAxis::position>(grad_panels, from_channel(grad_output, c), count, lines, queries.length, contiguous);
    }
    const int64_t next = c + count, next_count = smaller(chunk, channels - next);
    Prefetcher prefetcher;
    prefetch_lines(prefetcher, from_channel(value, next), next_count, keys, contiguous);
    prefetch_lines(prefetcher, from_channel(grad_output, next), next_count, queries, contiguous);
    multiply_by_operand<U>(grad_panels, queries, probabilities, sums, keys.length, count, scratch, prefetcher);
    merge_panels<E, Sum>(merge, sums, row_stride<U>(keys.length), nullptr, 0, from_channel(grad_value, c), keys, count,
                         contiguous);
  }
}

// Keys run across the sheets, queries down.
// first_of_queries, first_of_keys: nothing was written yet to the gradients of these queries, of these keys.
template <class U, class E>
void backward_part(const CrissCrossBackward& call, const typename U::Sum* delta, const Pass& pass, const Parts& parts,
                   bool first_of_queries, bool first_of_keys, Contiguous contiguous, const Scratch<U>& scratch) {
  using Sum = typename U::Sum;
  using Unit = typename U::Unit;
  const LineGroup &keys = parts.across, &queries = parts.down;
  const int64_t lines = queries.lines, stride = scratch.across_stride;
  const int64_t unit_size = scratch.sheet_sizes[0], size = scratch.sheet_sizes[1];
  const int64_t key_channels = call.shape.key_channels, value_channels = call.shape.value_channels;
  const Merge to_queries = first_of_queries ? Merge::write : Merge::add;
  const Merge to_keys = first_of_keys ? Merge::write : Merge::add;
  const auto view = [&](const MapView& map, const LineGroup& part) {
    return view_lines<const E>(map, pass.axis, part);
  };
  Unit* probabilities = reinterpret_cast<Unit*>(scratch.sheets[0]);
  Sum *products = scratch.sheets[1], *logits = products;

  correlate<U, E>(view(call.query, queries), queries, view(call.key, keys), keys, key_channels, contiguous, scratch,
                  logits, size);
  const auto lse_lines = position_values(call.lse, call.shape, pass.axis, queries);
  for (int64_t g = 0; g < lines; ++g) {
    Sum *sheet = logits + g * size, *lse_high = scratch.values[0], *lse_low = scratch.values[1];
    gather_lse<Sum>(lse_lines, g, queries.length, lse_high, lse_low);
    const Sum scale =
        mask_logits(sheet, Sum(call.scale), parts.mask, parts.diagonal, queries.length, keys.length, stride);
    probabilities_line<U>(sheet, probabilities + g * unit_size, lse_high, lse_low, scale, queries.length, keys.length,
                          stride);
  }

  value_gradients<U, E>(view(call.value, keys), view(call.grad_output, queries), parts,
                        {probabilities, unit_size, stride}, products, size, to_keys,
                        view_lines<E>(call.grad_value, pass.axis, keys), value_channels, contiguous, scratch);

  Unit* by_key = probabilities;  // which are used up by then
  const auto delta_lines = position_values(delta, call.shape, pass.axis, queries);
  for (int64_t g = 0; g < lines; ++g) {
    Sum* sheet = products + g * size;
    gather<Sum>(delta_lines, g, queries.length, scratch.values[2]);
    dlogits_line<U>(sheet, probabilities + g * unit_size, scratch.values[2], Sum(call.scale), queries.length,
                    keys.length, stride);
    transpose_to_units<U>(sheet, keys.length, stride, by_key + g * unit_size, queries.length, scratch.down_stride);
    to_units<U>(sheet, reinterpret_cast<Unit*>(sheet), queries.length, stride);
  }
  aggregate<U, E>(to_queries, view(call.key, keys), keys, {by_key, unit_size, scratch.down_stride},
                  view_lines<E>(call.grad_query, pass.axis, queries), queries, nullptr, key_channels, contiguous,
                  scratch);
  aggregate<U, E>(to_keys, view(call.query, queries), queries, {reinterpret_cast<const Unit*>(products), size, stride},
                  view_lines<E>(call.grad_key, pass.axis, keys), keys, nullptr, key_channels, contiguous, scratch);
}

template <class U, class E>
void backward_group(const CrissCrossBackward& call, const typename U::Sum* delta, const Pass& pass,
                    bool channels_are_first, int64_t index, char* memory) {
  [[maybe_unused]] const std::conditional_t<U::kTiles, TileScope, int> tiles{};
  Scratch<U> scratch;
  scratch.lay_out(pass, true, memory);
  const LineGroup group = pass.group(call.shape, index);
  const Contiguous contiguous = contiguous_axis(channels_are_first, pass.axis);
  const bool row = pass.axis == Axis::row;
  for (int64_t across = 0; across < pass.across.count; ++across) {
    for (int64_t down = 0; down < pass.down.count; ++down) {
      backward_part<U, E>(call, delta, pass, Parts(pass, group, across, down), row && across == 0, row && down == 0,
                          contiguous, scratch);
    }
  }
}

// ---------------------------------------------------------------------------------------------- calls

template <class U, class E>
struct Kernel {
  using Sum = typename U::Sum;

  // Forward keeps a sum for every pair of positions on a line, backward a unit's share of one more. The scratch of a
  // thread is about a ninth of an image's attention weights in units, within what caches hold. How much exactly: so
  // that it, the log-sum-exp and backward's delta are just less than 2 % of what the einsum form needs for a 97 x 97
  // image with 64 and 512 channels, in float32 and in bfloat16.
  static Passes passes_of(const CrissCrossShape& shape, bool first, bool backward) {
    const int64_t sum = sizeof(Sum), pair = backward ? sum + sum / U::kPair : sum;
    const int64_t permille = U::kPair == 1 ? 113 : backward ? 111 : 104;
    const int64_t share = weights_of_an_image(shape) * int64_t(sizeof(Sum)) / U::kPair * permille / 1000;
    return make_passes(shape, first, kLanes<Sum>, {pair, smaller(larger(share, 360 * 1024), 3072 * 1024)});
  }
  static bool is_empty(const CrissCrossShape& s) {
    return s.batch == 0 || s.frames == 0 || s.rows == 0 || s.columns == 0;
  }
  static bool is_first(const CrissCrossForward& call) {
    for (const MapView* map : {&call.query, &call.key, &call.value, &call.output}) {
      if (!channels_first(call.shape, *map)) return false;
    }
    return true;
  }
  static bool is_first(const CrissCrossBackward& call) {
    for (const MapView* map : {&call.query, &call.key, &call.value, &call.output, &call.grad_output, &call.grad_query,
                               &call.grad_key, &call.grad_value}) {
      if (!channels_first(call.shape, *map)) return false;
    }
    return true;
  }
  static size_t delta_size(const CrissCrossShape& s) {
    return size_t(round_up(s.batch * s.frames * s.rows * s.columns * int64_t(sizeof(Sum)), 64));
  }

  static size_t workspace(const CrissCrossForward& call, int threads) {
    if (is_empty(call.shape) || TinyForward<E>::takes(call.shape)) return 0;
    const Passes passes = passes_of(call.shape, is_first(call), false);
    return size_t(most_workers(passes, threads)) * scratch_size<U>(passes, false);
  }
  static size_t workspace(const CrissCrossBackward& call, int threads) {
    if (is_empty(call.shape)) return 0;
    const Passes passes = passes_of(call.shape, is_first(call), true);
    return delta_size(call.shape) + size_t(most_workers(passes, threads)) * scratch_size<U>(passes, true);
  }

  static void run_forward(const CrissCrossForward& call, int threads, void* workspace, ParallelFor parallel_for) {
    if (is_empty(call.shape)) return;
    if (TinyForward<E>::takes(call.shape)) {
      return for_each_index(0, call.shape.batch, threads, parallel_for,
                            [&](int64_t index, int64_t) { TinyForward<E>::image(call, index); });
    }
    const Passes passes = passes_of(call.shape, is_first(call), false);
    const size_t size = scratch_size<U>(passes, false);
    run_passes(call.shape, passes, threads, parallel_for, [&](const Pass& pass, int64_t index, int64_t worker) {
      forward_group<U, E>(call, pass, passes.first, index, static_cast<char*>(workspace) + size_t(worker) * size);
    });
  }
  static void run_backward(const CrissCrossBackward& call, int threads, void* workspace, ParallelFor parallel_for) {
    if (is_empty(call.shape)) return;
    const Passes passes = passes_of(call.shape, is_first(call), true);
    const size_t size = scratch_size<U>(passes, true);
    Sum* delta = static_cast<Sum*>(workspace);
    char* memory = static_cast<char*>(workspace) + delta_size(call.shape);
    for_each_index(0, call.shape.batch * call.shape.frames * call.shape.rows, threads, parallel_for,
                   [&](int64_t index, int64_t) { delta_row<E>(call, passes.first, index, delta); });
    run_passes(call.shape, passes, threads, parallel_for, [&](const Pass& pass, int64_t index, int64_t worker) {
      backward_group<U, E>(call, delta, pass, passes.first, index, memory + size_t(worker) * size);
    });
  }
};

template <class Function>
auto with_kernel(gingham::DType dtype, const Function& function) {
  return with_element(dtype, [&](auto element) {
    using E = decltype(element);
    return function(Kernel<UnitOf<E>, E>());
  });
}

}  // namespace

namespace gingham::cpu::GINGHAM_ISA {

size_t workspace_size(const CrissCrossForward& call, int threads) {
  return with_kernel(call.dtype, [&](auto kernel) { return kernel.workspace(call, threads); });
}
size_t workspace_size(const CrissCrossBackward& call, int threads) {
  return with_kernel(call.dtype, [&](auto kernel) { return kernel.workspace(call, threads); });
}
void run(const CrissCrossForward& call, int threads, void* workspace, ParallelFor parallel_for) {
  with_kernel(call.dtype, [&](auto kernel) { kernel.run_forward(call, threads, workspace, parallel_for); });
}
void run(const CrissCrossBackward& call, int threads, void* workspace, ParallelFor parallel_for) {
  with_kernel(call.dtype, [&](auto kernel) { kernel.run_backward(call, threads, workspace, parallel_for); });
}

}  // namespace gingham::cpu::GINGHAM_ISA
