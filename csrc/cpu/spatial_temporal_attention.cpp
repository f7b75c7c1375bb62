// Spatial-temporal attention on the CPU.
//
// Everything that the operator says of a clip follows from two reductions of its features: the sums of every channel
// over every band of rows, and the energy of every position over the channels. Forward reads the features once and
// forms both; backward reads them once more and writes the gradient, which at a position is a number of the channel and
// the band plus the feature times a number of the position. So memory is the limit: one pass, and two, over the
// features.
//
// Channels first: a channel's plane is a few vectors of adjacent positions. As many channels as a vector has lanes go
// side by side, so that a vector of energies is loaded once for all of them, and so that the lanes of their sums are
// added up for all of them together. Channels last: positions go by fours, so that a vector of sums is loaded once for
// all four. A task is some channels of one frame; it leaves the energies of its channels in the workspace, where a
// second stage adds them up in the order of the channels. How the channels are cut depends on the layout alone, so that
// neither the number of threads nor that of frames changes a bit.
#include "gingham/spatial_temporal_attention.h"

#include "elements.h"
#include "parallel.h"
#include "simd.h"

namespace {

using gingham::MapView;
using gingham::ParallelFor;
using gingham::SpatialEnergy;
using gingham::SpatialTemporalPooling;
using gingham::SpatialTemporalPoolingBackward;
using gingham::SpatialTemporalShape;
using gingham::SpatialTemporalSums;
using gingham::SpatialTemporalSumsBackward;

// ---------------------------------------------------------------------------------------------- how a call is cut

// A stretch of a band whose positions follow one another in memory.
struct Line {
  int64_t row, position, length;  // where it begins
};

// The frames of a call, their bands, and the lines of these: rows, or the whole band where rows follow without a gap.
struct Frames {
  SpatialTemporalShape shape;
  bool channels_last, whole = true;

  Frames(const SpatialTemporalShape& shape, const MapView& features) : shape(shape) {
    channels_last = features.channel_stride == 1 && (features.column_stride != 1 || positions() == 1);
    also(features);
  }
  // Where another map goes along.
  Frames also(const MapView& map) {
    const int64_t step = channels_last ? map.column_stride : 1;  // from a position to the next
    whole = whole && (map.row_stride == shape.columns * step || shape.rows == 1);
    return *this;
  }
  int64_t count() const { return shape.batch * shape.frames; }
  int64_t positions() const { return shape.rows * shape.columns; }
  int64_t first_row(int64_t part) const { return part * shape.rows / shape.parts; }
  int64_t first_position(int64_t part) const { return first_row(part) * shape.columns; }
  int64_t positions_of(int64_t part) const { return first_position(part + 1) - first_position(part); }
  int64_t lines_of(int64_t part) const { return whole ? 1 : first_row(part + 1) - first_row(part); }
  Line line(int64_t part, int64_t index) const {
    const int64_t row = first_row(part) + index;
    return {row, row * shape.columns, whole ? positions_of(part) : shape.columns};
  }

  // A task has about a page of each plane, or of each position.
  int64_t channels_of_a_task() const { return channels_last ? 512 : 128; }
  int64_t tasks_of_a_frame() const { return (shape.channels + channels_of_a_task() - 1) / channels_of_a_task(); }
};

// Some channels of a frame.
struct Task {
  int64_t frame, first_channel, channels;

