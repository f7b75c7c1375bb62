// Means of feature maps under masks, and their gradients: what masked_average_pool and masked_similarity share.
//
// A mask becomes weights at the features' resolution (bilinear.h), and the pooled vector is a weighted sum of the
// features: one read of them, two operations an element. Channels first, a channel is a line of positions, read front
// to back, a few channels at a time, and its sum is complete; rows that do not follow each other are first brought
// together, a stretch at a time, in L1. Channels last, eight positions at a time are added to a vector of channels in
// L1; positions are cut into at most kMostChunks chunks, whose sums are added in order. Positions before the first and
// behind the last that have a weight (channels last: all that have none) are not read. Backward writes the outer
// product of a vector and the weights; only a mask's gradient needs the features again.
#pragma once

#include "bilinear.h"
#include "cosine.h"
#include "elements.h"
#include "parallel.h"
#include "workspace.h"

namespace {

using gingham::DType;
using gingham::MapView;
using gingham::MaskResize;
using gingham::ParallelFor;

// ---------------------------------------------------------------------------------------------- supports

// What counts of one support: the upper left parts of its features and of its mask.
struct Extent {
  int64_t rows, columns, mask_rows, mask_columns;

  bool is_empty() const { return rows == 0 || columns == 0 || mask_rows == 0 || mask_columns == 0; }
  int64_t positions() const { return is_empty() ? 0 : rows * columns; }
  // How the smaller or larger of the two sizes was made.
  Bilinear bilinear(MaskResize resize) const {
    if (resize == MaskResize::features) return {{rows, mask_rows}, {columns, mask_columns}};
    return {{mask_rows, rows}, {mask_columns, columns}};
  }
};

// Feature maps [batch, shot, channel, row, column] with masks [batch, shot, row, column]; a sample is a batch and a
// shot.
struct Supports {
  int64_t batch, shots, channels;
  Extent full;
  MaskType mask_type;
  MaskResize resize;
  MapView features, mask;
  const int64_t* valid_sizes;  // [batch, shots, 4] or null

  int64_t samples() const { return batch * shots; }
  int64_t positions() const { return full.rows * full.columns; }
  Extent extent(int64_t sample) const {
    if (!valid_sizes) return full;
    const int64_t* valid = valid_sizes + 4 * sample;
    return {valid[0], valid[1], valid[2], valid[3]};
  }
  template <class E>
  E* at(const MapView& map, int64_t sample, int64_t row) const {
    return static_cast<E*>(map.data) + sample / shots * map.batch_stride + sample % shots * map.frame_stride +
           row * map.row_stride;
  }
  template <class M>
  Rows<M> rows(const MapView& map, int64_t sample) const {
    return {at<M>(map, sample, 0), map.row_stride};
  }
  int64_t elements() const { return samples() * (channels * positions() + full.mask_rows * full.mask_columns); }
};

inline bool is_channels_last(const MapView& map, int64_t columns) {
  return map.channel_stride == 1 && (map.column_stride != 1 || columns == 1);
}

// So few elements are not worth waking another thread.
inline int threads_for_elements(int64_t elements, int threads) { return elements < 32 * 1024 ? 1 : threads; }

// ---------------------------------------------------------------------------------------------- weights

// weights [sample][position], those that count first, then zeros.
template <class Sum>
class MaskWeights {
 public:
  MaskWeights(const Supports& supports, Sum* weights, int threads, Workspace& workspace)
      : s_(supports), weights_(weights), blocks_((supports.full.rows + kLanes<Sum> - 1) / kLanes<Sum>) {
    totals_ = workspace.take<Sum>(s_.samples() * blocks_);
    threads_ = int(smaller(threads, larger(1, s_.samples() * blocks_)));
    Workspace own(nullptr);
    BilinearScratch<Sum>(own, columns());
    scratch_size_ = own.size();
    scratch_ = workspace.take<char>(int64_t(scratch_size_) * threads_);
  }

