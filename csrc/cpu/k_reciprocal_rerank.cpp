// k-reciprocal re-ranking on the CPU.
//
// 1. The nearest items of each and its largest distance, from tiles of distances (nearest.h): N^2 D operations, nearly
//    all of the work. Distances of queries to gallery items wait in the output for their last use.
// 2. Where an item stands in the lists of its own neighbours: with it, membership in R(i, k) is a comparison.
// 3. The set R*(i) of each item and its weights V, a few dozen numbers. Distances that are in no list are computed
//    again.
// 4. V' of the queries. Then, for a slice of the gallery and some queries at a time: V' of the slice, sorted by the
//    item that a weight is for, and along these lists the minima of each query, summed into one number per gallery
//    item. A slice is small enough for all this to stay in cache.
// Memory: the lists, V and V' of queries, a few kilobytes an item at most, and a few megabytes a thread.
#include "gingham/k_reciprocal_rerank.h"

#include "nearest.h"
#include "workspace.h"

namespace {

using gingham::KReciprocalRerankForward;
using gingham::NotFinite;
using gingham::ParallelFor;

constexpr int64_t kItemsOfATask = 64;
constexpr int64_t kQueriesOfATask = 1024;
constexpr int64_t kQueryBytes = int64_t(64) << 20;  // of V' that is kept at a time
constexpr int64_t kSliceBytes = int64_t(4) << 20;   // of V' of a slice, but for the smallest slice
constexpr int64_t kSliceItems = 512, kFewestSliceItems = 16;

template <class Sum>
struct Weight {
  int32_t item;
  Sum value;
};

// The scratch of one thread.
template <class Sum>
struct Scratch {
  TileScratch<Sum> tiles;
  uint8_t* marks;      // [item], zeros between tasks
  int32_t* missing;    // [capacity]: where in a set the distance is missing
  int32_t* items;      // [stripe]: whose distances are computed again
  Sum* values;         // [capacity] and at least a stripe, up to a whole vector
  Sum* sums;           // [item], zeros between tasks
  int32_t* sizes;      // [slice item]
  int32_t* starts;     // [item + 1]
  Sum* overlaps;       // [slice item], up to a whole vector
  Weight<Sum>* rows;   // [slice item][mean_capacity]
  Weight<Sum>* lists;  // as many, by item
};

template <class E>
class Rerank {
  using Sum = Accumulator<E>;
  static constexpr int kN = kLanes<Sum>;
  static constexpr int32_t kNowhere = std::numeric_limits<int32_t>::max();

 public:
  Rerank(const KReciprocalRerankForward& call, int threads)
      : call_(call),
        threads_(threads),
        count_(call.shape.queries + call.shape.gallery),
        k1_(smaller(call.k1, count_ - 1)),
        k2_(smaller(call.k2, count_)),
        half_(k1_ / 2 + (k1_ % 4 == 3)),  // of k1, rounded to even
        strips_(count_, call.shape.channels, kStripeItems<Sum>) {
    items_ = {static_cast<const E*>(call.query_features.data),
              static_cast<const E*>(call.gallery_features.data),
              call.query_features.row_stride,
              call.gallery_features.row_stride,
              call.shape.queries,
              count_,
              call.shape.channels};
    // An item of R(i, k1) adds less than a third of the at most half + 1 items of its set; i itself adds none.
    capacity_ = smaller(count_, k1_ + 1 + k1_ * (half_ / 3));
    mean_capacity_ = smaller(count_, k2_ * capacity_);
    const int64_t bytes = mean_capacity_ * int64_t(sizeof(Weight<Sum>));
    queries_at_a_time_ = smaller(call.shape.queries, larger(1, kQueryBytes / bytes));
    slice_ = smaller(call.shape.gallery, larger(kFewestSliceItems, smaller(kSliceItems, kSliceBytes / bytes)));
  }

