// How a call is cut: passes along the axes of a map, groups of neighbouring lines as tasks, segments of long lines, the
// scratch memory of a thread, and the order in which tasks run.
#pragma once

#include "gingham/criss_cross_attention.h"
#include "lines.h"
#include "panel_gemm.h"
#include "simd.h"

namespace {

using gingham::CrissCrossShape;
using gingham::MapView;
using gingham::ParallelFor;

// ---------------------------------------------------------------------------------------------- groups of lines

// How the lines of one axis are cut into groups. The last group takes up to a quarter more than the others, rather than
// leave a sliver that would be packed in blocks that are mostly padding.
struct Pass {
  Axis axis;
  int64_t length;       // positions in a line
  int64_t segment;      // positions of a line whose logits are held at a time, queries as well as keys
  int64_t planes;       // sets of parallel lines: batch x frames, or batch x rows for the axis of frames
  int64_t lines;        // in one plane
  int64_t group_lines;  // in one group
  int64_t groups_per_plane;
  bool is_last;  // of a call

  int64_t last_lines() const { return lines - (groups_per_plane - 1) * group_lines; }
  int64_t most_lines() const { return larger(groups_per_plane > 1 ? group_lines : 0, last_lines()); }
  int64_t groups() const { return planes * groups_per_plane; }

  LineGroup group(const CrissCrossShape& shape, int64_t index) const {
    const int64_t plane = index / groups_per_plane, in_plane = index % groups_per_plane;
    const int64_t first = in_plane * group_lines;
    const int64_t count = in_plane + 1 == groups_per_plane ? last_lines() : group_lines;
    const int64_t inner = axis == Axis::frame ? shape.rows : shape.frames;
    LineGroup group{plane / inner, 0, 0, 0, count, length};
    (axis == Axis::frame ? group.row : group.frame) = plane % inner;
    (axis == Axis::row ? group.row : group.column) = first;
    return group;
  }