  Task(const Frames& frames, int64_t index) {
    frame = index / frames.tasks_of_a_frame();
    first_channel = index % frames.tasks_of_a_frame() * frames.channels_of_a_task();
    channels = smaller(frames.channels_of_a_task(), frames.shape.channels - first_channel);
  }
  // Its first channel's first position.
  template <class E>
  E* in(const Frames& frames, const MapView& map) const {
    return static_cast<E*>(map.data) + frame / frames.shape.frames * map.batch_stride +
           frame % frames.shape.frames * map.frame_stride + first_channel * map.channel_stride;
  }
};

// A thread is worth waking for some ten microseconds of work.
int useful_threads(int64_t elements, int threads) { return int(smaller(threads, 1 + elements / (64 * 1024))); }

int64_t sum_size(gingham::DType dtype) { return dtype == gingham::DType::float64 ? 8 : 4; }

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

template <class Sum>
Sum sum_of(const Sum* numbers, int64_t count) {
  Vector<Sum> sum{};
  int64_t i = 0;
  for (; i + kLanes<Sum> <= count; i += kLanes<Sum>) sum += load(numbers + i);
  return sum_of_lanes(sum + load_part(numbers + i, count - i));
}

// Features are read in runs of a few hundred bytes, which are too short for the hardware to see the line that they
// make: asks for what lies a little further on. Where a plane, or a position, is larger than that, it is what comes
// next.
constexpr int64_t kAhead = 8 * 1024;  // bytes
template <class E>
inline void prefetch_ahead(const E* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead, 0, 3);
}

// ---------------------------------------------------------------------------------------------- sums and energies

// kChannels planes: their squares are added to energies [positions], their sums over the bands stored in
// sums [parts][channels].
template <int kChannels, class E, class Sum>
void add_planes(const Frames& frames, const MapView& map, const E* planes, Sum* energies, Sum* sums) {
  constexpr int kN = kLanes<Sum>;
  const int64_t stride = map.channel_stride;
  for (int64_t part = 0; part < frames.shape.parts; ++part) {
    Vector<Sum> totals[kChannels] = {};
    for (int64_t l = 0; l < frames.lines_of(part); ++l) {
      const Line line = frames.line(part, l);
      const E* from = planes + line.row * map.row_stride;
      Sum* energy = energies + line.position;
      const auto add = [&](int64_t x, Vector<Sum> even, auto load_features) __attribute__((always_inline)) {
        Vector<Sum> odd{};
#pragma GCC unroll 16
        for (int i = 0; i < kChannels; ++i) {
          prefetch_ahead(from + i * stride + x);
          const Vector<Sum> f = load_features(from + i * stride + x);
          totals[i] += f;
          (i % 2 ? odd : even) += f * f;
        }
        return even + odd;
      };
      int64_t x = 0;
      for (; x + kN <= line.length; x += kN) {
        store(energy + x, add(x, load(energy + x), [](const E* p) { return load_widened(p); }));
      }
      if (x == line.length) continue;
      const int rest = int(line.length - x);
      const auto some = [=](const E* p) { return load_widened(p, rest); };
      store_part(energy + x, add(x, load_part(energy + x, rest), some), rest);
    }
    Sum* sum = sums + part * frames.shape.channels;
    if constexpr (kChannels == 1) {
      *sum = sum_of_lanes(totals[0]);
    } else {
      store(sum, fold_lanes<Sum>(totals, [](Vector<Sum> a, Vector<Sum> b) { return a + b; }));
    }
  }
}

template <class E, class Sum>
GINGHAM_STEP void sum_planes(const Frames& frames, const MapView& map, const E* planes, int64_t channels, Sum* energies,
                             Sum* sums) {
  constexpr int kN = kLanes<Sum>;
  for (int64_t p = 0; p < frames.positions(); ++p) energies[p] = 0;
  int64_t c = 0;
  for (; c + kN <= channels; c += kN) {
    add_planes<kN>(frames, map, planes + c * map.channel_stride, energies, sums + c);
  }
  for (; c < channels; ++c) add_planes<1>(frames, map, planes + c * map.channel_stride, energies, sums + c);
}