  void run(ParallelFor parallel_for) const {
    with_mask_element(s_.mask_type, [&](auto element) {
      for_each_index(0, s_.samples() * blocks_, threads_, parallel_for,
                     [&](int64_t index, int64_t worker) { block<decltype(element)>(index, worker); });
    });
  }
  // By what the weighted sum of a sample is divided.
  Sum total(int64_t sample) const {
    Sum total = 0;
    for (int64_t i = 0; i < blocks_; ++i) total += totals_[sample * blocks_ + i];
    return total;
  }

 private:
  int64_t columns() const { return larger(s_.full.columns, s_.full.mask_columns); }

  template <class M>
  void block(int64_t index, int64_t worker) const {
    const int64_t sample = index / blocks_, begin = index % blocks_ * kLanes<Sum>;
    const Extent extent = s_.extent(sample);
    Sum* weights = weights_ + sample * s_.positions();
    if (begin == 0) {
      const int64_t count = extent.positions();
      __builtin_memset(weights + count, 0, size_t(s_.positions() - count) * sizeof(Sum));
    }
    const int64_t count = smaller(kLanes<Sum>, extent.rows - begin);
    Sum& total = totals_[index];
    total = 0;
    if (extent.is_empty() || count <= 0) return;
    Workspace own(scratch_ + size_t(worker) * scratch_size_);
    const BilinearScratch<Sum> scratch(own, columns());
    const Rows<const M> mask = s_.rows<const M>(s_.mask, sample);
    const Bilinear bilinear = extent.bilinear(s_.resize);
    const auto write = [&](int64_t row, const Sum* values) {
      __builtin_memcpy(weights + row * extent.columns, values, size_t(extent.columns) * sizeof(Sum));
    };
    if (s_.resize == MaskResize::features) {
      total = adjoint_rows(bilinear, mask, begin, count, scratch);
      for (int64_t lane = 0; lane < count; ++lane) write(begin + lane, scratch.adjoint_row(lane, extent.columns));
      return;
    }
    scratch.find_columns(bilinear.columns);
    for (int64_t row = begin; row < begin + count; ++row) {
      const Sum* values = interpolate_row(bilinear, mask, row, scratch);
      for (int64_t x = 0; x < extent.columns; ++x) total += values[x];
      write(row, values);
    }
  }

  const Supports& s_;
  Sum* weights_;
  int64_t blocks_;
  Sum* totals_;
  int threads_;
  size_t scratch_size_;
  char* scratch_;
};

// ---------------------------------------------------------------------------------------------- weighted sums

// sums[c] += weights x lines[c], kChannels lines `stride` apart; the two sums of each are of even and of odd vectors.
template <int kChannels, class E, class Sum>
GINGHAM_STEP void add_lines(const E* lines, int64_t stride, const Sum* weights, int64_t count, int64_t ahead,
                            Vector<Sum> (&sums)[kChannels][2]) {
  constexpr int kN = kLanes<Sum>;
  Vector<Sum> totals[kChannels][2];
#pragma GCC unroll 8
  for (int c = 0; c < kChannels; ++c) totals[c][0] = sums[c][0], totals[c][1] = sums[c][1];
  int64_t at = 0;
  for (; at + 2 * kN <= count; at += 2 * kN) {
    const Vector<Sum> even = load(weights + at), odd = load(weights + at + kN);
#pragma GCC unroll 8
    for (int c = 0; c < kChannels; ++c) {
      const E* p = lines + c * stride + at;
      __builtin_prefetch(p + ahead, 0, 2);
      if (sizeof(E) == sizeof(Sum)) __builtin_prefetch(p + ahead + kN, 0, 2);
      totals[c][0] += even * load_widened(p);
      totals[c][1] += odd * load_widened(p + kN);
    }
  }
  for (int half = 0; at < count; ++half, at += kN) {
    const int lanes = int(smaller(kN, count - at));
    const Vector<Sum> weight = load_part(weights + at, lanes);
#pragma GCC unroll 8
    for (int c = 0; c < kChannels; ++c) totals[c][half] += weight * load_widened(lines + c * stride + at, lanes);
  }
#pragma GCC unroll 8
  for (int c = 0; c < kChannels; ++c) sums[c][0] = totals[c][0], sums[c][1] = totals[c][1];
}

// Neighbouring elements; the rows of maps are too short for a call of memcpy.
template <class E>
inline void copy_row(E* to, const E* from, int64_t count) {
  constexpr int64_t kN = kVectorBytes / sizeof(E);
  typedef char Bytes __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
  const auto copy = [&](int64_t at) {
    *reinterpret_cast<Bytes*>(to + at) = *reinterpret_cast<const Bytes*>(from + at);
  };
  if (count < kN) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
    return;
  }
  for (int64_t i = 0; i + kN <= count; i += kN) copy(i);
  copy(count - kN);
}

