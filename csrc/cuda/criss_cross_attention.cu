// Criss-cross attention on CUDA, forward and backward.
//
// A map is a set of lines: its rows, its columns and, in 3-D, the frames behind each pixel; one pass per axis. A warp
// owns 16 positions of a line and keeps their logits with up to 128 other positions of the line in registers:
//   multiply_rows  logits = query rows x key rows, on tensor cores, streaming channels through shared memory;
//   softmax        in registers; joins the log-sum-exp of the passes before, so that a pass ends with joint weights:
//                  output = output * exp(lse_before - lse) + its own part. Rows hold the position itself, the other
//                  axes mask it. A line of more than kSegment positions (128, 64 for float64) is several passes;
//   gather_rows    weights, still in registers, x value rows, streaming channels; tiles of results leave coalesced.
// Backward recomputes the probabilities from lse. With delta = sum_c output * grad_output,
//   dlogits = probability * (grad_output . value - delta) * scale
// gives grad_query. "p lies on u's cross" is symmetric, so with own and other exchanged the same two products give
// grad_value and grad_key: gathers all, no atomics, and the order of every sum is fixed by the shape alone.
//
// Held in device memory: lse, and delta in backward. Never a tensor of H + W. Between the passes the output and the
// gradients stay in their own place and type. For 16-bit types every pass so rounds the sum up to it once more, by half
// a unit in its last place, as much as rounding the weights costs: once an axis, and on a line of several passes once a
// pass. float32 parts would double the traffic.
// Floor, forward: query, key, value read and output written once, 2 (Ck + Cv) elements a position, against
// 2 (Ck + Cv) (H + W) operations: bytes, on a card that does more than some 100 operations a byte. Value and output
// cross the bus twice unless they stay in L2; so images are taken a few at a time, all passes of one before the next.
// Backward: 2 (4 Ck + 3 Cv) (H + W) operations here, of which 2 (3 Ck + 2 Cv) are the least; the rest is the price of
// gathers.
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "gingham/criss_cross_attention.h"
#include "lines.cuh"
#include "primitives.cuh"
#include "product.cuh"

namespace gingham::cuda {
namespace {

// A double as the sum of two Sums. Beside a large logit float32 has no room for the logarithm of a sum; so lse is
// double and meets logits in two subtractions, the large part first.
template <class Sum>
struct Split {
  Sum high, low;

