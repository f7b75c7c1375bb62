// Sharing a kernel's work among threads.
#pragma once

#include "gingham/core.h"
#include "simd.h"

namespace {

// Runs task(index, worker) for every index in [begin, end). Workers take the next index when they are free.
template <class Task>
inline void for_each_index(int64_t begin, int64_t end, int threads, gingham::ParallelFor parallel_for,
                           const Task& task) {
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

}  // namespace