  // Lays the workspace out at `base` and returns its size. base may be null to ask for the size alone.
  size_t lay_out(void* base) {
    Workspace memory(base);
    centre_ = memory.take<Sum>(round_up(items_.channels, kN));
    nearest_.others = larger(k1_, k2_ - 1);
    nearest_.squares = memory.take<Sum>(round_up(count_, kN));
    nearest_.thresholds = memory.take<Sum>(round_up(count_, kN));
    nearest_.furthest = memory.take<Sum>(round_up(count_, kN));
    nearest_.neighbours = memory.take<Neighbour<Sum> >(count_ * nearest_.others);
    locks_ = memory.take<int32_t>(strips_.count);
    places_ = memory.take<int32_t>(count_ * k1_);
    sizes_ = memory.take<int32_t>(count_);
    weights_ = memory.take<Weight<Sum> >(count_ * capacity_);
    query_sizes_ = memory.take<int32_t>(queries_at_a_time_);
    query_weights_ = memory.take<Weight<Sum> >(queries_at_a_time_ * mean_capacity_);
    scratch_ = static_cast<char*>(base) + memory.size();
    lay_out_scratch(0, &scratch_size_);
    return memory.size() + size_t(threads_) * scratch_size_;
  }

  void run(void* workspace, ParallelFor parallel_for) {
    lay_out(workspace);
    const auto for_groups = [&](int64_t count, int64_t group, const auto& task) {
      for_each_index(0, (count + group - 1) / group, threads_, parallel_for, [&](int64_t index, int64_t worker) {
        const Scratch<Sum> scratch = lay_out_scratch(worker, nullptr);
        task(index * group, smaller(count, (index + 1) * group), scratch);
      });
    };
    const auto for_items = [&](const auto& task) {
      for_groups(count_, kItemsOfATask, [&](int64_t begin, int64_t end, const Scratch<Sum>& scratch) {
        for (int64_t i = begin; i < end; ++i) task(i, scratch);
      });
    };
    for_items([&](int64_t i, const auto&) { nearest_.squares[i] = peak(items_.row(i), items_.channels); });
    if (!find_scale()) return;
    for (int64_t strip = 0; strip < strips_.count; ++strip) locks_[strip] = 0;
    for_groups(count_, kStripeItems<Sum>, [&](int64_t begin, int64_t end, const Scratch<Sum>& scratch) {
      square_items(items_, begin, end - begin, scratch.tiles.columns, nearest_.squares + begin);
    });
    nearest_.start(count_);
    for_groups(strips_.tasks(), 1, [&](int64_t task, int64_t, const Scratch<Sum>& scratch) {
      find_nearest_in(items_, strips_, task, nearest_, locks_, scratch.tiles,
                      [&](auto... tile) { keep_distances(tile...); });
    });
    for_items([&](int64_t i, const auto&) { sort_heap(nearest_.list(i), nearest_.others); });
    for_items([&](int64_t i, const auto&) { find_places(i); });
    for (int worker = 0; worker < threads_; ++worker) clear(lay_out_scratch(worker, nullptr));
    for_items([&](int64_t i, const Scratch<Sum>& scratch) { weigh_set(i, scratch); });

    const int64_t slices = (call_.shape.gallery + slice_ - 1) / slice_;
    for (int64_t first = 0; first < call_.shape.queries; first += queries_at_a_time_) {
      const int64_t queries = smaller(queries_at_a_time_, call_.shape.queries - first);
      for_groups(queries, kItemsOfATask, [&](int64_t begin, int64_t end, const Scratch<Sum>& scratch) {
        for (int64_t q = begin; q < end; ++q) {
          query_sizes_[q] = average(first + q, scratch.sums, query_weights_ + q * mean_capacity_);
        }
      });
      const int64_t parts = (queries + kQueriesOfATask - 1) / kQueriesOfATask;
      for_groups(slices * parts, 1, [&](int64_t task, int64_t, const Scratch<Sum>& scratch) {
        const int64_t begin = task % parts * kQueriesOfATask, end = smaller(queries, begin + kQueriesOfATask);
        compare(first, begin, end, task / parts * slice_, scratch);
      });
    }
  }