  Split() = default;
  __device__ explicit Split(double x) : high(static_cast<Sum>(x)), low(0) {
    if (!std::is_same_v<Sum, double> && isfinite(high)) low = static_cast<Sum>(x - high);
  }
};

// ---------------------------------------------------------------------------------------------- forward

template <class P>
struct ForwardPass {
  Work work;
  int64_t key_channels, value_channels;
  typename P::Sum scale;
  bool first;  // nothing to merge with yet
  bool last;   // of the call
  Lines<typename P::Element> query, key, value, output;
  Lines<double> lse;
};

// Visits the lane's sums of rows that exist: visit(j, e, other position in the segment).
template <class P, class Visit>
__device__ void for_each_sum(const Place& place, Visit visit) {
#pragma unroll
  for (int j = 0; j < P::kSegment / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) visit(j, e, j * 8 + place.lane % 4 * 2 + e % 2);
  }
}

__device__ bool on_cross(const Work& work, const Place& place, int half, int other) {
  if (other >= work.other_count) return false;
  return !work.mask_self || work.other_begin + other != place.own_begin + place.own(half);
}

// lse or delta at an own position; `otherwise` where there is none.
template <class T>
__device__ T at_own(const Lines<T>& map, const Place& place, int half, T otherwise) {
  if (!place.active || place.own(half) >= place.own_count) return otherwise;
  return *map.at(place.image, place.plane, place.first_line + place.line, place.own_begin + place.own(half));
}

// Logits become weights under the joint softmax; lse is brought up to date; the output so far is to be scaled by
// row_factors. A pass may meet none but infinitely small logits as long as others of the cross are finite: nothing is
// divided by a total of zero before the last pass, where it gives NaN as the definition does.
template <class P>
__device__ typename P::Weights softmax(typename P::Sum (&logits)[P::kSegment / 8][4], const ForwardPass<P>& pass,
                                       const Place& place, typename P::Sum* row_factors) {
  using Sum = typename P::Sum;
  Sum largest[2] = {-INFINITY, -INFINITY}, kept[2], total[2];
  for_each_sum<P>(place, [&](int j, int e, int other) {
    Sum& x = logits[j][e];
    x = on_cross(pass.work, place, e / 2, other) ? x * pass.scale : -INFINITY;
    largest[e / 2] = fmax(largest[e / 2], x);
  });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    for (int mask = 1; mask < 4; mask *= 2) largest[half] = fmax(largest[half], shuffle_xor(largest[half], mask));
    const Split<Sum> before(pass.first ? -INFINITY : at_own<double>(pass.lse, place, half, -INFINITY));
    largest[half] = fmax(largest[half], before.high);
    if (largest[half] == -INFINITY) largest[half] = 0;
    kept[half] = exp((before.high - largest[half]) + before.low);
    total[half] = 0;
  }
  for_each_sum<P>(place, [&](int j, int e, int) {
    logits[j][e] = exp(logits[j][e] - largest[e / 2]);
    total[e / 2] += logits[j][e];
  });
  Sum inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    for (int mask = 1; mask < 4; mask *= 2) total[half] += shuffle_xor(total[half], mask);
    total[half] += kept[half];
    inverse[half] = total[half] == 0 && !pass.last ? Sum(0) : Sum(1) / total[half];
    if (place.active && place.lane % 4 == 0) {
      row_factors[place.line * pass.work.own_positions() + place.own(half)] = kept[half] * inverse[half];
      if (place.own(half) < place.own_count) {
        *pass.lse.at(place.image, place.plane, place.first_line + place.line, place.own_begin + place.own(half)) =
            static_cast<double>(largest[half]) + static_cast<double>(log(total[half]));
      }
    }
    inverse[half] *= P::kWeightScale;
  }
  for_each_sum<P>(place, [&](int j, int e, int) { logits[j][e] *= inverse[e / 2]; });
  return P::weights(logits);
}

template <class P, class B>
__global__ void __launch_bounds__(B::kThreads, B::kBlocksPerProcessor)
    attend(const __grid_constant__ ForwardPass<P> pass) {
  using Sum = typename P::Sum;
  GINGHAM_SHARED_MEMORY(memory);
  const Place place(pass.work);
  Sum* row_factors = BlockMemory<B>(pass.work).row_factors(memory);
  Sum logits[P::kSegment / 8][4];
  multiply_rows<P, B>(logits, pass.query, pass.key, pass.key_channels, pass.work, place, memory);
  const auto weights = softmax<P>(logits, pass, place, row_factors);
  constexpr Sum kUndo[2] = {1 / P::kWeightScale, 1 / P::kWeightScale};
  gather_rows<P, B>(weights, pass.value, pass.output, pass.value_channels, kUndo, !pass.first, row_factors, pass.work,
                    place, memory);
}

// ---------------------------------------------------------------------------------------------- backward

template <class P>
struct BackwardPass {
  Work work;
  int64_t key_channels, value_channels;
  typename P::Sum scale;
  bool first;  // nothing to add to yet
  Lines<typename P::Element> query, key, value, grad_output, grad_query, grad_key, grad_value;
  Lines<double> lse;
  Lines<typename P::Sum> delta;
};

template <class P>
struct DeltaPass {
  int64_t planes, lines, length, positions, channels;
  Lines<typename P::Element> output, grad_output;
  typename P::Sum* delta;
};

constexpr int kDeltaWarps = 8, kDeltaPositions = 32;

