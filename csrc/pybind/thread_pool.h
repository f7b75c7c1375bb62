// The threads behind gingham.array: made on first use, kept for the life of the process, made anew after a fork.
#pragma once

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "gingham/core.h"

namespace gingham::python {

class ThreadPool {
 public:
  static ThreadPool& get() {
    ThreadPool* pool = current_.load();
    if (!pool || pool->process_ != getpid()) {
      auto* fresh = new ThreadPool;
      if (current_.compare_exchange_strong(pool, fresh)) return *fresh;
      delete fresh;  // another thread was faster; compare_exchange loaded its pool
    }
    return *pool;
  }
  // A ParallelFor: item i of [0, count) runs on thread i; the caller is thread 0.
  static void parallel_for(int64_t count, int64_t, RangeFn fn, void* context) { get().run(count, fn, context); }

 private:
  void run(int64_t count, RangeFn fn, void* context) {
    if (count <= 1) {
      fn(0, count, context);
      return;
    }
    const std::lock_guard<std::mutex> one_at_a_time(run_mutex_);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (int64_t(workers_.size()) < count - 1) {
        workers_.emplace_back([this, index = int64_t(workers_.size()) + 1, seen = round_] { work(index, seen); });
      }
      fn_ = fn, context_ = context, count_ = count, running_ = count - 1, ++round_;
    }
    start_.notify_all();
    fn(0, 1, context);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

  void work(int64_t index, uint64_t seen) {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      start_.wait(lock, [&] { return round_ != seen; });
      seen = round_;
      if (index >= count_) continue;
      const RangeFn fn = fn_;
      void* context = context_;
      lock.unlock();
      fn(index, index + 1, context);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  inline static std::atomic<ThreadPool*> current_{nullptr};  // never destroyed: its threads may outlive main
  const pid_t process_ = getpid();
  std::mutex run_mutex_, mutex_;
  std::condition_variable start_, done_;
  std::vector<std::thread> workers_;
  RangeFn fn_ = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0, running_ = 0;
  uint64_t round_ = 0;
};

}  // namespace gingham::python