 private:
  Scratch<Sum> lay_out_scratch(int64_t worker, size_t* size) const {
    Workspace memory(scratch_ + size_t(worker) * scratch_size_);
    Scratch<Sum> scratch;
    scratch.tiles =
        TileScratch<Sum>(strips_, items_.channels, memory.take<char>(TileScratch<Sum>::size(strips_, items_.channels)));
    scratch.marks = memory.take<uint8_t>(count_);
    scratch.missing = memory.take<int32_t>(capacity_);
    scratch.items = memory.take<int32_t>(kStripeItems<Sum>);
    scratch.values = memory.take<Sum>(round_up(larger(capacity_, kStripeItems<Sum>), kN));
    scratch.sums = memory.take<Sum>(count_);
    scratch.sizes = memory.take<int32_t>(slice_);
    scratch.starts = memory.take<int32_t>(count_ + 1);
    scratch.overlaps = memory.take<Sum>(round_up(slice_, kN));
    scratch.rows = memory.take<Weight<Sum> >(slice_ * mean_capacity_);
    scratch.lists = memory.take<Weight<Sum> >(slice_ * mean_capacity_);
    if (size) *size = memory.size();
    return scratch;
  }

  void clear(const Scratch<Sum>& scratch) const {
    std::memset(scratch.marks, 0, size_t(count_));
    std::memset(scratch.sums, 0, size_t(count_) * sizeof(Sum));
  }

  // From the peaks in the place of squares. False when there is a number that is none.
  bool find_scale() {
    Sum most = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const Sum peak = nearest_.squares[i];
      if (!(peak <= std::numeric_limits<Sum>::max())) {
        *call_.not_finite = i < items_.queries ? NotFinite::query_features : NotFinite::gallery_features;
        return false;
      }
      most = peak > most ? peak : most;
    }
    *call_.not_finite = NotFinite::none;
    items_.scale = scale_of(most);
    find_centre(items_, centre_);
    items_.centre = centre_;
    return true;
  }

  Sum* output_row(int64_t query) const { return static_cast<Sum*>(call_.output) + query * call_.shape.gallery; }

  // Distances of a tile that the result needs.
  GINGHAM_STEP void keep_distances(int64_t row, int64_t row_end, int64_t column, int64_t column_end,
                                   const Sum* distances, int64_t stride) const {
    const int64_t first = larger(column, items_.queries);
    if (first >= column_end) return;
    for (int64_t i = row; i < smaller(row_end, items_.queries); ++i) {
      std::memcpy(output_row(i) + (first - items_.queries), distances + (i - row) * stride + (first - column),
                  size_t(column_end - first) * sizeof(Sum));
    }
  }

  // places[i][n] is where i stands among the nearest of its n-th neighbour, from 1 on.
  GINGHAM_STEP void find_places(int64_t i) const {
    for (int64_t n = 0; n < k1_; ++n) {
      const Neighbour<Sum>* list = nearest_.list(nearest_.list(i)[n].item);
      int32_t place = kNowhere;
      for (int64_t p = 0; p < k1_; ++p) place = list[p].item == i ? int32_t(p + 1) : place;
      places_[i * k1_ + n] = place;
    }
  }

  // Calls take(neighbour) for the items of R(i, k) but for i itself.
  template <class Take>
  void for_reciprocal(int64_t i, int64_t k, const Take& take) const {
    const Neighbour<Sum>* list = nearest_.list(i);
    const int32_t* places = places_ + i * k1_;
    for (int64_t n = 0; n < k; ++n) {
      if (places[n] <= k) take(list[n]);
    }
  }