// delta = sum_c output * grad_output. A block takes 32 positions: a warp four of them, lanes over channels, when
// channels are adjacent; otherwise every warp all 32, lanes over positions, an eighth of the channels each.
template <class P, bool channel_minor>
__global__ void __launch_bounds__(kDeltaWarps * 32) sum_products(const __grid_constant__ DeltaPass<P> pass) {
  using Sum = typename P::Sum;
  GINGHAM_SHARED_MEMORY(memory);
  Sum* parts = reinterpret_cast<Sum*>(memory);  // [warp][position]
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kDeltaPositions;
  const auto sum = [&](int64_t position, int64_t first, int64_t step) {
    Sum total = 0;
    if (position >= pass.positions) return total;
    const int64_t x = position % pass.length, line = position / pass.length % pass.lines;
    const int64_t plane = position / pass.length / pass.lines;
    const auto* output = pass.output.at(plane / pass.planes, plane % pass.planes, line, x);
    const auto* grad = pass.grad_output.at(plane / pass.planes, plane % pass.planes, line, x);
#pragma unroll 4
    for (int64_t c = first; c < pass.channels; c += step) {
      total += P::to_sum(output[c * pass.output.channel]) * P::to_sum(grad[c * pass.grad_output.channel]);
    }
    return total;
  };
  if constexpr (channel_minor) {
    for (int i = warp; i < kDeltaPositions; i += kDeltaWarps) {
      Sum total = sum(begin + i, lane, 32);
      for (int mask = 16; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
      if (lane == 0 && begin + i < pass.positions) pass.delta[begin + i] = total;
    }
  } else {
    parts[warp * 32 + lane] = sum(begin + lane, warp, kDeltaWarps);
    __syncthreads();
    if (warp > 0 || begin + lane >= pass.positions) return;
    Sum total = 0;
    for (int i = 0; i < kDeltaWarps; ++i) total += parts[i * 32 + lane];
    pass.delta[begin + lane] = total;
  }
}

// lse or delta at the other positions of the warp's line as Numbers in shared memory, in place of the tiles: good from
// a product's end to the beginning of the next.
template <class B, class Number, class T>
__device__ const Number* at_others(const Lines<T>& map, const Work& work, const Place& place, unsigned char* memory) {
  static_assert(sizeof(Number) <= 16 * sizeof(typename B::Element), "a tile has at least 16 channels of a position");
  auto* numbers = reinterpret_cast<Number*>(memory);
  __syncthreads();  // the tiles are done with
  for (int i = threadIdx.x; i < place.line_count * work.other_padded; i += B::kThreads) {
    const int line = i / work.other_padded, position = i % work.other_padded;
    if (position >= work.other_count) continue;
    numbers[i] = Number(*map.at(place.image, place.plane, place.first_line + line, work.other_begin + position));
  }
  __syncthreads();
  return numbers + place.line * work.other_padded;
}

// dlogits as weights. In float16 small ones would lose their digits or vanish, and large ones overflow; so each row is
// scaled by the power of two that brings its largest into [2^14, 2^15), and its results by undo.
template <class P>
__device__ typename P::Weights scaled_weights(typename P::Sum (&sums)[P::kSegment / 8][4], const Place& place,
                                              typename P::Sum (&undo)[2]) {
  undo[0] = undo[1] = 1;
  if constexpr (P::kWeightScale != 1) {
    float largest[2] = {}, scale[2];
    for_each_sum<P>(place, [&](int j, int e, int) { largest[e / 2] = fmax(largest[e / 2], fabs(sums[j][e])); });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      for (int mask = 1; mask < 4; mask *= 2) largest[half] = fmax(largest[half], shuffle_xor(largest[half], mask));
      // Exponents as they are stored, so that both factors are normal numbers.
      int exponent = 127 + 127 + 14 - static_cast<int>(bits_of_float(largest[half]) >> 23);
      exponent = exponent > 253 ? 253 : exponent;
      scale[half] = float_of_bits(static_cast<uint32_t>(exponent) << 23);
      undo[half] = float_of_bits(static_cast<uint32_t>(254 - exponent) << 23);
    }
    for_each_sum<P>(place, [&](int j, int e, int) { sums[j][e] *= scale[e / 2]; });
  }
  return P::weights(sums);
}