// kChannels lines of one sample: where rows follow each other they are lines already.
template <class E>
struct ChannelLines {
  const E* data;
  int64_t channel_stride, row_stride, columns;
  bool joined;

  static constexpr int64_t kStretch = 1024;  // of positions that are brought together

  template <int kChannels, class Sum>
  void add(const Sum* weights, int64_t begin, int64_t end, E* scratch, Vector<Sum> (&sums)[kChannels][2]) const {
    if (joined) {
      return add_lines<kChannels>(data + begin, channel_stride, weights + begin, end - begin,
                                  kChannels * channel_stride, sums);
    }
    for (int64_t first = begin; first < end; first += kStretch) {
      const int64_t count = smaller(kStretch, end - first);
      for (int c = 0; c < kChannels; ++c) {
        int64_t row = first / columns, column = first % columns;
        for (int64_t at = 0; at < count; ++row, column = 0) {
          const int64_t part = smaller(columns - column, count - at);
          copy_row(scratch + c * kStretch + at, data + c * channel_stride + row * row_stride + column, part);
          at += part;
        }
      }
      add_lines<kChannels, E, Sum>(scratch, kStretch, weights + first, count, 0, sums);
    }
  }
};

// sums[c] += weight x pixel of `count` pixels.
template <int kPixels, class E, class Sum>
GINGHAM_STEP void add_pixels(const E* const* pixels, const Sum* weights, int64_t channels, int64_t ahead, Sum* sums) {
  constexpr int kN = kLanes<Sum>;
  Vector<Sum> factors[kPixels];
#pragma GCC unroll 8
  for (int i = 0; i < kPixels; ++i) factors[i] = broadcast(weights[i]);
  int64_t c = 0;
  for (; c + kN <= channels; c += kN) {
    Vector<Sum> total = load(sums + c);
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; ++i) {
      if (sizeof(E) == sizeof(Sum) || c % (2 * kN) == 0) __builtin_prefetch(pixels[i] + c + ahead, 0, 2);
      total += factors[i] * load_widened(pixels[i] + c);
    }
    store(sums + c, total);
  }
  const int rest = int(channels - c);
  if (rest == 0) return;
  Vector<Sum> total = load_part(sums + c, rest);
#pragma GCC unroll 8
  for (int i = 0; i < kPixels; ++i) total += factors[i] * load_widened(pixels[i] + c, rest);
  store_part(sums + c, total, rest);
}

// The weighted sums of all samples, and their means.
template <class E>
class Pooling {
  using Sum = Accumulator<E>;
  static constexpr int64_t kAtOnce = kRegisters == 32 ? 8 : 4;  // channels, whose sums stay in registers
  static constexpr int64_t kChannels = 16;                      // of a task
  static constexpr int64_t kMostChunks = 16, kFewestPositions = 32;

 public:
  // weights: [sample][weights_stride]
  Pooling(const Supports& supports, const Sum* weights, int64_t weights_stride, int threads, Workspace& workspace)
      : s_(supports),
        weights_(weights),
        weights_stride_(weights_stride),
        last_(is_channels_last(s_.features, s_.full.columns)),
        threads_(threads) {
    tasks_ = last_ ? chunks(s_.positions()) : (s_.channels + kChannels - 1) / kChannels;
    threads_ = int(smaller(threads, larger(1, s_.samples() * tasks_)));
    sums_ = workspace.take<Sum>(s_.samples() * (last_ ? tasks_ : 1) * s_.channels);
    means_ = workspace.take<double>(s_.channels);
    scratch_ = last_ ? nullptr : workspace.take<E>(kAtOnce * ChannelLines<E>::kStretch * threads_);
  }