  // The set R*(i) and its weights.
  GINGHAM_STEP void weigh_set(int64_t i, const Scratch<Sum>& scratch) const {
    enum : uint8_t { kNear = 1, kAdded = 2 };
    Weight<Sum>* set = weights_ + i * capacity_;
    int64_t size = 0, missing = 0;
    const auto add = [&](int32_t item, Sum distance, uint8_t mark) {
      set[size++] = {item, distance};
      scratch.marks[item] = mark;
    };
    add(int32_t(i), 0, kNear);
    for_reciprocal(i, k1_, [&](const Neighbour<Sum>& near) { add(near.item, near.distance, kNear); });
    for (int64_t n = 1, near = size; n < near; ++n) {
      int64_t all = 1, common = 1;  // set[n] itself
      for_reciprocal(set[n].item, half_,
                     [&](const Neighbour<Sum>& other) { ++all, common += scratch.marks[other.item] == kNear; });
      if (3 * common <= 2 * all) continue;
      for_reciprocal(set[n].item, half_, [&](const Neighbour<Sum>& other) {
        if (scratch.marks[other.item]) return;
        const Sum distance = known_distance(int32_t(i), other.item);
        if (distance < 0) scratch.missing[missing++] = int32_t(size);
        add(other.item, distance, kAdded);
      });
    }
    for (int64_t begin = 0; begin < missing; begin += kStripeItems<Sum>) {
      const int64_t some = smaller(missing - begin, kStripeItems<Sum>);
      const int32_t* places = scratch.missing + begin;
      for (int64_t n = 0; n < some; ++n) scratch.items[n] = set[places[n]].item;
      find_distances(items_, nearest_, i, scratch.items, some, scratch.tiles, scratch.values);
      for (int64_t n = 0; n < some; ++n) set[places[n]].value = scratch.values[n];
    }
    const Sum furthest = nearest_.furthest[i], rate = furthest > 0 ? 1 / furthest : 0;
    for (int64_t n = 0; n < size; ++n) {
      scratch.marks[set[n].item] = 0;
      scratch.values[n] = -set[n].value * rate;
    }
    Sum total = 0;
    for (int64_t n = 0; n < size; n += kN) {
      const int64_t some = smaller(kN, size - n);
      store(scratch.values + n, exponential(load_part(scratch.values + n, some)));
      for (int64_t lane = 0; lane < some; ++lane) total += scratch.values[n + lane];
    }
    for (int64_t n = 0; n < size; ++n) set[n].value = scratch.values[n] / total;
    sizes_[i] = int32_t(size);
  }

  // The distance of two items if one is in the other's list, otherwise -1.
  Sum known_distance(int32_t i, int32_t j) const {
    const Neighbour<Sum>*a = nearest_.list(i), *b = nearest_.list(j);
    for (int64_t n = 0; n < nearest_.others; ++n) {
      if (a[n].item == j) return a[n].distance;
      if (b[n].item == i) return b[n].distance;
    }
    return -1;
  }

  // Writes V'[i] to `to` and returns how many weights it has.
  GINGHAM_STEP int32_t average(int64_t i, Sum* sums, Weight<Sum>* to) const {
    int32_t size = 0;
    for (int64_t n = 0; n < k2_; ++n) {
      const int64_t j = n == 0 ? i : nearest_.list(i)[n - 1].item;
      const Weight<Sum>* set = weights_ + j * capacity_;
      for (int64_t e = 0; e < sizes_[j]; ++e) {
        Sum& sum = sums[set[e].item];
        if (sum == 0) to[size++].item = set[e].item;  // weights are positive
        sum += set[e].value;
      }
    }
    for (int32_t e = 0; e < size; ++e) {
      to[e].value = sums[to[e].item] / Sum(k2_);
      sums[to[e].item] = 0;
    }
    return size;
  }