// Own positions are queries: grad_query.
template <class P, class B>
__global__ void __launch_bounds__(B::kThreads, B::kBlocksPerProcessor)
    backward_of_queries(const __grid_constant__ BackwardPass<P> pass) {
  using Sum = typename P::Sum;
  GINGHAM_SHARED_MEMORY(memory);
  const Work& work = pass.work;
  const Place place(work);

  Sum sums[P::kSegment / 8][4];
  multiply_rows<P, B>(sums, pass.query, pass.key, pass.key_channels, work, place, memory);
  Split<Sum> lse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) lse[half] = Split<Sum>(at_own<double>(pass.lse, place, half, INFINITY));
  for_each_sum<P>(place, [&](int j, int e, int other) {
    const bool counts = on_cross(work, place, e / 2, other);
    const Sum logarithm = (sums[j][e] * pass.scale - lse[e / 2].high) - lse[e / 2].low;
    sums[j][e] = counts ? exp(logarithm) * P::kWeightScale : Sum(0);
  });
  const auto probabilities = P::weights(sums);

  multiply_rows<P, B>(sums, pass.grad_output, pass.value, pass.value_channels, work, place, memory);
  Sum delta[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) delta[half] = at_own<Sum>(pass.delta, place, half, 0);
  for_each_sum<P>(place, [&](int j, int e, int) {
    sums[j][e] = P::weight(probabilities, j, e) * (sums[j][e] - delta[e / 2]) * (pass.scale / P::kWeightScale);
  });
  Sum undo[2];
  const auto dlogits = scaled_weights<P>(sums, place, undo);
  gather_rows<P, B>(dlogits, pass.key, pass.grad_query, pass.key_channels, undo, !pass.first, nullptr, work, place,
                    memory);
}

// Own positions are keys, the others the queries that see them: grad_value and grad_key.
template <class P, class B>
__global__ void __launch_bounds__(B::kThreads, B::kBlocksPerProcessor)
    backward_of_keys(const __grid_constant__ BackwardPass<P> pass) {
  using Sum = typename P::Sum;
  GINGHAM_SHARED_MEMORY(memory);
  const Work& work = pass.work;
  const Place place(work);

  Sum sums[P::kSegment / 8][4];
  multiply_rows<P, B>(sums, pass.key, pass.query, pass.key_channels, work, place, memory);
  const auto* lse = at_others<B, Split<Sum>>(pass.lse, work, place, memory);
  for_each_sum<P>(place, [&](int j, int e, int other) {
    const bool counts = place.active && on_cross(work, place, e / 2, other);
    const Split<Sum> of_query = counts ? lse[other] : Split<Sum>(0);
    const Sum logarithm = (sums[j][e] * pass.scale - of_query.high) - of_query.low;
    sums[j][e] = counts ? exp(logarithm) * P::kWeightScale : Sum(0);
  });
  const auto probabilities = P::weights(sums);
  constexpr Sum kUndo[2] = {1 / P::kWeightScale, 1 / P::kWeightScale};
  gather_rows<P, B>(probabilities, pass.grad_output, pass.grad_value, pass.value_channels, kUndo, !pass.first, nullptr,
                    work, place, memory);

  multiply_rows<P, B>(sums, pass.value, pass.grad_output, pass.value_channels, work, place, memory);
  const auto* delta = at_others<B, Sum>(pass.delta, work, place, memory);
  for_each_sum<P>(place, [&](int j, int e, int other) {
    const Sum of_query = place.active && other < work.other_count ? delta[other] : Sum(0);
    sums[j][e] = P::weight(probabilities, j, e) * (sums[j][e] - of_query) * (pass.scale / P::kWeightScale);
  });
  Sum undo[2];
  const auto dlogits = scaled_weights<P>(sums, place, undo);
  gather_rows<P, B>(dlogits, pass.query, pass.grad_key, pass.key_channels, undo, !pass.first, nullptr, work, place,
                    memory);
}

