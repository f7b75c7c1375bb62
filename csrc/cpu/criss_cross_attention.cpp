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
// Backward recomputes the probabilities from lse. With delta = sum_c output * grad_output,
//   dlogits = probability * (value . grad_output - delta) * scale
// gives grad_query; its transpose gives grad_key and the transposed probabilities grad_value. "p lies on u's cross" is
// symmetric, so all three are gathers: no atomics, and the order of every sum is fixed by the shape alone.
//
// What is held: logits of one group (about L * L floats a line, 16 lines a group when lanes run across lines) and two
// panels of a few channels: 1.2 MB a thread at L = 97, meant for L2, and twice the logits in backward. Lines of more
// than kMostPositions are taken in segments, of queries as well as keys, so that 7 MB (backward 14) are the most.
// Nothing grows with the map but lse and delta.
// What bounds it: arithmetic first. Forward takes 2 (Ck + Cv) (H + W) operations a position, backward
// 2 (3 Ck + 2 Cv) (H + W); two thirds of the time are spent in multiply_block, which alone runs at 90 % (float32) and
// 85 % (pairs) of what the core's multipliers give. The rest is packing (15 %), unpacking (8 %), softmax (2 %) and, for
// lines of 16 n + 1 positions, the lone column (4 %), as a sampling profiler saw it on Zen 4 at 97 x 97. Channels-first
// maps whose rows are no multiple of a cache line cost 15 % more than others: 16 neighbouring columns then lie on two
// cache lines in every row, and each is fetched twice.
#include "gingham/criss_cross_attention.h"

#include <cmath>
#include <type_traits>

#include "dispatch.h"
#include "lines.h"
#include "panel_gemm.h"
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

// squares[line][j][i] = sum over channels of left[c, j] * right[c, i], for the positions of two parts of the same
// lines.
template <class U, class E>
void correlate(LineView<const E> left, const LineGroup& left_part, LineView<const E> right, const LineGroup& right_part,
               int64_t channels, Contiguous contiguous, const Scratch<U>& scratch, typename U::Sum* squares) {
  using Unit = typename U::Unit;
  const int64_t lines = left_part.lines, stride = scratch.stride, chunk = scratch.chunk * U::kPair;
  const int64_t left_length = left_part.length, right_length = right_part.length;
  const int64_t left_stride = panel_stride<U, PairAxis::channel>(left_length);
  const int64_t right_stride = panel_stride<U, PairAxis::channel>(right_length);
  Unit* left_panels = reinterpret_cast<Unit*>(scratch.panels[0]);
  Unit* right_panels = reinterpret_cast<Unit*>(scratch.panels[1]);
  if (channels == 0) __builtin_memset(squares, 0, size_t(lines * stride * stride) * sizeof(*squares));
  for (int64_t c = 0; c < channels; c += chunk) {
    const int64_t count = smaller(chunk, channels - c), rows = panel_rows<U, PairAxis::channel>(count);
    pack<U, PairAxis::channel>(left_panels, from_channel(left, c), count, lines, left_length, contiguous);
    pack<U, PairAxis::channel>(right_panels, from_channel(right, c), count, lines, right_length, contiguous);
    const int64_t next = c + count, next_count = smaller(chunk, channels - next);
    Prefetcher prefetcher;
    prefetch_lines(prefetcher, from_channel(left, next), next_count, left_part, contiguous);
    prefetch_lines(prefetcher, from_channel(right, next), next_count, right_part, contiguous);
    prefetcher.spread(lines * Stripes<U>(right_length).prefetches(left_length, rows));
    for (int64_t g = 0; g < lines; ++g) {
      multiply<U>(left_length, right_length, rows, {left_panels + g * rows * left_stride, 1, left_stride},
                  right_panels + g * rows * right_stride, right_stride, squares + g * stride * stride, stride, c > 0,
                  scratch.product, prefetcher);
    }
  }
}