  // The output of queries [first + begin, first + end) for the slice of the gallery that begins there.
  GINGHAM_STEP void compare(int64_t first, int64_t begin, int64_t end, int64_t slice,
                            const Scratch<Sum>& scratch) const {
    const int64_t items = smaller(slice_, call_.shape.gallery - slice);
    std::memset(scratch.starts, 0, size_t(count_ + 1) * sizeof(int32_t));
    for (int64_t g = 0; g < items; ++g) {
      Weight<Sum>* row = scratch.rows + g * mean_capacity_;
      scratch.sizes[g] = average(items_.queries + slice + g, scratch.sums, row);
      for (int64_t e = 0; e < scratch.sizes[g]; ++e) ++scratch.starts[row[e].item];
    }
    for (int64_t i = 0; i < count_; ++i) scratch.starts[i + 1] += scratch.starts[i];
    for (int64_t g = items - 1; g >= 0; --g) {  // from ends to starts
      const Weight<Sum>* row = scratch.rows + g * mean_capacity_;
      for (int64_t e = 0; e < scratch.sizes[g]; ++e) {
        scratch.lists[--scratch.starts[row[e].item]] = {int32_t(g), row[e].value};
      }
    }
    const Sum share = 1 - Sum(call_.lambda);
    for (int64_t q = begin; q < end; ++q) {
      for (int64_t g = 0; g < items; g += kN) store(scratch.overlaps + g, Vector<Sum>{});
      const Weight<Sum>* row = query_weights_ + q * mean_capacity_;
      for (int64_t e = 0; e < query_sizes_[q]; ++e) {
        const Sum value = row[e].value;
        const int64_t list_end = scratch.starts[row[e].item + 1];
        for (int64_t at = scratch.starts[row[e].item]; at < list_end; ++at) {
          const Weight<Sum> other = scratch.lists[at];
          scratch.overlaps[other.item] += other.value < value ? other.value : value;
        }
      }
      const Sum furthest = nearest_.furthest[first + q], rate = furthest > 0 ? Sum(call_.lambda) / furthest : 0;
      Sum* output = output_row(first + q) + slice;
      for (int64_t g = 0; g < items; g += kN) {
        const int64_t some = smaller(kN, items - g);
        const Vector<Sum> overlap = load(scratch.overlaps + g);
        Vector<Sum> jaccard = 1 - overlap / (2 - overlap);
        jaccard = jaccard < 0 ? Vector<Sum>{} : jaccard;
        store_part(output + g, share * jaccard + rate * load_part(output + g, some), some);
      }
    }
  }

  const KReciprocalRerankForward& call_;
  const int threads_;
  const int64_t count_, k1_, k2_, half_;
  const Strips strips_;
  int64_t capacity_, mean_capacity_;  // of a set R*(i), of V'[i]
  int64_t queries_at_a_time_, slice_;
  Items<E> items_;
  Nearest<Sum> nearest_;
  Sum* centre_ = nullptr;                 // [channel]
  int32_t* locks_ = nullptr;              // [strip]
  int32_t* places_ = nullptr;             // [item][k1]
  int32_t* sizes_ = nullptr;              // [item]
  Weight<Sum>* weights_ = nullptr;        // [item][capacity]
  int32_t* query_sizes_ = nullptr;        // [query]
  Weight<Sum>* query_weights_ = nullptr;  // [query][mean_capacity]
  char* scratch_ = nullptr;
  size_t scratch_size_ = 0;
};

bool is_empty(const KReciprocalRerankForward& call) { return call.shape.queries == 0 || call.shape.gallery == 0; }

}  // namespace

namespace gingham::cpu::GINGHAM_ISA {

size_t workspace_size(const KReciprocalRerankForward& call, int threads) {
  if (is_empty(call)) return 0;
  return with_element(call.dtype,
                      [&](auto element) { return Rerank<decltype(element)>(call, threads).lay_out(nullptr); });
}
void run(const KReciprocalRerankForward& call, int threads, void* workspace, ParallelFor parallel_for) {
  *call.not_finite = NotFinite::none;
  if (is_empty(call)) return;
  with_element(call.dtype,
               [&](auto element) { Rerank<decltype(element)>(call, threads).run(workspace, parallel_for); });
}

}  // namespace gingham::cpu::GINGHAM_ISA