// ---------------------------------------------------------------------------------------------- host

enum class Axis { row, column, frame };

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// A map whose lines run along `axis`: planes x lines x positions are frames x rows x columns, frames x columns x rows,
// rows x columns x frames.
template <class T>
Lines<T> lines_of(const MapView& map, Axis axis, const CrissCrossShape& shape) {
  Lines<T> lines{static_cast<T*>(map.data), map.batch_stride, map.frame_stride, 0, 0, map.channel_stride, false};
  lines.line = axis == Axis::row ? map.row_stride : map.column_stride;
  lines.position = axis == Axis::row ? map.column_stride : axis == Axis::column ? map.row_stride : map.frame_stride;
  if (axis == Axis::frame) lines.plane = map.row_stride;
  const auto whole = [](int64_t size, int64_t stride) { return size <= 1 || stride % Vector<T>::kSize == 0; };
  lines.vectors = map.channel_stride == 1 && reinterpret_cast<uintptr_t>(map.data) % 16 == 0 &&
                  whole(shape.batch, map.batch_stride) && whole(shape.frames, map.frame_stride) &&
                  whole(shape.rows, map.row_stride) && whole(shape.columns, map.column_stride);
  return lines;
}

MapView statistic_map(const void* data, const CrissCrossShape& shape) {
  const int64_t plane = shape.rows * shape.columns;
  return {const_cast<void*>(data), shape.frames * plane, 0, plane, shape.columns, 1};
}

bool is_empty(const CrissCrossShape& shape) {
  return shape.batch <= 0 || shape.frames <= 0 || shape.rows <= 0 || shape.columns <= 0;
}

// The lines of one axis in blocks, for some images.
template <class P, class B>
Work work_of(const CrissCrossShape& shape, Axis axis) {
  Work work{};
  work.length = axis == Axis::row ? shape.columns : axis == Axis::column ? shape.rows : shape.frames;
  work.lines = axis == Axis::row ? shape.rows : shape.columns;
  work.planes = axis == Axis::frame ? shape.rows : shape.frames;
  const int64_t most_tiles = B::contiguous == Contiguous::line ? B::kWarps / B::kLineLanes : B::kWarps;
  work.tiles_per_line = static_cast<int>(smaller(ceil_div(work.length, 16), most_tiles));
  work.lines_per_block = static_cast<int>(
      smaller(work.lines, B::contiguous == Contiguous::line ? B::kLineLanes : B::kWarps / work.tiles_per_line));
  work.line_groups = ceil_div(work.lines, work.lines_per_block);
  work.own_tiles = ceil_div(work.length, work.own_positions());
  work.mask_self = axis != Axis::row;
  return work;
}

// Runs launch_segment(work, blocks) for each segment of the lines.
template <class P, class Launch>
void for_each_segment(Work work, int64_t first_image, int64_t images, Launch launch_segment) {
  const int64_t segments = ceil_div(work.length, P::kSegment), segment = ceil_div(work.length, segments);
  work.first_image = first_image;
  for (work.other_begin = 0; work.other_begin < work.length; work.other_begin += segment) {
    work.other_count = static_cast<int>(smaller(segment, work.length - work.other_begin));
    work.other_padded = static_cast<int>(ceil_div(work.other_count, 16) * 16);
    launch_segment(work, images * work.blocks_of_image());
  }
}

