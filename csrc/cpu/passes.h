// How a call is cut: passes along the axes of a map, groups of neighbouring lines as tasks, parts of their lines, the
// scratch memory of a thread, and the order in which tasks run.
#pragma once

#include "gingham/criss_cross_attention.h"
#include "lines.h"
#include "panel_gemm.h"
#include "parallel.h"
#include "simd.h"

namespace {

using gingham::CrissCrossShape;
using gingham::MapView;
using gingham::ParallelFor;

// ---------------------------------------------------------------------------------------------- parts of a line

// [0, length) in `count` parts of `step` each, but for the last, which takes what is left.
struct Cut {
  int64_t length = 0, step = 0, count = 0;

  // Into parts of whole vectors; where a lone column or two remain, the last part takes them.
  static Cut into(int64_t parts, int64_t length, int lanes) {
    const int64_t vectors = has_single_columns(length, lanes) ? length / lanes : (length + lanes - 1) / lanes;
    const int64_t vectors_of_a_part = (vectors + parts - 1) / parts;
    return {length, vectors_of_a_part * lanes, (vectors + vectors_of_a_part - 1) / vectors_of_a_part};
  }
  int64_t begin(int64_t part) const { return part * step; }
  int64_t size(int64_t part) const { return part + 1 == count ? length - begin(part) : step; }
  int64_t longest() const { return count > 1 ? larger(step, size(count - 1)) : length; }
};

// ---------------------------------------------------------------------------------------------- groups of lines

// How the lines of one axis are cut into groups, and how a group's sheets are cut: a sheet holds, per line, a number
// for every pair of a position `down` and one `across` (whose neighbours are the lanes of a vector).
struct Pass {
  Axis axis;
  int64_t length;  // positions in a line
  Cut across, down;
  int64_t planes;       // sets of parallel lines: batch x frames, or batch x rows for the axis of frames
  int64_t lines;        // in one plane
  int64_t group_lines;  // in one group
  int64_t groups_per_plane;
  int64_t scratch_bytes;  // that a thread should make do with
  bool is_last;           // of a call

  int64_t groups() const { return planes * groups_per_plane; }

  LineGroup group(const CrissCrossShape& shape, int64_t index) const {
    const int64_t plane = index / groups_per_plane, first = index % groups_per_plane * group_lines;
    const int64_t inner = axis == Axis::frame ? shape.rows : shape.frames;
    LineGroup group{plane / inner, 0, 0, 0, smaller(group_lines, lines - first), length};
    (axis == Axis::frame ? group.row : group.frame) = plane % inner;
    (axis == Axis::row ? group.row : group.column) = first;
    return group;
  }