// kPositions neighbouring positions: their features are added to sums [channels] (stored there, if they are the first
// of a band), their energies stored.
template <int kPositions, class E, class Sum>
void add_positions(const E* features, int64_t stride, int64_t channels, bool first, Sum* energies, Sum* sums) {
  constexpr int kN = kLanes<Sum>;
  constexpr int kAheadPositions = 8;
  Vector<Sum> squares[kPositions] = {};
  const auto add = [&](int64_t c, Vector<Sum> sum, auto load_features) __attribute__((always_inline)) {
    Vector<Sum> f[kPositions];
#pragma GCC unroll 4
    for (int i = 0; i < kPositions; ++i) {
      __builtin_prefetch(features + (i + kAheadPositions) * stride + c, 0, 3);
      f[i] = load_features(features + i * stride + c);
      squares[i] += f[i] * f[i];
    }
    if constexpr (kPositions == 4) return sum + ((f[0] + f[1]) + (f[2] + f[3]));
    return sum + f[0];
  };
  int64_t c = 0;
  for (; c + kN <= channels; c += kN) {
    const auto all = [](const E* p) { return load_widened(p); };
    store(sums + c, add(c, first ? Vector<Sum>{} : load(sums + c), all));
  }
  if (c < channels) {
    const int rest = int(channels - c);
    const auto some = [=](const E* p) { return load_widened(p, rest); };
    store_part(sums + c, add(c, first ? Vector<Sum>{} : load_part(sums + c, rest), some), rest);
  }
  for (int i = 0; i < kPositions; ++i) energies[i] = sum_of_lanes(squares[i]);
}

template <class E, class Sum>
GINGHAM_STEP void sum_positions(const Frames& frames, const MapView& map, const E* features, int64_t channels,
                                Sum* energies, Sum* sums) {
  const int64_t stride = map.column_stride;
  for (int64_t part = 0; part < frames.shape.parts; ++part) {
    bool first = true;
    for (int64_t l = 0; l < frames.lines_of(part); ++l) {
      const Line line = frames.line(part, l);
      const E* from = features + line.row * map.row_stride;
      Sum *energy = energies + line.position, *sum = sums + part * frames.shape.channels;
      int64_t x = 0;
      for (; x + 4 <= line.length; x += 4, first = false) {
        add_positions<4>(from + x * stride, stride, channels, first, energy + x, sum);
      }
      for (; x < line.length; ++x, first = false) {
        add_positions<1>(from + x * stride, stride, channels, first, energy + x, sum);
      }
    }
  }
}

// What the tasks of a frame left becomes its map, its shares and its total.
template <class Sum>
GINGHAM_STEP void normalize(const Frames& frames, const Sum* energies, SpatialEnergy energy, Sum eps, Sum* map,
                            Sum* shares, Sum* total) {
  const int64_t positions = frames.positions(), parts = frames.shape.parts;
  for (int64_t p = 0; p < positions; p += kLanes<Sum>) {
    Vector<Sum> sum{};
    for (int64_t i = 0; i < frames.tasks_of_a_frame(); ++i) {
      sum += load_part(energies + i * positions + p, smaller(kLanes<Sum>, positions - p));
    }
    store_part(map + p, sum, positions - p);
  }
  const Sum squares = sum_of(map, positions);
  if (energy != SpatialEnergy::sq) {
    for (int64_t p = 0; p < positions; ++p) map[p] = square_root(map[p]);
  }
  Sum sum_of_bands = 0;
  for (int64_t k = 0; k < parts; ++k) {
    shares[k] = sum_of(map + frames.first_position(k), frames.positions_of(k));
    sum_of_bands += shares[k];
  }
  *total = energy == SpatialEnergy::agrl ? square_root(squares) : sum_of_bands;
  const Sum divisor = *total <= eps ? eps : *total;
  for (int64_t p = 0; p < positions; ++p) map[p] /= divisor;
  for (int64_t k = 0; k < parts; ++k) {
    shares[k] /= divisor;
    if (energy == SpatialEnergy::agrl) shares[k] /= Sum(frames.positions_of(k));
  }
}