// Runs run(axis, Block) for each axis along which positions have neighbours; rows always and first, because they hold
// the position itself.
template <class P, class Run>
void for_each_axis(const CrissCrossShape& shape, bool channels_last, Run run) {
  const auto across = [&](Axis axis) {
    if (channels_last) {
      run(axis, Block<P, Contiguous::channel>{});
    } else {
      run(axis, Block<P, Contiguous::line>{});
    }
  };
  if (channels_last) {
    run(Axis::row, Block<P, Contiguous::channel>{});
  } else {
    run(Axis::row, Block<P, Contiguous::position>{});
  }
  if (shape.rows > 1) across(Axis::column);
  if (shape.frames > 1) across(Axis::frame);
}
Axis last_axis(const CrissCrossShape& shape) {
  return shape.frames > 1 ? Axis::frame : shape.rows > 1 ? Axis::column : Axis::row;
}

// As many images at a time as leave `maps` maps of value's size in half of the L2 cache; more where they are needed to
// give every multiprocessor two blocks in each pass; no more than have their blocks in a grid.
template <class P>
int64_t images_at_a_time(const CrissCrossShape& shape, bool channels_last, int64_t maps) {
  constexpr int64_t kMostBlocks = int64_t{1} << 30;
  const int64_t positions = shape.frames * shape.rows * shape.columns;
  const int64_t element_bytes = sizeof(typename P::Element);
  const int64_t by_cache = cache_bytes() / 2 / (positions * (shape.value_channels + 1) * element_bytes * maps);
  int64_t fewest_blocks = kMostBlocks;
  for_each_axis<P>(shape, channels_last, [&](Axis axis, auto block) {
    fewest_blocks = smaller(fewest_blocks, work_of<P, decltype(block)>(shape, axis).blocks_of_image());
  });
  const int64_t images = larger(by_cache, ceil_div(2 * multiprocessors(), fewest_blocks));
  return smaller(smaller(images, larger(kMostBlocks / positions, 1)), shape.batch);
}

bool is_channels_last(const MapView& value, const CrissCrossShape& shape) {
  return value.channel_stride == 1 && (value.column_stride != 1 || shape.columns == 1);
}

template <class P>
void forward(const CrissCrossForward& call, void* stream) {
  using T = typename P::Element;
  using Sum = typename P::Sum;
  const CrissCrossShape& shape = call.shape;
  const bool channels_last = is_channels_last(call.value, shape);
  const int64_t images = images_at_a_time<P>(shape, channels_last, 2);
  const MapView lse = statistic_map(call.lse, shape);
  for (int64_t image = 0; image < shape.batch; image += images) {
    bool first = true;
    for_each_axis<P>(shape, channels_last, [&](Axis axis, auto block) {
      using B = decltype(block);
      ForwardPass<P> pass{};
      pass.key_channels = shape.key_channels;
      pass.value_channels = shape.value_channels;
      pass.scale = static_cast<Sum>(call.scale);
      pass.query = lines_of<T>(call.query, axis, shape);
      pass.key = lines_of<T>(call.key, axis, shape);
      pass.value = lines_of<T>(call.value, axis, shape);
      pass.output = lines_of<T>(call.output, axis, shape);
      pass.lse = lines_of<double>(lse, axis, shape);
      for_each_segment<P>(work_of<P, B>(shape, axis), image, smaller(images, shape.batch - image),
                          [&](const Work& work, int64_t blocks) {
                            pass.work = work;
                            pass.first = first;
                            pass.last = axis == last_axis(shape) && work.other_begin + work.other_count == work.length;
                            first = false;
                            launch(attend<P, B>, blocks, B::kThreads, BlockMemory<B>(work).bytes(), stream, pass);
                          });
    });
  }
}

template <class P>
void compute_delta(const CrissCrossBackward& call, void* delta, bool channels_last, void* stream) {
  using T = typename P::Element;
  const CrissCrossShape& shape = call.shape;
  DeltaPass<P> pass{};
  pass.planes = shape.frames;
  pass.lines = shape.rows;
  pass.length = shape.columns;
  pass.positions = shape.batch * shape.frames * shape.rows * shape.columns;
  pass.channels = shape.value_channels;
  pass.output = lines_of<T>(call.output, Axis::row, shape);
  pass.grad_output = lines_of<T>(call.grad_output, Axis::row, shape);
  pass.delta = static_cast<typename P::Sum*>(delta);
  launch(channels_last ? sum_products<P, true> : sum_products<P, false>, ceil_div(pass.positions, kDeltaPositions),
         kDeltaWarps * 32, kDeltaWarps * 32 * sizeof(typename P::Sum), stream, pass);
}

