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
// The kernels work on maps whose channels are adjacent. Others are copied into the workspace and back, some images at a
// time: read where they are, columns of a channels-first map would move a few bytes of each line of the cache, which
// took several times as long as all of the operator and the copies together.
//
// Held in device memory: lse, delta in backward, and such copies. Never a tensor of H + W. Between the passes the
// output and the gradients stay in their own place and type. For 16-bit types every pass so rounds the sum up to it
// once more, by half a unit in its last place, as much as rounding the weights costs: once an axis, and on a line of
// several passes once a pass. float32 parts would double the traffic. Floor, forward: query, key, value read and output
// written once, 2 (Ck + Cv) elements a position, against 2 (Ck + Cv) (H + W) operations: bytes, on a card that does
// more than some 100 operations a byte. Backward: 2 (4 Ck + 3 Cv) (H + W) operations here, of which 2 (3 Ck + 2 Cv) are
// the least; the rest is the price of gathers.
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "gingham/criss_cross_attention.h"
#include "lines.cuh"
#include "primitives.cuh"
#include "product.cuh"
#include "transpose.cuh"
#include "workspace.cuh"

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

// Which of the segment's positions lie on the cross of the lane's own ones: those that exist but itself, where it
// belongs to the rows.
struct Cross {
  int count, self[2];

  __device__ Cross(const Work& work, const Place& place) : count(work.other_count) {
    for (int half = 0; half < 2; ++half) {
      const int64_t own = place.own_begin - work.other_begin + place.own(half);
      self[half] = work.mask_self && own >= 0 && own < count ? static_cast<int>(own) : -1;
    }
  }
  __device__ bool has(int half, int other) const { return other < count && other != self[half]; }
};

// lse or delta at an own position; `otherwise` where there is none.
template <class T>
__device__ T at_own(const Lines<T>& map, const Place& place, int half, T otherwise) {
  if (!place.active || place.own(half) >= place.own_count) return otherwise;
  return *map.at(place.image, place.plane, place.first_line + place.line, place.own_begin + place.own(half));
}

// Logits become weights under the joint softmax; lse is brought up to date; the output so far is to be scaled by
// factors. A pass may meet none but infinitely small logits as long as others of the cross are finite: nothing is
// divided by a total of zero before the last pass, where it gives NaN as the definition does.
template <class P>
__device__ typename P::Weights softmax(typename P::Sum (&logits)[P::kSegment / 8][4], const ForwardPass<P>& pass,
                                       const Place& place, typename P::Sum (&factors)[2]) {
  using Sum = typename P::Sum;
  const Cross cross(pass.work, place);
  Sum largest[2] = {-INFINITY, -INFINITY}, kept[2], total[2];
  for_each_sum<P>(place, [&](int j, int e, int other) {
    Sum& x = logits[j][e];
    x = cross.has(e / 2, other) ? x * pass.scale : -INFINITY;
    largest[e / 2] = fmax(largest[e / 2], x);
  });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    for (int mask = 1; mask < 4; mask *= 2) largest[half] = fmax(largest[half], shuffle_xor(largest[half], mask));
    const Split<Sum> before(pass.first ? -INFINITY : at_own<double>(pass.lse, place, half, -INFINITY));
    largest[half] = fmax(largest[half], before.high);
    if (largest[half] == -INFINITY) largest[half] = 0;
    kept[half] = P::exponential((before.high - largest[half]) + before.low);
    total[half] = 0;
  }
  for_each_sum<P>(place, [&](int j, int e, int) {
    logits[j][e] = P::exponential(logits[j][e] - largest[e / 2]);
    total[e / 2] += logits[j][e];
  });
  Sum inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    for (int mask = 1; mask < 4; mask *= 2) total[half] += shuffle_xor(total[half], mask);
    total[half] += kept[half];
    inverse[half] = total[half] == 0 && !pass.last ? Sum(0) : Sum(1) / total[half];
    factors[half] = kept[half] * inverse[half];
    if (place.active && place.lane % 4 == 0 && place.own(half) < place.own_count) {
      *pass.lse.at(place.image, place.plane, place.first_line + place.line, place.own_begin + place.own(half)) =
          static_cast<double>(largest[half]) + static_cast<double>(log(total[half]));
    }
    inverse[half] *= P::kWeightScale;
  }
  for_each_sum<P>(place, [&](int j, int e, int) { logits[j][e] *= inverse[e / 2]; });
  return P::weights(logits);
}