template <class E>
void sum_frames(const SpatialTemporalSums& call, int threads, void* workspace, ParallelFor parallel_for) {
  using Sum = Accumulator<E>;
  const Frames frames(call.shape, call.features);
  const int64_t positions = frames.positions(), parts = call.shape.parts, tasks = frames.tasks_of_a_frame();
  threads = useful_threads(frames.count() * call.shape.channels * positions, threads);
  Sum* energies = static_cast<Sum*>(workspace);  // [frame][task][position]
  for_each_index(0, frames.count() * tasks, threads, parallel_for, [&](int64_t index, int64_t) {
    const Task task(frames, index);
    const E* features = task.in<const E>(frames, call.features);
    Sum* sums = static_cast<Sum*>(call.sums) + task.frame * parts * call.shape.channels + task.first_channel;
    if (frames.channels_last) {
      sum_positions(frames, call.features, features, task.channels, energies + index * positions, sums);
    } else {
      sum_planes(frames, call.features, features, task.channels, energies + index * positions, sums);
    }
  });
  for_each_index(0, frames.count(), threads, parallel_for, [&](int64_t frame, int64_t) {
    normalize(frames, energies + frame * tasks * positions, call.energy, Sum(call.eps),
              static_cast<Sum*>(call.map) + frame * positions, static_cast<Sum*>(call.shares) + frame * parts,
              static_cast<Sum*>(call.totals) + frame);
  });
}

// ---------------------------------------------------------------------------------------------- pooling

// The scores of a clip's frames, and the frame that is chosen for each part.
template <class Sum>
void score_clip(const SpatialTemporalShape& shape, Sum eps, const Sum* shares, Sum* part_totals, Sum* scores,
                int64_t* chosen) {
  for (int64_t k = 0; k < shape.parts; ++k) {
    Sum total = 0;
    int64_t best = 0;
    for (int64_t t = 0; t < shape.frames; ++t) {
      const Sum share = shares[t * shape.parts + k];
      total += share;
      if (share > shares[best * shape.parts + k]) best = t;
    }
    part_totals[k] = total;
    chosen[k] = best;
    const Sum divisor = total <= eps ? eps : total;
    for (int64_t t = 0; t < shape.frames; ++t) scores[t * shape.parts + k] = shares[t * shape.parts + k] / divisor;
  }
}

// A vector of channels, or its first `count`, of both halves of pooled.
template <class E, class Sum>
inline void pool_channels(const SpatialTemporalShape& shape, const Sum* sums, const Sum* scores, const int64_t* chosen,
                          int64_t count, E* pooled) {
  const auto row = [&](int64_t t, int64_t k) {
    const Sum* at = sums + (t * shape.parts + k) * shape.channels;
    return count == kLanes<Sum> ? load(at) : load_part(at, count);
  };
  Vector<Sum> top{}, all{};
  for (int64_t k = 0; k < shape.parts; ++k) top += row(chosen[k], k);
  for (int64_t t = 0; t < shape.frames; ++t) {
    for (int64_t k = 0; k < shape.parts; ++k) all += broadcast(scores[t * shape.parts + k]) * row(t, k);
  }
  const Vector<Sum> positions = broadcast(Sum(shape.rows * shape.columns));
  if (count == kLanes<Sum>) {
    store_narrowed(pooled, top / positions);
    store_narrowed(pooled + shape.channels, all / positions);
  } else {
    store_narrowed(pooled, top / positions, int(count));
    store_narrowed(pooled + shape.channels, all / positions, int(count));
  }
}

template <class E>
void pool_clips(const SpatialTemporalPooling& call, int threads, ParallelFor parallel_for) {
  using Sum = Accumulator<E>;
  const SpatialTemporalShape& shape = call.shape;
  constexpr int64_t kChannels = 128;  // of a task
  const int64_t rows = shape.frames * shape.parts, tasks = (shape.channels + kChannels - 1) / kChannels;
  threads = useful_threads(shape.batch * rows * shape.channels, threads);
  Sum* scores = static_cast<Sum*>(call.scores);
  for_each_index(0, shape.batch, threads, parallel_for, [&](int64_t clip, int64_t) {
    score_clip(shape, Sum(call.eps), static_cast<const Sum*>(call.shares) + clip * rows,
               static_cast<Sum*>(call.part_totals) + clip * shape.parts, scores + clip * rows,
               call.chosen + clip * shape.parts);
  });
  for_each_index(0, shape.batch * tasks, threads, parallel_for, [&](int64_t index, int64_t) {
    const int64_t clip = index / tasks, first = index % tasks * kChannels;
    const int64_t last = smaller(first + kChannels, shape.channels);
    for (int64_t c = first; c < last; c += kLanes<Sum>) {
      pool_channels(shape, static_cast<const Sum*>(call.sums) + clip * rows * shape.channels + c, scores + clip * rows,
                    call.chosen + clip * shape.parts, smaller(kLanes<Sum>, last - c),
                    static_cast<E*>(call.pooled) + clip * 2 * shape.channels + c);
    }
  });
}