// target[c, n] (merged) = sum over positions k of source[c, k] * operand[line][k][n], k in one part of the lines and n
// in another.
template <class U, class E>
void aggregate(Merge merge, LineView<const E> source, const LineGroup& source_part, const typename U::Unit* operand,
               LineView<E> target, const LineGroup& target_part, const typename U::Sum* weights, int64_t channels,
               Contiguous contiguous, const Scratch<U>& scratch) {
  using Unit = typename U::Unit;
  const int64_t lines = source_part.lines, stride = scratch.stride;
  const int64_t source_stride = panel_stride<U, PairAxis::position>(source_part.length);
  const int64_t target_stride = round_up(target_part.length, kLanes<typename U::Sum>);
  const int64_t steps = summed_units<U>(source_part.length);
  Unit* source_panels = reinterpret_cast<Unit*>(scratch.panels[0]);
  for (int64_t c = 0; c < channels; c += scratch.chunk) {
    const int64_t count = smaller(scratch.chunk, channels - c);
    pack<U, PairAxis::position>(source_panels, from_channel(source, c), count, lines, source_part.length, contiguous);
    const int64_t next = c + count, next_count = smaller(scratch.chunk, channels - next);
    Prefetcher prefetcher;
    prefetch_lines(prefetcher, from_channel(target, c), count, target_part, contiguous);
    prefetch_lines(prefetcher, from_channel(source, next), next_count, source_part, contiguous);
    prefetcher.spread(lines * Stripes<U>(target_part.length).prefetches(count, steps));
    for (int64_t g = 0; g < lines; ++g) {
      multiply<U>(count, target_part.length, steps, {source_panels + g * count * source_stride, source_stride, 1},
                  operand + g * stride * stride, stride, scratch.panels[1] + g * count * target_stride, target_stride,
                  false, scratch.product, prefetcher);
    }
    const auto finish = [&](auto how) {
      unpack<decltype(how)::value>(scratch.panels[1], weights, stride, from_channel(target, c), count, lines,
                                   target_part.length, contiguous);
    };
    if (merge == Merge::write) finish(std::integral_constant<Merge, Merge::write>());
    if (merge == Merge::add) finish(std::integral_constant<Merge, Merge::add>());
    if (merge == Merge::weigh) finish(std::integral_constant<Merge, Merge::weigh>());
  }
}

// Turns rows [k][n] of sums into rows [k / pair][n] of units, for use as the right operand. `units` may be the same
// memory as `sums`: a row of units is written after the rows it is made of were read.
template <class U>
void to_units(const typename U::Sum* sums, typename U::Unit* units, int64_t length, int64_t stride) {
#if defined(__AVX512BF16__)
  if constexpr (U::kPair == 2) {
    for (int64_t k = 0; k < length; k += 2) {
      for (int64_t n = 0; n < stride; n += kLanes<float>) {
        const Vector<uint32_t> low = bfloat16_bits(load(sums + k * stride + n));
        const Vector<uint32_t> high =
            k + 1 < length ? bfloat16_bits(load(sums + (k + 1) * stride + n)) : Vector<uint32_t>{};
        store(units + k / 2 * stride + n, low | (high << 16));
      }
    }
    for (int64_t k = (length + 1) / 2; k < summed_units<U>(length); ++k) {
      for (int64_t n = 0; n < stride; n += kLanes<float>) store(units + k * stride + n, Vector<uint32_t>{});
    }
    return;
  }
#endif
  if constexpr (U::kPair == 1) {
    if (units != sums) __builtin_memcpy(units, sums, size_t(length * stride) * sizeof(*units));
  }
}

template <class Sum>
void transpose_square(Sum* square, int64_t stride) {
  constexpr int kN = kLanes<Sum>;
  for (int64_t row = 0; row < stride; row += kN) {
    for (int64_t column = row; column < stride; column += kN) {
      Vector<Sum> upper[kN], lower[kN];
      for (int i = 0; i < kN; ++i) upper[i] = load(square + (row + i) * stride + column);
      transpose<Sum>(upper);
      if (column != row) {
        for (int i = 0; i < kN; ++i) lower[i] = load(square + (column + i) * stride + row);
        transpose<Sum>(lower);
        for (int i = 0; i < kN; ++i) store(square + (row + i) * stride + column, lower[i]);
      }
      for (int i = 0; i < kN; ++i) store(square + (column + i) * stride + row, upper[i]);
    }
  }
}