  void run(ParallelFor parallel_for) const {
    for_each_index(0, s_.samples() * tasks_, threads_, parallel_for, [&](int64_t index, int64_t worker) {
      last_ ? chunk(index / tasks_, index % tasks_) : channels(index / tasks_, index % tasks_ * kChannels, worker);
    });
  }
  // The weighted sum of a sample that has positions.
  const Sum* sum(int64_t sample) const {
    const int64_t count = last_ ? chunks(s_.extent(sample).positions()) : 1;
    Sum* sums = sums_ + sample * (last_ ? tasks_ : 1) * s_.channels;
    for (int64_t i = 1; i < count; ++i) {
      for (int64_t c = 0; c < s_.channels; ++c) sums[c] += sums[i * s_.channels + c];
    }
    return sums;
  }
  // The mean over the shots of weighted sum / total. In float64, so that a support given twice counts as once.
  void mean(int64_t batch, const Sum* totals, Sum* means) const {
    for (int64_t c = 0; c < s_.channels; ++c) means_[c] = 0;
    for (int64_t sample = batch * s_.shots; sample < (batch + 1) * s_.shots; ++sample) {
      if (totals[sample] == 0 || s_.extent(sample).positions() == 0) continue;
      const Sum* sums = sum(sample);
      for (int64_t c = 0; c < s_.channels; ++c) means_[c] += double(sums[c] / totals[sample]);
    }
    for (int64_t c = 0; c < s_.channels; ++c) means[c] = Sum(means_[c] / double(s_.shots));
  }

 private:
  static int64_t positions_of_a_chunk(int64_t positions) {
    return larger(kFewestPositions, (positions + kMostChunks - 1) / kMostChunks);
  }
  static int64_t chunks(int64_t positions) {
    const int64_t step = positions_of_a_chunk(positions);
    return (positions + step - 1) / step;
  }

  void channels(int64_t sample, int64_t first, int64_t worker) const {
    const Extent extent = s_.extent(sample);
    const Sum* weights = weights_ + sample * weights_stride_;
    const int64_t end_channel = smaller(first + kChannels, s_.channels);
    int64_t begin = 0, end = extent.positions();
    while (end > 0 && weights[end - 1] == 0) --end;
    while (begin < end && weights[begin] == 0) ++begin;
    begin -= begin % (2 * kLanes<Sum>);  // the lane of a position does not depend on where the mask begins
    ChannelLines<E> lines{s_.at<const E>(s_.features, sample, 0), s_.features.channel_stride, s_.features.row_stride,
                          extent.columns, extent.rows <= 1 || s_.features.row_stride == extent.columns};
    Sum* sums = sums_ + sample * s_.channels;
    E* scratch = scratch_ + worker * kAtOnce * ChannelLines<E>::kStretch;
    const auto add = [&](auto count, int64_t c) {
      Vector<Sum> totals[decltype(count)::value][2] = {};
      lines.data = s_.at<const E>(s_.features, sample, 0) + c * s_.features.channel_stride;
      lines.add(weights, begin, end, scratch, totals);
      for (int i = 0; i < count; ++i) sums[c + i] = sum_of_lanes(totals[i][0] + totals[i][1]);
    };
    int64_t c = first;
    for (; c + kAtOnce <= end_channel; c += kAtOnce) add(std::integral_constant<int, kAtOnce>(), c);
    for (; c < end_channel; ++c) add(std::integral_constant<int, 1>(), c);
  }