// ---------------------------------------------------------------------------------------------- gradient of pooling

// The gradient of the sums of one part of one frame [channels]; returns that of its score.
template <class E, class Sum>
Sum pool_gradient(const SpatialTemporalPoolingBackward& call, int64_t frame, int64_t part) {
  const SpatialTemporalShape& shape = call.shape;
  const int64_t clip = frame / shape.frames, row = frame * shape.parts + part;
  const E* grad_top = static_cast<const E*>(call.grad_pooled) + clip * 2 * shape.channels;
  const E* grad_all = grad_top + shape.channels;
  const Sum* sums = static_cast<const Sum*>(call.sums) + row * shape.channels;
  Sum* grad_sums = static_cast<Sum*>(call.grad_sums) + row * shape.channels;
  const bool is_chosen = call.chosen[clip * shape.parts + part] == frame % shape.frames;
  const Sum positions = Sum(shape.rows * shape.columns);
  const Vector<Sum> top = broadcast(Sum(is_chosen ? 1 : 0) / positions);
  const Vector<Sum> all = broadcast(static_cast<const Sum*>(call.scores)[row] / positions);
  Vector<Sum> products{};
  int64_t c = 0;
  for (; c + kLanes<Sum> <= shape.channels; c += kLanes<Sum>) {
    const Vector<Sum> d = load_widened(grad_all + c);
    products += d * load(sums + c);
    store(grad_sums + c, top * load_widened(grad_top + c) + all * d);
  }
  if (c < shape.channels) {
    const int rest = int(shape.channels - c);
    const Vector<Sum> d = load_widened(grad_all + c, rest);
    products += d * load_part(sums + c, rest);
    store_part(grad_sums + c, top * load_widened(grad_top + c, rest) + all * d, rest);
  }
  const Sum grad = static_cast<const Sum*>(call.grad_scores)[row];
  return call.detach_attention ? grad : grad + sum_of_lanes(products) / positions;
}