// Prepares the logits of a line for the factor `scale`, which softmax applies: the pixel itself belongs to the row pass
// only, so elsewhere the diagonal becomes what scales to minus infinity. Returns the factor to apply: not 0, which
// would make NaN of that.
template <class Sum>
Sum mask_logits(Sum* square, Sum scale, bool mask_diagonal, int64_t length, int64_t stride) {
  if (scale == 0) {
    for (int64_t i = 0; i < length * stride; ++i) square[i] *= 0;  // what is not finite becomes NaN
    scale = 1;
  }
  const Sum masked = scale > 0 ? -HUGE_VAL : HUGE_VAL;
  for (int64_t i = 0; i < length && mask_diagonal; ++i) square[i * stride + i] = masked;
  return scale;
}

// A contiguous [batch, frames, rows, columns] array of one number per position, seen as lines.
template <class Sum>
LineView<Sum> position_values(Sum* data, const CrissCrossShape& shape, Axis axis, const LineGroup& group) {
  const int64_t row = shape.columns, frame = shape.rows * row, batch = shape.frames * frame;
  return view_lines<Sum>(MapView{const_cast<void*>(static_cast<const void*>(data)), batch, 0, frame, row, 1}, axis,
                         group);
}

template <class Sum>
void gather(LineView<const Sum> values, Sum* lines, const LineGroup& group, int64_t stride) {
  for (int64_t g = 0; g < group.lines; ++g) {
    for (int64_t p = 0; p < stride; ++p) {
      lines[g * stride + p] =
          p < group.length ? values.data[g * values.line_stride + p * values.position_stride] : Sum(0);
    }
  }
}