  // The positions of the group's lines that belong to one part of a cut.
  LineGroup part(LineGroup group, const Cut& cut, int64_t index) const {
    (axis == Axis::row ? group.column : axis == Axis::column ? group.row : group.frame) += cut.begin(index);
    group.length = cut.size(index);
    return group;
  }
};

// Down a sheet.
constexpr int64_t kMostPositions = 288;

// Bytes that are kept for every pair of positions of a sheet, and that a thread's scratch should make do with.
struct Sizes {
  int64_t pair, scratch;
};

// What others would keep for one image: its attention weights.
int64_t weights_of_an_image(const CrissCrossShape& shape) {
  const int64_t cross = shape.frames + shape.rows + shape.columns - 2;
  return shape.frames * shape.rows * shape.columns * cross;
}

Pass make_pass(const CrissCrossShape& shape, Axis axis, Contiguous contiguous, int lanes, Sizes sizes) {
  Pass pass{};
  pass.axis = axis;
  pass.length = axis == Axis::row ? shape.columns : axis == Axis::column ? shape.rows : shape.frames;
  pass.planes = shape.batch * (axis == Axis::frame ? shape.rows : shape.frames);
  pass.lines = axis == Axis::row ? shape.rows : shape.columns;
  pass.down = Cut::into((pass.length + kMostPositions - 1) / kMostPositions, pass.length, lanes);
  // Lanes across lines need whole vectors of them. Otherwise a few lines, as long as their sheets are small: of rows
  // they make one long stretch of memory; where channels are contiguous a line alone has long ones.
  const int64_t pairs_of_a_group = contiguous == Contiguous::position ? 64 * 1024 : 4 * 1024;
  const int64_t few = larger(1, smaller(4, pairs_of_a_group / (pass.down.longest() * pass.down.longest())));
  pass.group_lines = smaller(pass.lines, contiguous == Contiguous::line ? lanes : few);
  pass.groups_per_plane = (pass.lines + pass.group_lines - 1) / pass.group_lines;
  // As few parts as leave a sixth of the scratch to panels: each costs reading the `down` side of the lines once more,
  // and in backward adding to the gradients of the queries, which run down, once more.
  pass.scratch_bytes = sizes.scratch;
  for (int64_t parts = pass.down.count;; ++parts) {
    pass.across = Cut::into(parts, pass.length, lanes);
    const int64_t row = row_length(pass.across.longest(), lanes);
    const int64_t sheets = pass.group_lines * pass.down.longest() * row * sizes.pair;
    if (sheets <= sizes.scratch - sizes.scratch / 6 || pass.across.step == lanes) break;
  }
  return pass;
}

bool channels_first(const CrissCrossShape& shape, const MapView& map) {
  return map.column_stride == 1 || shape.columns == 1;
}

Contiguous contiguous_axis(bool first, Axis axis) {
  if (!first) return Contiguous::channel;
  return axis == Axis::row ? Contiguous::position : Contiguous::line;
}

// The passes of a call. The row pass always runs, because it holds the pixel itself; lines of one position add nothing.
struct Passes {
  Pass items[3];
  int count = 0;
  bool first;  // channels first
};

Passes make_passes(const CrissCrossShape& shape, bool first, int lanes, Sizes sizes) {
  Passes passes;
  passes.first = first;
  passes.items[passes.count++] = make_pass(shape, Axis::row, contiguous_axis(first, Axis::row), lanes, sizes);
  if (shape.rows > 1) {
    passes.items[passes.count++] = make_pass(shape, Axis::column, contiguous_axis(first, Axis::column), lanes, sizes);
  }
  if (shape.frames > 1) {
    passes.items[passes.count++] = make_pass(shape, Axis::frame, contiguous_axis(first, Axis::frame), lanes, sizes);
  }
  passes.items[passes.count - 1].is_last = true;
  return passes;
}

// ---------------------------------------------------------------------------------------------- scratch memory

// The scratch of one thread.
template <class U>
struct Scratch {
  using Sum = typename U::Sum;
  using Unit = typename U::Unit;
  static_assert(sizeof(Sum) == sizeof(Unit));
  static constexpr int64_t kFewestChannels = U::kTiles ? 2 * kTileRows : 8, kMostChannels = 192;

  int64_t across_stride = 0, down_stride = 0;  // of the rows of a sheet [down][across], of a transposed one
  int64_t sheet_sizes[2] = {};                 // of one line
  Sum* sheets[2] = {};                         // [line][down][across]; backward's first may be transposed
  Sum* weights = nullptr;                      // [line][value_stride]: forward's, one per query
  Sum* values[3] = {};                         // [value_stride]: of one line, one per position
  int64_t value_stride = 0;
  Unit* single_columns = nullptr;  // [line][single_count][single_stride]: of the operand at hand
  int64_t single_count = 0, single_stride = 0;
  Unit* pool = nullptr;  // panels of some channels
  int64_t pool_units = 0;
  Unit* product = nullptr;  // for multiply

  // How many channels to take at a time when the panels of one channel are that many units: as many as fit the pool.
  // A multiple of every register block's height, unless there are fewer channels.
  int64_t chunk(int64_t units_of_a_channel, int64_t channels) const {
    const int64_t fit = smaller(kMostChannels, pool_units / units_of_a_channel);
    const int64_t step = U::kTiles ? 2 * kTileRows : fit >= 24 ? 24 : 8;
    return smaller(round_up(larger(1, channels), kFewestChannels), larger(kFewestChannels, fit / step * step));
  }
  // Units that one channel of a line takes in the pool, step by step. A left operand whose positions run down and a
  // right one whose positions run across:
  static int64_t units_of_two(int64_t down, int64_t across) {
    return (panel_stride<U, PairAxis::channel>(down) + panel_stride<U, PairAxis::channel>(across) + U::kPair - 1) /
           U::kPair;
  }
  // A left operand that is summed over its positions, and sums.
  static int64_t units_of_product(int64_t source, int64_t target) {
    return panel_stride<U, PairAxis::position>(source) + row_stride<U>(target);
  }
  // grad_output, first in pairs of channels, then of positions; value, then sums for the same keys.
  static int64_t units_of_queries(int64_t down) {
    return larger((panel_stride<U, PairAxis::channel>(down) + U::kPair - 1) / U::kPair,
                  panel_stride<U, PairAxis::position>(down));
  }
  static int64_t units_of_keys(int64_t across) { return row_stride<U>(across); }