  void chunk(int64_t sample, int64_t index) const {
    constexpr int kPixels = 8;
    const Extent extent = s_.extent(sample);
    const int64_t positions = extent.positions(), step = positions_of_a_chunk(positions);
    const int64_t begin = index * step, end = smaller(begin + step, positions);
    if (begin >= end) return;
    const Sum* weights = weights_ + sample * weights_stride_;
    Sum* sums = sums_ + (sample * tasks_ + index) * s_.channels;
    for (int64_t c = 0; c < s_.channels; ++c) sums[c] = 0;
    const E* pixels[kPixels];
    Sum factors[kPixels];
    int count = 0;
    for (int64_t at = begin, row = begin / extent.columns, column = begin % extent.columns; at < end; ++at) {
      if (weights[at] != 0) {
        pixels[count] = s_.at<const E>(s_.features, sample, row) + column * s_.features.column_stride;
        factors[count++] = weights[at];
      }
      if (++column == extent.columns) column = 0, ++row;
      if (count == kPixels) {
        add_pixels<kPixels>(pixels, factors, s_.channels, kPixels * s_.features.column_stride, sums);
        count = 0;
      }
    }
    for (int i = 0; i < count; ++i) add_pixels<1>(pixels + i, factors + i, s_.channels, 0, sums);
  }

  const Supports& s_;
  const Sum* weights_;
  int64_t weights_stride_;
  bool last_;
  int threads_;
  int64_t tasks_;  // of a sample
  Sum* sums_;      // [sample][chunk][channel]
  double* means_;
  E* scratch_;
};

// ---------------------------------------------------------------------------------------------- gradients

template <class E, class Sum>
inline void write_scaled(E* to, const Sum* values, Sum factor, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<Sum> <= count; i += kLanes<Sum>) store_narrowed(to + i, load(values + i) * factor);
  const int rest = int(count - i);
  if (rest) store_narrowed(to + i, load_part(values + i, rest) * factor, rest);
}

// grad_features[c, q] = slopes[c] weights[q] / total, where slopes [batch][channel] are the gradients of each shot's
// pooled vector. The rest of a padded map is zero.
template <class E>
class FeatureGradient {
  using Sum = Accumulator<E>;
  static constexpr int64_t kChannels = 16, kPositions = 64;  // of a task

 public:
  FeatureGradient(const Supports& supports, const MapView& gradient, const Sum* weights, const Sum* totals,
                  const Sum* slopes, int threads)
      : s_(supports),
        gradient_(gradient),
        weights_(weights),
        totals_(totals),
        slopes_(slopes),
        last_(is_channels_last(gradient, s_.full.columns)),
        threads_(threads) {}

  void run(ParallelFor parallel_for) const {
    const int64_t tasks =
        last_ ? (s_.positions() + kPositions - 1) / kPositions : (s_.channels + kChannels - 1) / kChannels;
    for_each_index(0, s_.samples() * tasks, threads_, parallel_for, [&](int64_t index, int64_t) {
      const int64_t sample = index / tasks, task = index % tasks;
      last_ ? positions(sample, task * kPositions) : channels(sample, task * kChannels);
    });
  }

 private:
  Sum inverse(int64_t sample) const { return totals_[sample] == 0 ? 0 : 1 / totals_[sample]; }

  void channels(int64_t sample, int64_t first) const {
    const Extent extent = s_.extent(sample);
    const Sum* weights = weights_ + sample * s_.positions();
    const Sum* slopes = slopes_ + sample / s_.shots * s_.channels;
    const int64_t valid_rows = extent.is_empty() ? 0 : extent.rows;
    const bool whole = extent.columns == s_.full.columns && gradient_.row_stride == extent.columns;
    for (int64_t c = first; c < smaller(first + kChannels, s_.channels); ++c) {
      const Sum factor = slopes[c] * inverse(sample);
      E* to = s_.at<E>(gradient_, sample, 0) + c * gradient_.channel_stride;
      if (whole) {
        const int64_t count = valid_rows * extent.columns;
        write_scaled(to, weights, factor, count);
        __builtin_memset(to + count, 0, size_t(s_.positions() - count) * sizeof(E));
        continue;
      }
      for (int64_t row = 0; row < s_.full.rows; ++row, to += gradient_.row_stride) {
        const int64_t count = row < valid_rows ? extent.columns : 0;
        write_scaled(to, weights + row * extent.columns, factor, count);
        __builtin_memset(to + count, 0, size_t(s_.full.columns - count) * sizeof(E));
      }
    }
  }