// The same of lse, as the sum of two numbers.
template <class Sum>
void gather_lse(LineView<const double> lse, Sum* high, Sum* low, const LineGroup& group, int64_t stride) {
  for (int64_t g = 0; g < group.lines; ++g) {
    for (int64_t p = 0; p < stride; ++p) {
      const double x = p < group.length ? lse.data[g * lse.line_stride + p * lse.position_stride] : 0;
      high[g * stride + p] = Sum(x);
      low[g * stride + p] = std::isfinite(Sum(x)) ? Sum(x - double(Sum(x))) : Sum(0);
    }
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
void softmax_line(Sum* logits, const Sum* high, const Sum* low, Sum* weights, double* lse, int64_t lse_stride,
                  Sum scale, Turn turn, int64_t keys, int64_t queries, int64_t stride) {
  constexpr int kN = kLanes<Sum>;
  for (int64_t i = 0; i < queries; i += kN) {
    Vector<Sum> top = load(logits + i) * scale;
    for (int64_t j = 0; j < keys; ++j) {
      const Vector<Sum> logit = load(logits + j * stride + i) * scale;
      store(logits + j * stride + i, logit);
      top = maximum<Sum>(logit, top);
    }
    if (!turn.first) top = maximum<Sum>(top, load(high + i));
    const Vector<Sum> base = (top == Sum(-HUGE_VAL)) ? Vector<Sum>{} : top;
    Vector<Sum> total{};
    for (int64_t j = 0; j < keys; ++j) {
      const Vector<Sum> p = exponential(load(logits + j * stride + i) - base);
      store(logits + j * stride + i, p);
      total += p;
    }
    Vector<Sum> before{};
    if (!turn.first) {
      before = exponential((load(high + i) - base) + load(low + i));
      total += before;
    }
    Vector<Sum> factor = Sum(1) / total;
    if (!turn.last) factor = (total == Sum(0)) ? Vector<Sum>{} : factor;
    for (int64_t j = 0; j < keys; ++j) store(logits + j * stride + i, load(logits + j * stride + i) * factor);
    store(weights + i, before * factor);
    for (int64_t lane = 0; lane < smaller(kN, queries - i); ++lane) {
      lse[(i + lane) * lse_stride] = double(base[lane]) + double(std::log(total[lane]));
    }
  }
}

template <class U, class E>
void forward_part(const CrissCrossForward& call, const Pass& pass, const LineGroup& queries, const LineGroup& keys,
                  bool same, Turn turn, Contiguous contiguous, const Scratch<U>& scratch) {
  using Sum = typename U::Sum;
  using Unit = typename U::Unit;
  const int64_t stride = scratch.stride;
  Sum *logits = scratch.squares[0], *weights = scratch.line_values[0];
  Sum *lse_high = scratch.line_values[1], *lse_low = scratch.line_values[2];

  correlate<U, E>(view_lines<const E>(call.key, pass.axis, keys), keys,
                  view_lines<const E>(call.query, pass.axis, queries), queries, call.shape.key_channels, contiguous,
                  scratch, logits);

  const LineView<double> lse = position_values(call.lse, call.shape, pass.axis, queries);
  if (!turn.first) {
    gather_lse<Sum>({lse.data, 0, lse.line_stride, lse.position_stride}, lse_high, lse_low, queries, stride);
  }
  for (int64_t g = 0; g < queries.lines; ++g) {
    Sum* square = logits + g * stride * stride;
    const bool mask_diagonal = same && pass.axis != Axis::row;
    const Sum scale = mask_logits(square, Sum(call.scale), mask_diagonal, keys.length, stride);
    softmax_line(square, lse_high + g * stride, lse_low + g * stride, weights + g * stride,
                 lse.data + g * lse.line_stride, lse.position_stride, scale, turn, keys.length, queries.length, stride);
    to_units<U>(square, reinterpret_cast<Unit*>(square), keys.length, stride);
  }

  aggregate<U, E>(turn.first ? Merge::write : Merge::weigh, view_lines<const E>(call.value, pass.axis, keys), keys,
                  reinterpret_cast<const Unit*>(logits), view_lines<E>(call.output, pass.axis, queries), queries,
                  weights, call.shape.value_channels, contiguous, scratch);
}

template <class U, class E>
void forward_group(const CrissCrossForward& call, const Pass& pass, bool channels_are_first, int64_t index,
                   char* memory) {
  [[maybe_unused]] const std::conditional_t<U::kTiles, TileScope, int> tiles{};
  Scratch<U> scratch;
  scratch.lay_out(call.shape, pass, 1, memory);
  const LineGroup group = pass.group(call.shape, index);
  const Contiguous contiguous = contiguous_axis(channels_are_first, pass.axis);
  for (int64_t own = 0; own < pass.length; own += pass.segment) {
    for (int64_t other = 0; other < pass.length; other += pass.segment) {
      const Turn turn{pass.axis == Axis::row && other == 0, pass.is_last && other + pass.segment >= pass.length};
      forward_part<U, E>(call, pass, pass.part(group, own), pass.part(group, other), own == other, turn, contiguous,
                         scratch);
    }
  }
}

// ---------------------------------------------------------------------------------------------- backward

// delta[u] = sum_c output[c, u] * grad_output[c, u], one row of positions at a time.
template <class E, class Sum>
void delta_row(const CrissCrossBackward& call, bool channels_are_first, int64_t index, Sum* delta) {
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

// logits^T -> probabilities^T, and products^T[j][i] = value_j . grad_output_i -> dlogits^T.
template <class Sum>
void softmax_backward_line(Sum* logits, Sum* products, const Sum* lse_high, const Sum* lse_low, const Sum* delta,
                           Sum scale, Sum outer_scale, int64_t keys, int64_t queries, int64_t stride) {
  for (int64_t i = 0; i < queries; i += kLanes<Sum>) {
    const Vector<Sum> high = load(lse_high + i), low = load(lse_low + i), delta_i = load(delta + i);
    for (int64_t j = 0; j < keys; ++j) {
      const Vector<Sum> p = exponential((load(logits + j * stride + i) * scale - high) - low);
      store(logits + j * stride + i, p);
      store(products + j * stride + i, p * (load(products + j * stride + i) - delta_i) * outer_scale);
    }
  }
}

// first_of_queries, first_of_keys: nothing was written yet to the gradients of these queries, of these keys.
template <class U, class E>
void backward_part(const CrissCrossBackward& call, const typename U::Sum* delta, const Pass& pass,
                   const LineGroup& queries, const LineGroup& keys, bool same, bool first_of_queries,
                   bool first_of_keys, Contiguous contiguous, const Scratch<U>& scratch) {
  using Sum = typename U::Sum;
  using Unit = typename U::Unit;
  const int64_t lines = queries.lines, stride = scratch.stride, area = stride * stride;
  const int64_t key_channels = call.shape.key_channels, value_channels = call.shape.value_channels;
  Sum *logits = scratch.squares[0], *dlogits = scratch.squares[1];
  const auto view = [&](const MapView& map, const LineGroup& part) {
    return view_lines<const E>(map, pass.axis, part);
  };

  correlate<U, E>(view(call.key, keys), keys, view(call.query, queries), queries, key_channels, contiguous, scratch,
                  logits);
  correlate<U, E>(view(call.value, keys), keys, view(call.grad_output, queries), queries, value_channels, contiguous,
                  scratch, dlogits);

  Sum *delta_lines = scratch.line_values[0], *lse_high = scratch.line_values[1], *lse_low = scratch.line_values[2];
  gather_lse<Sum>(position_values(call.lse, call.shape, pass.axis, queries), lse_high, lse_low, queries, stride);
  gather<Sum>(position_values(delta, call.shape, pass.axis, queries), delta_lines, queries, stride);
  for (int64_t g = 0; g < lines; ++g) {
    Sum* square = logits + g * area;
    const bool mask_diagonal = same && pass.axis != Axis::row;
    const Sum scale = mask_logits(square, Sum(call.scale), mask_diagonal, keys.length, stride);
    softmax_backward_line(square, dlogits + g * area, lse_high + g * stride, lse_low + g * stride,
                          delta_lines + g * stride, scale, Sum(call.scale), keys.length, queries.length, stride);
    transpose_square(square, stride);
    to_units<U>(square, reinterpret_cast<Unit*>(square), queries.length, stride);
  }
  const Merge to_queries = first_of_queries ? Merge::write : Merge::add;
  const Merge to_keys = first_of_keys ? Merge::write : Merge::add;
  // logits now holds probability[i][j], the right operand of grad_value.
  aggregate<U, E>(to_keys, view(call.grad_output, queries), queries, reinterpret_cast<const Unit*>(logits),
                  view_lines<E>(call.grad_value, pass.axis, keys), keys, nullptr, value_channels, contiguous, scratch);
  const Unit* dlogits_by_key = reinterpret_cast<const Unit*>(dlogits);
  if constexpr (U::kPair != 1) {  // the probabilities are used up: their memory takes the units
    for (int64_t g = 0; g < lines; ++g) {
      to_units<U>(dlogits + g * area, reinterpret_cast<Unit*>(logits + g * area), keys.length, stride);
    }
    dlogits_by_key = reinterpret_cast<const Unit*>(logits);
  }
  aggregate<U, E>(to_queries, view(call.key, keys), keys, dlogits_by_key,
                  view_lines<E>(call.grad_query, pass.axis, queries), queries, nullptr, key_channels, contiguous,
                  scratch);
  for (int64_t g = 0; g < lines; ++g) {
    transpose_square(dlogits + g * area, stride);
    to_units<U>(dlogits + g * area, reinterpret_cast<Unit*>(dlogits + g * area), queries.length, stride);
  }
  aggregate<U, E>(to_keys, view(call.query, queries), queries, reinterpret_cast<const Unit*>(dlogits),
                  view_lines<E>(call.grad_key, pass.axis, keys), keys, nullptr, key_channels, contiguous, scratch);
}

template <class U, class E>
void backward_group(const CrissCrossBackward& call, const typename U::Sum* delta, const Pass& pass,
                    bool channels_are_first, int64_t index, char* memory) {
  [[maybe_unused]] const std::conditional_t<U::kTiles, TileScope, int> tiles{};
  Scratch<U> scratch;
  scratch.lay_out(call.shape, pass, 2, memory);
  const LineGroup group = pass.group(call.shape, index);
  const Contiguous contiguous = contiguous_axis(channels_are_first, pass.axis);
  const bool row = pass.axis == Axis::row;
  for (int64_t own = 0; own < pass.length; own += pass.segment) {
    for (int64_t other = 0; other < pass.length; other += pass.segment) {
      backward_part<U, E>(call, delta, pass, pass.part(group, own), pass.part(group, other), own == other,
                          row && other == 0, row && own == 0, contiguous, scratch);
    }
  }
}

// ---------------------------------------------------------------------------------------------- calls

template <class U, class E>
struct Kernel {
  using Sum = typename U::Sum;

  static Passes passes_of(const CrissCrossShape& shape, bool first) { return make_passes(shape, first, kLanes<Sum>); }
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
    if (is_empty(call.shape)) return 0;
    const Passes passes = passes_of(call.shape, is_first(call));
    return size_t(most_workers(passes, threads)) * scratch_size<U>(call.shape, passes, 1);
  }
  static size_t workspace(const CrissCrossBackward& call, int threads) {
    if (is_empty(call.shape)) return 0;
    const Passes passes = passes_of(call.shape, is_first(call));
    return delta_size(call.shape) + size_t(most_workers(passes, threads)) * scratch_size<U>(call.shape, passes, 2);
  }

  static void run_forward(const CrissCrossForward& call, int threads, void* workspace, ParallelFor parallel_for) {
    if (is_empty(call.shape)) return;
    const Passes passes = passes_of(call.shape, is_first(call));
    const size_t size = scratch_size<U>(call.shape, passes, 1);
    run_passes(call.shape, passes, threads, parallel_for, [&](const Pass& pass, int64_t index, int64_t worker) {
      forward_group<U, E>(call, pass, passes.first, index, static_cast<char*>(workspace) + size_t(worker) * size);
    });
  }
  static void run_backward(const CrissCrossBackward& call, int threads, void* workspace, ParallelFor parallel_for) {
    if (is_empty(call.shape)) return;
    const Passes passes = passes_of(call.shape, is_first(call));
    const size_t size = scratch_size<U>(call.shape, passes, 2);
    Sum* delta = static_cast<Sum*>(workspace);
    char* memory = static_cast<char*>(workspace) + delta_size(call.shape);
    run(0, call.shape.batch * call.shape.frames * call.shape.rows, threads, parallel_for,
        [&](int64_t index, int64_t) { delta_row<E>(call, passes.first, index, delta); });
    run_passes(call.shape, passes, threads, parallel_for, [&](const Pass& pass, int64_t index, int64_t worker) {
      backward_group<U, E>(call, delta, pass, passes.first, index, memory + size_t(worker) * size);
    });
  }
};

#if defined(__AVX512BF16__)
using BFloat16Unit = BFloat16Pair;
#else
using BFloat16Unit = FloatUnit;
#endif

template <class Function>
auto for_dtype(gingham::DType dtype, const Function& function) {
  switch (dtype) {
    case gingham::DType::float64:
      return function(Kernel<DoubleUnit, double>());
    case gingham::DType::float16:
      return function(Kernel<FloatUnit, Half>());
    case gingham::DType::bfloat16:
      return function(Kernel<BFloat16Unit, BFloat16>());
    default:
      return function(Kernel<FloatUnit, float>());
  }
}

}  // namespace

namespace gingham::cpu::GINGHAM_ISA {

size_t forward_workspace(const CrissCrossForward& call, int threads) {
  return for_dtype(call.dtype, [&](auto kernel) { return kernel.workspace(call, threads); });
}
size_t backward_workspace(const CrissCrossBackward& call, int threads) {
  return for_dtype(call.dtype, [&](auto kernel) { return kernel.workspace(call, threads); });
}
void forward(const CrissCrossForward& call, int threads, void* workspace, ParallelFor parallel_for) {
  for_dtype(call.dtype, [&](auto kernel) { kernel.run_forward(call, threads, workspace, parallel_for); });
}
void backward(const CrissCrossBackward& call, int threads, void* workspace, ParallelFor parallel_for) {
  for_dtype(call.dtype, [&](auto kernel) { kernel.run_backward(call, threads, workspace, parallel_for); });
}

}  // namespace gingham::cpu::GINGHAM_ISA