  // The positions of the group's lines from `begin` on, a segment of them.
  LineGroup part(LineGroup group, int64_t begin) const {
    (axis == Axis::row ? group.column : axis == Axis::column ? group.row : group.frame) += begin;
    group.length = smaller(segment, length - begin);
    return group;
  }
};

// In a segment. Half of it takes a quarter of the memory, but more time on a 257 x 129 map.
constexpr int64_t kMostPositions = 288;

Pass make_pass(const CrissCrossShape& shape, Axis axis, Contiguous contiguous, int lanes) {
  Pass pass{};
  pass.axis = axis;
  pass.length = axis == Axis::row ? shape.columns : axis == Axis::column ? shape.rows : shape.frames;
  pass.planes = shape.batch * (axis == Axis::frame ? shape.rows : shape.frames);
  pass.lines = axis == Axis::row ? shape.rows : shape.columns;
  const int64_t segments = (pass.length + kMostPositions - 1) / kMostPositions;
  pass.segment = (pass.length + segments - 1) / segments;
  // Lanes across lines need whole vectors of them; otherwise a few lines make one stretch of memory long enough.
  constexpr int64_t kLogitsOfAGroup = 64 * 1024;
  const int64_t few = larger(1, smaller(4, kLogitsOfAGroup / (pass.segment * pass.segment)));
  pass.group_lines = smaller(pass.lines, contiguous == Contiguous::line ? lanes : few);
  const int64_t whole = pass.lines / pass.group_lines, rest = pass.lines % pass.group_lines;
  pass.groups_per_plane = rest > pass.group_lines / 4 ? whole + 1 : whole;
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

Passes make_passes(const CrissCrossShape& shape, bool first, int lanes) {
  Passes passes;
  passes.first = first;
  passes.items[passes.count++] = make_pass(shape, Axis::row, contiguous_axis(first, Axis::row), lanes);
  if (shape.rows > 1) {
    passes.items[passes.count++] = make_pass(shape, Axis::column, contiguous_axis(first, Axis::column), lanes);
  }
  if (shape.frames > 1) {
    passes.items[passes.count++] = make_pass(shape, Axis::frame, contiguous_axis(first, Axis::frame), lanes);
  }
  passes.items[passes.count - 1].is_last = true;
  return passes;
}

// ---------------------------------------------------------------------------------------------- scratch memory

// The scratch of one thread. `squares` counts the L x L matrices a line needs: one forward, two backward.
template <class U>
struct Scratch {
  using Sum = typename U::Sum;
  using Unit = typename U::Unit;
  static constexpr int64_t kPanelBytes = 192 * 1024;

  int64_t stride = 0;        // padded line length
  int64_t chunk = 0;         // channels in a panel
  Sum* squares[2] = {};      // [line][stride][stride]
  Sum* panels[2] = {};       // [line][chunk][stride]
  Sum* line_values[3] = {};  // [line][stride]
  Unit* product = nullptr;   // for multiply

  // A multiple of every register block's height, unless there are fewer channels.
  static int64_t chunk_channels(const Pass& pass, int64_t channels) {
    const int64_t stride = round_up(pass.segment, kLanes<Sum>);
    const int64_t fit = kPanelBytes / (pass.most_lines() * stride * int64_t(sizeof(Sum)));
    if (U::kTiles) {
      const int64_t tall = 2 * kTileRows;
      return smaller(round_up(larger(1, channels), kTileRows), fit >= tall ? fit / tall * tall : kTileRows);
    }
    return smaller(round_up(larger(1, channels), 8), fit >= 24 ? fit / 24 * 24 : larger(8, fit / 8 * 8));
  }
  // Lays the scratch of `pass` out at `base`; returns its size. base may be null to ask for the size alone.
  size_t lay_out(const CrissCrossShape& shape, const Pass& pass, int square_count, char* base) {
    stride = round_up(pass.segment, kLanes<Sum>);
    chunk = chunk_channels(pass, larger(shape.key_channels, shape.value_channels));
    size_t offset = 0;
    const auto take = [&](int64_t count) {
      Sum* at = reinterpret_cast<Sum*>(base + offset);
      offset += size_t(round_up(count * int64_t(sizeof(Sum)), 64));
      return at;
    };
    const int64_t lines = pass.most_lines();
    for (int i = 0; i < square_count; ++i) squares[i] = take(lines * stride * stride);
    for (Sum*& panel : panels) panel = take(lines * chunk * stride);
    for (Sum*& values : line_values) values = take(lines * stride);
    product = reinterpret_cast<Unit*>(
        take(larger(multiply_scratch<U>(pass.segment, chunk), multiply_scratch<U>(chunk, stride))));
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
size_t scratch_size(const CrissCrossShape& shape, const Passes& passes, int squares) {
  size_t most = 0;
  for (int i = 0; i < passes.count; ++i) {
    Scratch<U> scratch;
    const size_t size = scratch.lay_out(shape, passes.items[i], squares, nullptr);
    most = size > most ? size : most;
  }
  return most;
}

// Runs task(index, worker) for every index in [begin, end). Workers take the next index when they are free.
template <class Task>
void run(int64_t begin, int64_t end, int threads, ParallelFor parallel_for, const Task& task) {
  struct Shared {
    const Task* task;
    int64_t next, end;
  } shared{&task, begin, end};
  const gingham::RangeFn work = [](int64_t begin, int64_t end, void* context) {
    auto* s = static_cast<Shared*>(context);
    for (int64_t worker = begin; worker < end; ++worker) {
      for (;;) {
        const int64_t index = __atomic_fetch_add(&s->next, 1, __ATOMIC_RELAXED);
        if (index >= s->end) break;
        (*s->task)(index, worker);
      }
    }
  };
  const int64_t workers = smaller(end - begin, threads);
  if (workers == 1) {
    work(0, 1, &shared);
  } else {
    parallel_for(workers, 1, work, &shared);
  }
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
      run(first * groups, last * groups, threads, parallel_for,
          [&](int64_t index, int64_t worker) { task(pass, index, worker); });
    }
  }
}

}  // namespace