template <class P>
__global__ void __launch_bounds__(kThreads, Block<P>::kBlocksPerProcessor)
    attend(const __grid_constant__ ForwardPass<P> pass) {
  using Sum = typename P::Sum;
  GINGHAM_SHARED_MEMORY(memory);
  const Place place(pass.work);
  Sum factors[2];
  Sum logits[P::kSegment / 8][4];
  multiply_rows<P>(logits, pass.query, pass.key, pass.key_channels, pass.work, place, memory);
  const auto weights = softmax<P>(logits, pass, place, factors);
  constexpr Sum kUndo[2] = {1 / P::kWeightScale, 1 / P::kWeightScale};
  gather_rows<P>(weights, pass.value, pass.output, pass.value_channels, kUndo, !pass.first, factors, pass.work, place,
                 memory);
}

// ---------------------------------------------------------------------------------------------- backward

// Gradients of earlier passes are added as they are.
template <class Sum>
__device__ constexpr Sum kOnes[2] = {1, 1};

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

constexpr int kDeltaPositions = 4 * kWarps;  // of a block

// delta = sum_c output * grad_output. A warp takes four positions, its lanes their channels.
template <class P>
__global__ void __launch_bounds__(kThreads) sum_products(const __grid_constant__ DeltaPass<P> pass) {
  using Sum = typename P::Sum;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kDeltaPositions;
  for (int i = warp; i < kDeltaPositions && begin + i < pass.positions; i += kWarps) {
    const int64_t position = begin + i, x = position % pass.length, line = position / pass.length % pass.lines;
    const int64_t plane = position / pass.length / pass.lines;
    const auto* output = pass.output.at(plane / pass.planes, plane % pass.planes, line, x);
    const auto* grad = pass.grad_output.at(plane / pass.planes, plane % pass.planes, line, x);
    Sum total = 0;
#pragma unroll 8
    for (int64_t c = lane; c < pass.channels; c += 32) total += P::to_sum(output[c]) * P::to_sum(grad[c]);
    for (int mask = 16; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
    if (lane == 0) pass.delta[position] = total;
  }
}

// lse or delta at the other positions of the warp's line as Numbers in shared memory, in place of the tiles: good from
// a product's end to the beginning of the next.
template <class P, class Number, class T>
__device__ const Number* at_others(const Lines<T>& map, const Work& work, const Place& place, unsigned char* memory) {
  static_assert(sizeof(Number) <= Block<P>::kChannels * sizeof(typename P::Element),
                "more than a tile has of a position");
  auto* numbers = reinterpret_cast<Number*>(memory);
  __syncthreads();  // the tiles are done with
  for (int i = threadIdx.x; i < place.line_count * work.other_padded; i += kThreads) {
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
template <class P>
__global__ void __launch_bounds__(kThreads, Block<P>::kBlocksPerProcessor)
    backward_of_queries(const __grid_constant__ BackwardPass<P> pass) {
  using Sum = typename P::Sum;
  GINGHAM_SHARED_MEMORY(memory);
  const Work& work = pass.work;
  const Place place(work);

  Sum sums[P::kSegment / 8][4];
  multiply_rows<P>(sums, pass.query, pass.key, pass.key_channels, work, place, memory);
  Split<Sum> lse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) lse[half] = Split<Sum>(at_own<double>(pass.lse, place, half, INFINITY));
  const Cross cross(work, place);
  for_each_sum<P>(place, [&](int j, int e, int other) {
    const Sum logarithm = (sums[j][e] * pass.scale - lse[e / 2].high) - lse[e / 2].low;
    sums[j][e] = cross.has(e / 2, other) ? P::exponential(logarithm) * P::kWeightScale : Sum(0);
  });
  const auto probabilities = P::weights(sums);

  multiply_rows<P>(sums, pass.grad_output, pass.value, pass.value_channels, work, place, memory);
  Sum delta[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) delta[half] = at_own<Sum>(pass.delta, place, half, 0);
  for_each_sum<P>(place, [&](int j, int e, int) {
    sums[j][e] = P::weight(probabilities, j, e) * (sums[j][e] - delta[e / 2]) * (pass.scale / P::kWeightScale);
  });
  Sum undo[2];
  const auto dlogits = scaled_weights<P>(sums, place, undo);
  gather_rows<P>(dlogits, pass.key, pass.grad_query, pass.key_channels, undo, !pass.first, kOnes<Sum>, work, place,
                 memory);
}

// Own positions are keys, the others the queries that see them: grad_value and grad_key.
template <class P>
__global__ void __launch_bounds__(kThreads, Block<P>::kBlocksPerProcessor)
    backward_of_keys(const __grid_constant__ BackwardPass<P> pass) {
  using Sum = typename P::Sum;
  GINGHAM_SHARED_MEMORY(memory);
  const Work& work = pass.work;
  const Place place(work);

  Sum sums[P::kSegment / 8][4];
  multiply_rows<P>(sums, pass.key, pass.query, pass.key_channels, work, place, memory);
  const auto* lse = at_others<P, Split<Sum>>(pass.lse, work, place, memory);
  const Cross cross(work, place);
  for_each_sum<P>(place, [&](int j, int e, int other) {
    const bool counts = place.active && cross.has(e / 2, other);
    const Split<Sum> of_query = counts ? lse[other] : Split<Sum>(0);
    const Sum logarithm = (sums[j][e] * pass.scale - of_query.high) - of_query.low;
    sums[j][e] = counts ? P::exponential(logarithm) * P::kWeightScale : Sum(0);
  });
  const auto probabilities = P::weights(sums);
  constexpr Sum kUndo[2] = {1 / P::kWeightScale, 1 / P::kWeightScale};
  gather_rows<P>(probabilities, pass.grad_output, pass.grad_value, pass.value_channels, kUndo, !pass.first, kOnes<Sum>,
                 work, place, memory);

  multiply_rows<P>(sums, pass.value, pass.grad_output, pass.value_channels, work, place, memory);
  const auto* delta = at_others<P, Sum>(pass.delta, work, place, memory);
  for_each_sum<P>(place, [&](int j, int e, int other) {
    const Sum of_query = place.active && other < work.other_count ? delta[other] : Sum(0);
    sums[j][e] = P::weight(probabilities, j, e) * (sums[j][e] - of_query) * (pass.scale / P::kWeightScale);
  });
  Sum undo[2];
  const auto dlogits = scaled_weights<P>(sums, place, undo);
  gather_rows<P>(dlogits, pass.query, pass.grad_key, pass.key_channels, undo, !pass.first, kOnes<Sum>, work, place,
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
  Lines<T> lines{static_cast<T*>(map.data), map.batch_stride, map.frame_stride, 0, 0, false};
  lines.line = axis == Axis::row ? map.row_stride : map.column_stride;
  lines.position = axis == Axis::row ? map.column_stride : axis == Axis::column ? map.row_stride : map.frame_stride;
  if (axis == Axis::frame) lines.plane = map.row_stride;
  const auto whole = [](int64_t size, int64_t stride) { return size <= 1 || stride % Vector<T>::kSize == 0; };
  lines.vectors = reinterpret_cast<uintptr_t>(map.data) % 16 == 0 && whole(shape.batch, map.batch_stride) &&
                  whole(shape.frames, map.frame_stride) && whole(shape.rows, map.row_stride) &&
                  whole(shape.columns, map.column_stride);
  return lines;
}

MapView statistic_map(const void* data, const CrissCrossShape& shape) {
  const int64_t plane = shape.rows * shape.columns;
  return {const_cast<void*>(data), shape.frames * plane, 0, plane, shape.columns, 1};
}

int64_t positions_of(const CrissCrossShape& shape) { return shape.frames * shape.rows * shape.columns; }
bool is_empty(const CrissCrossShape& shape) { return shape.batch <= 0 || positions_of(shape) <= 0; }

// The segment of the lines that begins there, the first one being the longest; there are as few as can be.
template <class P>
void take_segment(Work& work, int64_t begin) {
  const int64_t segment = ceil_div(work.length, ceil_div(work.length, P::kSegment));
  work.other_begin = begin;
  work.other_count = static_cast<int>(smaller(segment, work.length - begin));
  work.other_padded = static_cast<int>(ceil_div(work.other_count, kGroup) * kGroup);
}

// The lines of one axis in blocks.
template <class P>
Work work_of(const CrissCrossShape& shape, Axis axis) {
  Work work{};
  work.length = axis == Axis::row ? shape.columns : axis == Axis::column ? shape.rows : shape.frames;
  work.lines = axis == Axis::row ? shape.rows : shape.columns;
  work.planes = axis == Axis::frame ? shape.rows : shape.frames;
  work.tiles_per_line = static_cast<int>(smaller(ceil_div(work.length, 16), kWarps));
  work.lines_per_block = static_cast<int>(smaller(work.lines, kWarps / work.tiles_per_line));
  take_segment<P>(work, 0);
  while (BlockMemory<P>(work).bytes() > kMostSharedBytes) --work.lines_per_block;
  work.line_groups = ceil_div(work.lines, work.lines_per_block);
  work.own_tiles = ceil_div(work.length, work.own_positions());
  work.mask_self = axis != Axis::row;
  return work;
}

// Calls launch_segment(work, blocks) for each segment of the lines and as many images as a grid has room for.
template <class P, class Launch>
void for_each_segment(Work work, int64_t batch, Launch launch_segment) {
  const int64_t images = larger((int64_t{1} << 30) / work.blocks_of_image(), 1);
  for (int64_t begin = 0; begin < work.length; begin += work.other_count) {
    take_segment<P>(work, begin);
    for (work.first_image = 0; work.first_image < batch; work.first_image += images) {
      launch_segment(work, smaller(images, batch - work.first_image) * work.blocks_of_image());
    }
  }
}

// Calls run(axis) for each axis along which positions have neighbours; rows always and first, because they hold the
// position itself.
template <class Run>
void for_each_axis(const CrissCrossShape& shape, Run run) {
  run(Axis::row);
  if (shape.rows > 1) run(Axis::column);
  if (shape.frames > 1) run(Axis::frame);
}
Axis last_axis(const CrissCrossShape& shape) {
  return shape.frames > 1 ? Axis::frame : shape.rows > 1 ? Axis::column : Axis::row;
}

// Of maps with adjacent channels.
template <class P>
void forward(const CrissCrossForward& call, void* stream) {
  using T = typename P::Element;
  const CrissCrossShape& shape = call.shape;
  const MapView lse = statistic_map(call.lse, shape);
  bool first = true;
  for_each_axis(shape, [&](Axis axis) {
    ForwardPass<P> pass{};
    pass.key_channels = shape.key_channels;
    pass.value_channels = shape.value_channels;
    pass.scale = static_cast<typename P::Sum>(call.scale);
    pass.query = lines_of<T>(call.query, axis, shape);
    pass.key = lines_of<T>(call.key, axis, shape);
    pass.value = lines_of<T>(call.value, axis, shape);
    pass.output = lines_of<T>(call.output, axis, shape);
    pass.lse = lines_of<double>(lse, axis, shape);
    for_each_segment<P>(work_of<P>(shape, axis), shape.batch, [&](const Work& work, int64_t blocks) {
      pass.work = work;
      pass.first = first && work.other_begin == 0;
      pass.last = axis == last_axis(shape) && work.other_begin + work.other_count == work.length;
      launch(attend<P>, blocks, kThreads, BlockMemory<P>(work).bytes(), stream, pass);
    });
    first = false;
  });
}

template <class P>
void compute_delta(const CrissCrossBackward& call, void* delta, void* stream) {
  using T = typename P::Element;
  const CrissCrossShape& shape = call.shape;
  DeltaPass<P> pass{};
  pass.planes = shape.frames;
  pass.lines = shape.rows;
  pass.length = shape.columns;
  pass.positions = shape.batch * positions_of(shape);
  pass.channels = shape.value_channels;
  pass.output = lines_of<T>(call.output, Axis::row, shape);
  pass.grad_output = lines_of<T>(call.grad_output, Axis::row, shape);
  pass.delta = static_cast<typename P::Sum*>(delta);
  launch(sum_products<P>, ceil_div(pass.positions, kDeltaPositions), kThreads, 0, stream, pass);
}

// Of maps with adjacent channels.
template <class P>
void backward(const CrissCrossBackward& call, void* delta, void* stream) {
  using T = typename P::Element;
  using Sum = typename P::Sum;
  const CrissCrossShape& shape = call.shape;
  compute_delta<P>(call, delta, stream);
  const MapView lse = statistic_map(call.lse, shape), deltas = statistic_map(delta, shape);
  bool first = true;
  for_each_axis(shape, [&](Axis axis) {
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
    for_each_segment<P>(work_of<P>(shape, axis), shape.batch, [&](const Work& work, int64_t blocks) {
      pass.work = work;
      pass.first = first && work.other_begin == 0;
      const size_t bytes = BlockMemory<P>(work).bytes();
      launch(backward_of_queries<P>, blocks, kThreads, bytes, stream, pass);
      launch(backward_of_keys<P>, blocks, kThreads, bytes, stream, pass);
    });
    first = false;
  });
}

// ---------------------------------------------------------------------------------------------- copies

using Maps = std::initializer_list<MapView>;

bool have_adjacent_channels(Maps maps, int64_t channels) {
  for (const MapView& map : maps) {
    if (map.channel_stride != 1 && channels > 1) return false;
  }
  return true;
}

// Room in the workspace for maps of some images with adjacent channels, padded so that these can be moved 16 bytes at a
// time; none where all of the call's own maps are such. One map does not tell for the others: with a single column,
// adjacent channels and adjacent columns may both be said of it.
template <class T>
class Copies {
 public:
  Copies(const CrissCrossShape& shape, Maps of_keys, Maps of_values, Workspace& workspace)
      : workspace_(workspace), shape_(shape) {
    if (have_adjacent_channels(of_keys, shape.key_channels) &&
        have_adjacent_channels(of_values, shape.value_channels)) {
      return;
    }
    const int64_t channels = static_cast<int64_t>(of_keys.size()) * padded(shape.key_channels) +
                             static_cast<int64_t>(of_values.size()) * padded(shape.value_channels);
    const int64_t fit = kCopyBytes / (static_cast<int64_t>(sizeof(T)) * positions_of(shape) * larger(channels, 1));
    shape_.batch = smaller(larger(fit, 1), shape.batch);
    needed_ = true;
  }
  bool needed() const { return needed_; }
  int64_t images() const { return shape_.batch; }

  MapView take(int64_t channels) {
    if (!needed_) return {};
    const int64_t column = padded(channels), row = shape_.columns * column, frame = shape_.rows * row;
    return {workspace_.take<T>(shape_.batch * shape_.frames * frame), shape_.frames * frame, 1, frame, row, column};
  }

 private:
  static int64_t padded(int64_t channels) { return ceil_div(channels, Vector<T>::kSize) * Vector<T>::kSize; }

  Workspace& workspace_;
  CrissCrossShape shape_;
  bool needed_ = false;
};

template <class T>
MapView images_from(const MapView& map, int64_t image) {
  MapView rest = map;
  rest.data = static_cast<T*>(map.data) + image * map.batch_stride;
  return rest;
}
MapSizes sizes_of(const CrissCrossShape& shape, int64_t channels) {
  return {shape.batch, channels, shape.frames, shape.rows, shape.columns};
}

template <class T>
struct ForwardWork {
  Copies<T> copies;
  MapView query, key, value, output;

  ForwardWork(const CrissCrossForward& call, Workspace& workspace)
      : copies(call.shape, {call.query, call.key}, {call.value, call.output}, workspace),
        query(copies.take(call.shape.key_channels)),
        key(copies.take(call.shape.key_channels)),
        value(copies.take(call.shape.value_channels)),
        output(copies.take(call.shape.value_channels)) {}

  // run_part(call of copies) for some images at a time.
  template <class Run>
  void run(const CrissCrossForward& call, void* stream, Run run_part) const {
    if (!copies.needed()) return run_part(call);
    CrissCrossForward part = call;
    part.query = query, part.key = key, part.value = value, part.output = output;
    for (int64_t image = 0; image < call.shape.batch; image += copies.images()) {
      part.shape.batch = smaller(copies.images(), call.shape.batch - image);
      part.lse = call.lse + image * positions_of(call.shape);
      const MapSizes of_keys = sizes_of(part.shape, call.shape.key_channels);
      const MapSizes of_values = sizes_of(part.shape, call.shape.value_channels);
      copy_transposed<T, true>(of_keys, images_from<T>(call.query, image), query, stream);
      copy_transposed<T, true>(of_keys, images_from<T>(call.key, image), key, stream);
      copy_transposed<T, true>(of_values, images_from<T>(call.value, image), value, stream);
      run_part(part);
      copy_transposed<T, false>(of_values, output, images_from<T>(call.output, image), stream);
    }
  }
};

template <class T>
struct BackwardWork {
  Sum<T>* delta;
  Copies<T> copies;
  MapView query, key, value, output, grad_output, grad_query, grad_key, grad_value;

  BackwardWork(const CrissCrossBackward& call, Workspace& workspace)
      : delta(workspace.take<Sum<T>>(call.shape.batch * positions_of(call.shape))),
        copies(call.shape, {call.query, call.key, call.grad_query, call.grad_key},
               {call.value, call.output, call.grad_output, call.grad_value}, workspace),
        query(copies.take(call.shape.key_channels)),
        key(copies.take(call.shape.key_channels)),
        value(copies.take(call.shape.value_channels)),
        output(copies.take(call.shape.value_channels)),
        grad_output(copies.take(call.shape.value_channels)),
        grad_query(copies.take(call.shape.key_channels)),
        grad_key(copies.take(call.shape.key_channels)),
        grad_value(copies.take(call.shape.value_channels)) {}

  template <class Run>
  void run(const CrissCrossBackward& call, void* stream, Run run_part) const {
    if (!copies.needed()) return run_part(call);
    CrissCrossBackward part = call;
    part.query = query, part.key = key, part.value = value, part.output = output, part.grad_output = grad_output;
    part.grad_query = grad_query, part.grad_key = grad_key, part.grad_value = grad_value;
    for (int64_t image = 0; image < call.shape.batch; image += copies.images()) {
      part.shape.batch = smaller(copies.images(), call.shape.batch - image);
      part.lse = call.lse + image * positions_of(call.shape);
      const MapSizes of_keys = sizes_of(part.shape, call.shape.key_channels);
      const MapSizes of_values = sizes_of(part.shape, call.shape.value_channels);
      copy_transposed<T, true>(of_keys, images_from<T>(call.query, image), query, stream);
      copy_transposed<T, true>(of_keys, images_from<T>(call.key, image), key, stream);
      copy_transposed<T, true>(of_values, images_from<T>(call.value, image), value, stream);
      copy_transposed<T, true>(of_values, images_from<T>(call.output, image), output, stream);
      copy_transposed<T, true>(of_values, images_from<T>(call.grad_output, image), grad_output, stream);
      run_part(part);
      copy_transposed<T, false>(of_keys, grad_query, images_from<T>(call.grad_query, image), stream);
      copy_transposed<T, false>(of_keys, grad_key, images_from<T>(call.grad_key, image), stream);
      copy_transposed<T, false>(of_values, grad_value, images_from<T>(call.grad_value, image), stream);
    }
  }
};

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

size_t workspace_size(const CrissCrossForward& call) {
  return is_empty(call.shape) ? 0 : size_of_workspace<ForwardWork>(call);
}
size_t workspace_size(const CrissCrossBackward& call) {
  return is_empty(call.shape) ? 0 : size_of_workspace<BackwardWork>(call);
}

void run(const CrissCrossForward& call, void* memory, void* stream) {
  if (is_empty(call.shape)) return;
  with_product(call.dtype, call.allow_tf32, [&](auto product) {
    using P = decltype(product);
    Workspace workspace(memory);
    ForwardWork<typename P::Element>(call, workspace).run(call, stream, [&](const CrissCrossForward& part) {
      forward<P>(part, stream);
    });
  });
}

void run(const CrissCrossBackward& call, void* memory, void* stream) {
  if (is_empty(call.shape)) return;
  with_product(call.dtype, call.allow_tf32, [&](auto product) {
    using P = decltype(product);
    Workspace workspace(memory);
    const BackwardWork<typename P::Element> work(call, workspace);
    work.run(call, stream, [&](const CrissCrossBackward& part) { backward<P>(part, work.delta, stream); });
  });
}

}  // namespace gingham::cuda