  void positions(int64_t sample, int64_t first) const {
    const Extent extent = s_.extent(sample);
    const Sum* weights = weights_ + sample * s_.positions();
    const Sum* slopes = slopes_ + sample / s_.shots * s_.channels;
    for (int64_t at = first; at < smaller(first + kPositions, s_.positions()); ++at) {
      const int64_t row = at / s_.full.columns, column = at % s_.full.columns;
      const bool counts = !extent.is_empty() && row < extent.rows && column < extent.columns;
      const Sum factor = counts ? weights[row * extent.columns + column] * inverse(sample) : 0;
      write_scaled(s_.at<E>(gradient_, sample, row) + column * gradient_.column_stride, slopes, factor, s_.channels);
    }
  }

  const Supports& s_;
  const MapView& gradient_;
  const Sum *weights_, *totals_, *slopes_;
  bool last_;
  int threads_;
};

// With D[q] = sum_c slopes[c] features[c, q], the weights have the gradient E[q] = (D[q] - sum_q weights D / total) /
// total, also where the total is the mask's, as interpolation's rows sum to one; the mask has U E or R^T E.
template <class E>
class MaskGradient {
  using Sum = Accumulator<E>;
  static constexpr int64_t kPositions = 256;  // of a task

 public:
  MaskGradient(const Supports& supports, const MapView& gradient, const Sum* weights, const Sum* totals,
               const Sum* slopes, int threads, Workspace& workspace)
      : s_(supports), gradient_(gradient), weights_(weights), totals_(totals), slopes_(slopes), threads_(threads) {
    products_ = workspace.take<Sum>(s_.samples() * s_.positions());
    Workspace own(nullptr);
    lay_out(own);
    scratch_size_ = own.size();
    scratch_ = workspace.take<char>(int64_t(scratch_size_) * threads_);
  }

  void run(ParallelFor parallel_for) const {
    const int64_t blocks = (s_.positions() + kPositions - 1) / kPositions;
    for_each_index(0, s_.samples() * blocks, threads_, parallel_for, [&](int64_t index, int64_t worker) {
      multiply(index / blocks, index % blocks * kPositions, worker);
    });
    for_each_index(0, s_.samples(), threads_, parallel_for, [&](int64_t sample, int64_t) { center(sample); });
    const int64_t bands = (s_.full.mask_rows + kLanes<Sum> - 1) / kLanes<Sum>;
    with_mask_element(s_.mask_type, [&](auto element) {
      using M = decltype(element);
      if constexpr (!std::is_same_v<M, uint8_t>) {
        for_each_index(0, s_.samples() * bands, threads_, parallel_for, [&](int64_t index, int64_t worker) {
          band<M>(index / bands, index % bands * kLanes<Sum>, worker);
        });
      }
    });
  }

 private:
  static constexpr int64_t kSums = kPositions + kLanes<Sum>;

  struct Scratch {
    BilinearScratch<Sum> bilinear;
    Sum* sums;  // of squares, which nobody reads, and of products
  };
  Scratch lay_out(Workspace& workspace) const {
    const BilinearScratch<Sum> bilinear(workspace, larger(s_.full.columns, s_.full.mask_columns));
    return {bilinear, workspace.take<Sum>(2 * kSums)};
  }
  Scratch scratch(int64_t worker) const {
    Workspace own(scratch_ + size_t(worker) * scratch_size_);
    return lay_out(own);
  }