  static int64_t most_units_of_a_channel(int64_t across, int64_t down, bool backward) {
    const int64_t most = larger(units_of_two(down, across), units_of_product(down, across));
    if (!backward) return most;
    return larger(most, larger(units_of_product(across, down), units_of_queries(down) + units_of_keys(across)));
  }
  // Lays the scratch of `pass` out at `base`; returns its size. base may be null to ask for the size alone.
  size_t lay_out(const Pass& pass, bool backward, char* base) {
    constexpr int kN = kLanes<Sum>;
    const int64_t across = pass.across.longest(), down = pass.down.longest(), lines = pass.group_lines;
    const int64_t most = larger(across, down);
    size_t offset = 0;
    const auto take = [&](int64_t count) {
      Sum* at = reinterpret_cast<Sum*>(base + offset);
      offset += size_t(round_up(count * int64_t(sizeof(Sum)), 64));
      return at;
    };
    across_stride = row_stride<U>(across), down_stride = row_stride<U>(down);
    const int64_t sums = (U::kTiles ? round_up(down, kTileRows) : down) * across_stride;
    const int64_t units = larger(summed_units<U>(down) * across_stride, summed_units<U>(across) * down_stride);
    sheet_sizes[0] = round_up(backward ? units : sums, kN), sheet_sizes[1] = backward ? round_up(sums, kN) : 0;
    for (int i = 0; i < 2; ++i) sheets[i] = take(lines * sheet_sizes[i]);
    value_stride = round_up(most, kN);
    weights = backward ? nullptr : take(lines * value_stride);
    for (Sum*& line_values : values) line_values = take(value_stride);
    single_stride = round_up(summed_units<U>(most), kN);
    single_count = Stripes<U>(pass.length).single_columns();  // which the last part has, be it the longest or not
    single_columns = reinterpret_cast<Unit*>(take(lines * single_count * single_stride));
    product = reinterpret_cast<Unit*>(take(multiply_scratch<U>(most, kMostChannels / U::kPair)));
    // Last: vectors are read to their end where a sheet or a panel ends.
    const int64_t fewest = kFewestChannels * lines * most_units_of_a_channel(across, down, backward);
    const int64_t left = (pass.scratch_bytes - int64_t(offset)) / int64_t(sizeof(Unit)) - kN;
    pool_units = larger(fewest, smaller(left, kMostChannels * fewest / kFewestChannels));
    pool = reinterpret_cast<Unit*>(take(pool_units + kN));
    return offset;
  }
};

// How many threads can have work at a time.
int64_t most_workers(const Passes& passes, int threads) {
  int64_t groups = 1;
  for (int i = 0; i < passes.count; ++i) groups = larger(groups, passes.items[i].groups());
  return smaller(groups, threads);
}

template <class U>
size_t scratch_size(const Passes& passes, bool backward) {
  size_t most = 0;
  for (int i = 0; i < passes.count; ++i) {
    Scratch<U> scratch;
    const size_t size = scratch.lay_out(passes.items[i], backward, nullptr);
    most = size > most ? size : most;
  }
  return most;
}

// Runs task(pass, group, worker) for every group of every pass, one pass after the other, on as few images at a time as
// keep all threads busy: what one pass wrote is still in cache when the next one reads it.
template <class Task>
void run_passes(const CrissCrossShape& shape, const Passes& passes, int threads, ParallelFor parallel_for,
                const Task& task) {
  int64_t fewest = passes.items[0].groups();
  for (int i = 1; i < passes.count; ++i) fewest = smaller(fewest, passes.items[i].groups());
  const int64_t images = larger(1, 4 * threads * shape.batch / fewest);
  for (int64_t first = 0; first < shape.batch; first += images) {
    const int64_t last = smaller(first + images, shape.batch);
    for (int i = 0; i < passes.count; ++i) {
      const Pass& pass = passes.items[i];
      const int64_t groups = pass.groups() / shape.batch;
      for_each_index(first * groups, last * groups, threads, parallel_for,
                     [&](int64_t index, int64_t worker) { task(pass, index, worker); });
    }
  }
}

}  // namespace