template <class E>
void differentiate_pooling(const SpatialTemporalPoolingBackward& call, int threads, ParallelFor parallel_for) {
  using Sum = Accumulator<E>;
  const SpatialTemporalShape& shape = call.shape;
  const int64_t rows = shape.frames * shape.parts;
  threads = useful_threads(shape.batch * rows * shape.channels, threads);
  Sum* grad_shares = static_cast<Sum*>(call.grad_shares);  // at first of the scores
  for_each_index(0, shape.batch * rows, threads, parallel_for, [&](int64_t row, int64_t) {
    grad_shares[row] = pool_gradient<E, Sum>(call, row / shape.parts, row % shape.parts);
  });
  for (int64_t clip = 0; clip < shape.batch; ++clip) {
    const Sum* scores = static_cast<const Sum*>(call.scores) + clip * rows;
    for (int64_t k = 0; k < shape.parts; ++k) {
      const Sum total = static_cast<const Sum*>(call.part_totals)[clip * shape.parts + k];
      Sum *grads = grad_shares + clip * rows, mean = 0;
      for (int64_t row = k; row < rows; row += shape.parts) mean += scores[row] * grads[row];
      for (int64_t row = k; row < rows; row += shape.parts) {
        grads[row] = total <= Sum(call.eps) ? 0 : (grads[row] - mean) / total;
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------- gradient of features
//
//   grad_features[c, p] = grad_sums[part of p, c] + factors[p] * features[c, p]

template <class Sum>
void position_factors(const SpatialTemporalSumsBackward& call, const Frames& frames, int64_t frame, Sum* factors) {
  const int64_t positions = frames.positions(), parts = call.shape.parts;
  const Sum total = static_cast<const Sum*>(call.totals)[frame];
  const Sum* map = static_cast<const Sum*>(call.map) + frame * positions;
  const Sum* grad_map = call.grad_map ? static_cast<const Sum*>(call.grad_map) + frame * positions : nullptr;
  const bool agrl = call.energy == SpatialEnergy::agrl;
  Sum along = 0;  // what the normalisation over positions takes away
  for (int64_t k = 0; k < parts; ++k) {
    const Sum grad = static_cast<const Sum*>(call.grad_shares)[frame * parts + k];
    const Sum of_position = agrl ? grad / Sum(frames.positions_of(k)) : grad;
    for (int64_t p = frames.first_position(k); p < frames.first_position(k + 1); ++p) {
      factors[p] = grad_map ? of_position + grad_map[p] : of_position;
      along += map[p] * factors[p];
    }
  }
  for (int64_t p = 0; p < positions; ++p) {
    if (total <= Sum(call.eps)) {
      factors[p] = 0;
    } else if (call.energy == SpatialEnergy::sq) {
      factors[p] = 2 * (factors[p] - along) / total;
    } else {  // a norm, whose gradient is features / norm, or 0 where there are none
      const Sum norm = map[p] * total;
      const Sum grad = (factors[p] - (agrl ? map[p] * along : along)) / total;
      factors[p] = norm > 0 || norm != norm ? grad / norm : 0;
    }
  }
}

// Some neighbouring planes of a task.
template <class E, class Sum>
GINGHAM_STEP void apply_to_planes(const Frames& frames, const MapView& from_map, const MapView& to_map, const E* from,
                                  int64_t channels, const Sum* addends, const Sum* factors, E* to) {
  constexpr int kN = kLanes<Sum>;
  for (int64_t part = 0; part < frames.shape.parts; ++part) {
    const Sum* addend = addends + part * frames.shape.channels;
    for (int64_t l = 0; l < frames.lines_of(part); ++l) {
      const Line line = frames.line(part, l);
      const E* f = from + line.row * from_map.row_stride;
      E* grad = to + line.row * to_map.row_stride;
      const Sum* factor = factors + line.position;
      int64_t x = 0;
      for (; x + 2 * kN <= line.length; x += 2 * kN) {
        const Vector<Sum> first = load(factor + x), second = load(factor + x + kN);
        for (int64_t c = 0; c < channels; ++c) {
          const E* at = f + c * from_map.channel_stride + x;
          E* grad_at = grad + c * to_map.channel_stride + x;
          prefetch_ahead(at);
          if (sizeof(E) * kN == 64) prefetch_ahead(at + kN);
          store_narrowed(grad_at, load_widened(at) * first + broadcast(addend[c]));
          store_narrowed(grad_at + kN, load_widened(at + kN) * second + broadcast(addend[c]));
        }
      }
      for (; x < line.length; x += kN) {
        const int rest = int(smaller(kN, line.length - x));
        const Vector<Sum> some = load_part(factor + x, rest);
        for (int64_t c = 0; c < channels; ++c) {
          const E* at = f + c * from_map.channel_stride + x;
          E* grad_at = grad + c * to_map.channel_stride + x;
          prefetch_ahead(at);
          if (rest == kN) {
            store_narrowed(grad_at, load_widened(at) * some + broadcast(addend[c]));
          } else {
            store_narrowed(grad_at, load_widened(at, rest) * some + broadcast(addend[c]), rest);
          }
        }
      }
    }
  }
}

template <class E, class Sum>
GINGHAM_STEP void apply_to_positions(const Frames& frames, const MapView& from_map, const MapView& to_map,
                                     const E* from, int64_t channels, const Sum* addends, const Sum* factors, E* to) {
  constexpr int kN = kLanes<Sum>, kAheadPositions = 8;
  for (int64_t part = 0; part < frames.shape.parts; ++part) {
    const Sum* addend = addends + part * frames.shape.channels;
    for (int64_t l = 0; l < frames.lines_of(part); ++l) {
      const Line line = frames.line(part, l);
      for (int64_t x = 0; x < line.length; ++x) {
        const E* f = from + line.row * from_map.row_stride + x * from_map.column_stride;
        E* grad = to + line.row * to_map.row_stride + x * to_map.column_stride;
        const Vector<Sum> factor = broadcast(factors[line.position + x]);
        int64_t c = 0;
        for (; c + kN <= channels; c += kN) {
          __builtin_prefetch(f + kAheadPositions * from_map.column_stride + c, 0, 3);
          store_narrowed(grad + c, load_widened(f + c) * factor + load(addend + c));
        }
        if (c == channels) continue;
        const int rest = int(channels - c);
        store_narrowed(grad + c, load_widened(f + c, rest) * factor + load_part(addend + c, rest), rest);
      }
    }
  }
}

template <class E>
void differentiate_sums(const SpatialTemporalSumsBackward& call, int threads, void* workspace,
                        ParallelFor parallel_for) {
  using Sum = Accumulator<E>;
  const Frames frames = Frames(call.shape, call.features).also(call.grad_features);
  const int64_t positions = frames.positions(), channels = call.shape.channels;
  threads = useful_threads(frames.count() * channels * positions, threads);
  Sum* factors = static_cast<Sum*>(workspace);  // [frame][position]
  for_each_index(0, frames.count(), threads, parallel_for,
                 [&](int64_t frame, int64_t) { position_factors(call, frames, frame, factors + frame * positions); });
  const int64_t tasks = frames.count() * frames.tasks_of_a_frame();
  for_each_index(0, tasks, threads, parallel_for, [&](int64_t index, int64_t) {
    const Task task(frames, index);
    const E* from = task.in<const E>(frames, call.features);
    E* to = task.in<E>(frames, call.grad_features);
    const Sum* addends =
        static_cast<const Sum*>(call.grad_sums) + task.frame * call.shape.parts * channels + task.first_channel;
    const Sum* factor = factors + task.frame * positions;
    if (frames.channels_last) {
      apply_to_positions(frames, call.features, call.grad_features, from, task.channels, addends, factor, to);
    } else {
      constexpr int64_t kPlanes = 16;  // that stay in the nearest cache from one band to the next
      for (int64_t c = 0; c < task.channels; c += kPlanes) {
        apply_to_planes(frames, call.features, call.grad_features, from + c * call.features.channel_stride,
                        smaller(kPlanes, task.channels - c), addends + c, factor,
                        to + c * call.grad_features.channel_stride);
      }
    }
  });
}

}  // namespace

namespace gingham::cpu::GINGHAM_ISA {

size_t workspace_size(const SpatialTemporalSums& call, int) {
  const Frames frames(call.shape, call.features);
  return size_t(frames.count() * frames.tasks_of_a_frame() * frames.positions() * sum_size(call.dtype));
}
void run(const SpatialTemporalSums& call, int threads, void* workspace, ParallelFor parallel_for) {
  with_element(call.dtype,
               [&](auto element) { sum_frames<decltype(element)>(call, threads, workspace, parallel_for); });
}

size_t workspace_size(const SpatialTemporalSumsBackward& call, int) {
  const Frames frames(call.shape, call.features);
  return size_t(frames.count() * frames.positions() * sum_size(call.dtype));
}
void run(const SpatialTemporalSumsBackward& call, int threads, void* workspace, ParallelFor parallel_for) {
  with_element(call.dtype,
               [&](auto element) { differentiate_sums<decltype(element)>(call, threads, workspace, parallel_for); });
}

size_t workspace_size(const SpatialTemporalPooling&, int) { return 0; }
void run(const SpatialTemporalPooling& call, int threads, void*, ParallelFor parallel_for) {
  with_element(call.dtype, [&](auto element) { pool_clips<decltype(element)>(call, threads, parallel_for); });
}

size_t workspace_size(const SpatialTemporalPoolingBackward&, int) { return 0; }
void run(const SpatialTemporalPoolingBackward& call, int threads, void*, ParallelFor parallel_for) {
  with_element(call.dtype,
               [&](auto element) { differentiate_pooling<decltype(element)>(call, threads, parallel_for); });
}

}  // namespace gingham::cpu::GINGHAM_ISA
