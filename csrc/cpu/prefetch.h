// Memory that will be wanted soon, asked for while the core multiplies.
//
// The lines of a map lie far apart, so no hardware prefetcher follows them, and a burst of requests would stall on the
// few misses a core can have in flight. A kernel therefore makes a list of what its next pack or unpack will touch, and
// the inner loop of the products asks for a little of it every few steps.
#pragma once

#include "simd.h"

namespace {

class Prefetcher {
 public:
  // Adds outer x inner stretches of contiguous memory, `bytes` long each; strides in bytes. Two lists at most.
  void add(const void* data, int64_t outer, int64_t inner, int64_t outer_stride, int64_t inner_stride, int64_t bytes) {
    if (outer <= 0 || inner <= 0 || bytes <= 0) return;
    lists_[count_++] = {static_cast<const char*>(data), outer, inner, outer_stride, inner_stride, bytes};
  }
  // Spreads the work over that many calls of step().
  void spread(int64_t calls) {
    int64_t total = 0;
    for (int i = 0; i < count_; ++i) total += lists_[i].outer * lists_[i].inner;
    quota_ = calls > 0 ? (total + calls - 1) / calls : total;
  }
  __attribute__((always_inline)) void step() {
    for (int64_t i = 0; i < quota_ && at_ < count_; ++i) {
      List& list = lists_[at_];
      const char* p = list.data + at_inner_ * list.inner_stride;
      for (int64_t offset = 0; offset < list.bytes; offset += 64) __builtin_prefetch(p + offset, 0, 2);
      __builtin_prefetch(p + list.bytes - 1, 0, 2);
      if (++at_inner_ < list.inner) continue;
      at_inner_ = 0;
      list.data += list.outer_stride;
      if (--list.outer == 0) ++at_;
    }
  }

 private:
  struct List {
    const char* data;
    int64_t outer, inner, outer_stride, inner_stride, bytes;
  };
  List lists_[2];
  int count_ = 0, at_ = 0;
  int64_t at_inner_ = 0, quota_ = 0;
};

}  // namespace