  void multiply(int64_t sample, int64_t begin, int64_t worker) const {
    const Extent extent = s_.extent(sample);
    const MapView& map = s_.features;
    const int64_t end = smaller(begin + kPositions, extent.positions());
    if (begin >= end) return;
    const bool last = is_channels_last(map, s_.full.columns);
    const int64_t step = last ? map.column_stride : 1;  // a lone column has any stride
    const bool joined = extent.rows <= 1 || map.row_stride == extent.columns * step;
    const Sum* slopes = slopes_ + sample / s_.shots * s_.channels;
    Sum *products = products_ + sample * s_.positions(), *sums = scratch(worker).sums;
    for (int64_t at = begin; at < end;) {
      const int64_t row = joined ? 0 : at / extent.columns, column = joined ? at : at % extent.columns;
      const int64_t count = joined ? end - at : smaller(end - at, extent.columns - column);
      const Pixels<const E> pixels{s_.at<const E>(map, sample, row) + column * step, map.channel_stride, step};
      sum_products<1>(pixels, s_.channels, count, slopes, s_.channels, sums, kSums);
      __builtin_memcpy(products + at, sums + kSums, size_t(count) * sizeof(Sum));
      at += count;
    }
  }

  void center(int64_t sample) const {
    const int64_t count = s_.extent(sample).positions();
    const Sum* weights = weights_ + sample * s_.positions();
    Sum* products = products_ + sample * s_.positions();
    const Sum inverse = totals_[sample] == 0 ? 0 : 1 / totals_[sample];
    Vector<Sum> sums{};
    int64_t i = 0;
    for (; i + kLanes<Sum> <= count; i += kLanes<Sum>) sums += load(weights + i) * load(products + i);
    sums += load_part(weights + i, count - i) * load_part(products + i, count - i);
    const Sum mean = sum_of_lanes(sums) * inverse;
    for (i = 0; i < count; ++i) products[i] = inverse == 0 ? 0 : (products[i] - mean) * inverse;
  }

  // kLanes rows of the mask.
  template <class M>
  void band(int64_t sample, int64_t begin, int64_t worker) const {
    const Extent extent = s_.extent(sample);
    const int64_t end = smaller(begin + kLanes<Sum>, s_.full.mask_rows);
    const int64_t valid = extent.is_empty() ? begin : larger(begin, smaller(end, extent.mask_rows));
    const int64_t columns = extent.is_empty() ? 0 : extent.mask_columns;
    const Rows<M> to = s_.rows<M>(gradient_, sample);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t count = row < valid ? columns : 0;
      __builtin_memset(to.at(row) + count, 0, size_t(s_.full.mask_columns - count) * sizeof(M));
    }
    if (valid == begin) return;
    const Rows<const Sum> source{products_ + sample * s_.positions(), extent.columns};
    const Bilinear bilinear = extent.bilinear(s_.resize);
    const BilinearScratch<Sum> memory = scratch(worker).bilinear;
    if (s_.resize == MaskResize::mask) {
      adjoint_rows(bilinear, source, begin, valid - begin, memory);
      for (int64_t row = begin; row < valid; ++row)
        write_row(to.at(row), memory.adjoint_row(row - begin, columns), columns);
      return;
    }
    memory.find_columns(bilinear.columns);
    for (int64_t row = begin; row < valid; ++row) {
      write_row(to.at(row), interpolate_row(bilinear, source, row, memory), columns);
    }
  }

  const Supports& s_;
  const MapView& gradient_;
  const Sum *weights_, *totals_, *slopes_;
  int threads_;
  Sum* products_;  // [sample][position]: D, then E
  size_t scratch_size_;
  char* scratch_;
};

// ---------------------------------------------------------------------------------------------- calls

// Work<E> lays itself out in a workspace when it is made, and has run(parallel_for).
template <template <class> class Work, class Call>
size_t size_of_workspace(const Call& call, int threads) {
  return with_element(call.dtype, [&](auto element) {
    Workspace workspace(nullptr);
    const Work<decltype(element)> work(call, threads, workspace);
    return workspace.size();
  });
}
template <template <class> class Work, class Call>
void run_in_workspace(const Call& call, int threads, void* memory, ParallelFor parallel_for) {
  with_element(call.dtype, [&](auto element) {
    Workspace workspace(memory);
    Work<decltype(element)>(call, threads, workspace).run(parallel_for);
  });
}

}  // namespace