template <class P>
void backward(const CrissCrossBackward& call, void* delta, void* stream) {
  using T = typename P::Element;
  using Sum = typename P::Sum;
  const CrissCrossShape& shape = call.shape;
  const bool channels_last = is_channels_last(call.value, shape);
  compute_delta<P>(call, delta, channels_last, stream);
  const int64_t images = images_at_a_time<P>(shape, channels_last, 3);
  const MapView lse = statistic_map(call.lse, shape), deltas = statistic_map(delta, shape);
  for (int64_t image = 0; image < shape.batch; image += images) {
    bool first = true;
    for_each_axis<P>(shape, channels_last, [&](Axis axis, auto block) {
      using B = decltype(block);
      BackwardPass<P> pass{};
      pass.key_channels = shape.key_channels;
      pass.value_channels = shape.value_channels;
      pass.scale = static_cast<Sum>(call.scale);
      pass.query = lines_of<T>(call.query, axis, shape);
      pass.key = lines_of<T>(call.key, axis, shape);
      pass.value = lines_of<T>(call.value, axis, shape);
      pass.grad_output = lines_of<T>(call.grad_output, axis, shape);
      pass.grad_query = lines_of<T>(call.grad_query, axis, shape);
      pass.grad_key = lines_of<T>(call.grad_key, axis, shape);
      pass.grad_value = lines_of<T>(call.grad_value, axis, shape);
      pass.lse = lines_of<double>(lse, axis, shape);
      pass.delta = lines_of<Sum>(deltas, axis, shape);
      for_each_segment<P>(work_of<P, B>(shape, axis), image, smaller(images, shape.batch - image),
                          [&](const Work& work, int64_t blocks) {
                            pass.work = work;
                            pass.first = first;
                            first = false;
                            const size_t bytes = BlockMemory<B>(work).bytes();
                            launch(backward_of_queries<P, B>, blocks, B::kThreads, bytes, stream, pass);
                            launch(backward_of_keys<P, B>, blocks, B::kThreads, bytes, stream, pass);
                          });
    });
  }
}

// Calls run(product) for the element type.
template <class Run>
void with_product(DType dtype, bool allow_tf32, Run run) {
  switch (dtype) {
    case DType::float16:
      return run(PackedProduct<Float16>{});
    case DType::bfloat16:
      return run(PackedProduct<BFloat16>{});
    case DType::float64:
      return run(Float64Product{});
    case DType::float32:
      return allow_tf32 ? run(Tf32Product<false>{}) : run(Tf32Product<true>{});
  }
}

}  // namespace

size_t workspace_size(const CrissCrossForward&) { return 0; }

size_t workspace_size(const CrissCrossBackward& call) {
  if (is_empty(call.shape)) return 0;
  const int64_t positions = call.shape.batch * call.shape.frames * call.shape.rows * call.shape.columns;
  return static_cast<size_t>(positions) * (call.dtype == DType::float64 ? sizeof(double) : sizeof(float));  // delta
}

void run(const CrissCrossForward& call, void*, void* stream) {
  if (is_empty(call.shape)) return;
  with_product(call.dtype, call.allow_tf32, [&](auto product) { forward<decltype(product)>(call, stream); });
}

void run(const CrissCrossBackward& call, void* workspace, void* stream) {
  if (is_empty(call.shape)) return;
  with_product(call.dtype, call.allow_tf32,
               [&](auto product) { backward<decltype(product)>(call, workspace, stream); });
}

}  // namespace gingham::cuda
