// A CUDA block on one CPU thread: every CUDA thread is a fiber. Fibers run until they meet a barrier or a collective of
// their warp and go on in random order, so that a missing barrier shows; a barrier that some never reach is an error.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)

struct EmulatedIndex {
  unsigned x = 0;
};
inline EmulatedIndex threadIdx, blockIdx;

namespace gingham::emulation {

inline void require(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(std::string("emulation: ") + message);
}

// Memory that ends where an unmapped page begins: whoever reads or writes past the end stops the process.
inline unsigned char* allocate_guarded(size_t bytes) {
  constexpr size_t kPage = 4096;
  const size_t mapped = (bytes + kPage - 1) / kPage * kPage;
  void* pages = mmap(nullptr, mapped + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  require(pages != MAP_FAILED, "no memory");
  require(mprotect(static_cast<char*>(pages) + mapped, kPage, PROT_NONE) == 0, "no guard page");
  return static_cast<unsigned char*>(pages) + mapped - bytes;
}
inline void free_guarded(unsigned char* memory, size_t bytes) {
  constexpr size_t kPage = 4096;
  const size_t mapped = (bytes + kPage - 1) / kPage * kPage;
  munmap(memory + bytes - mapped, mapped + kPage);
}

struct Copy {
  unsigned char* to;
  unsigned char bytes[16];
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  std::vector<unsigned char> stack = std::vector<unsigned char>(96 * 1024);
  bool started, waiting, done;
  std::vector<Copy> copies;  // asynchronous copies not yet waited for
};

struct Warp {
  static constexpr size_t kMostBytes = 64;
  // Two sets of operands: the next collective may begin before all lanes have read those of the last.
  alignas(16) unsigned char operands[2][32][kMostBytes];
  const char* name = nullptr;
  int arrived = 0;
  unsigned turn = 0;
};

class Device {
 public:
  std::mt19937 random{0};
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;

  void run_grid(int64_t blocks, int threads, size_t bytes, const std::function<void()>& kernel) {
    require(threads % 32 == 0 && threads <= 1024, "a block has whole warps, at most 32");
    require(blocks < (int64_t{1} << 31), "more blocks than a grid holds");
    require(bytes <= 96 * 1024, "more shared memory than launch.cuh reserves");
    kernel_ = &kernel;
    shared_bytes = bytes;
    shared = allocate_guarded(bytes);
    std::vector<int64_t> order(static_cast<size_t>(blocks));
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
    std::shuffle(order.begin(), order.end(), random);
    for (const int64_t block : order) run_block(block, threads);
    free_guarded(shared, bytes);
  }

  void barrier() {
    ++at_barrier_;
    if (at_barrier_ == fibers_in_block_) {
      at_barrier_ = 0;
      for (int i = 0; i < fibers_in_block_; ++i) wake(i);
    } else {
      wait();
    }
  }

  // Every lane gives `in` and gets result(all lanes' operands, own lane).
  template <class In, class Result>
  auto collective(const char* name, const In& in, Result result) {
    static_assert(sizeof(In) <= Warp::kMostBytes);
    Warp& warp = warps_[static_cast<size_t>(current_) / 32];
    const int lane = current_ % 32;
    require(warp.arrived == 0 || strcmp(warp.name, name) == 0, "lanes of a warp are at different instructions");
    warp.name = name;
    auto& operands = warp.operands[warp.turn % 2];
    memcpy(operands[lane], &in, sizeof in);
    if (++warp.arrived == 32) {
      warp.arrived = 0;
      ++warp.turn;
      for (int i = 0; i < 32; ++i) wake(current_ / 32 * 32 + i);
    } else {
      wait();
    }
    In all[32];
    for (int i = 0; i < 32; ++i) memcpy(&all[i], operands[i], sizeof in);
    return result(all, lane);
  }

  bool is_shared(const void* address, size_t bytes) const {
    const auto* p = static_cast<const unsigned char*>(address);
    return p >= shared && p + bytes <= shared + shared_bytes;
  }
  std::vector<Copy>& copies() { return fibers_[static_cast<size_t>(current_)].copies; }

 private:
  void run_block(int64_t block, int threads) {
    memset(shared, 0xff, shared_bytes);  // not-a-number in every type
    blockIdx.x = static_cast<unsigned>(block);
    fibers_in_block_ = threads;
    at_barrier_ = 0;
    if (fibers_.size() < static_cast<size_t>(threads)) fibers_.resize(static_cast<size_t>(threads));
    warps_.assign(static_cast<size_t>(threads) / 32, Warp{});
    runnable_.clear();
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = fibers_[static_cast<size_t>(i)];
      fiber.started = fiber.done = false;
      fiber.waiting = true;
      fiber.copies.clear();
      wake(i);
    }
    error_.clear();
    int done = 0;
    while (!runnable_.empty()) {
      const size_t pick = random() % runnable_.size();
      current_ = runnable_[pick];
      runnable_[pick] = runnable_.back();
      runnable_.pop_back();
      threadIdx.x = static_cast<unsigned>(current_);
      run(fibers_[static_cast<size_t>(current_)]);
      require(error_.empty(), error_.c_str());
      done += fibers_[static_cast<size_t>(current_)].done;
    }
    require(done == threads, "some threads wait at a barrier or an instruction of their warp that others never reach");
  }

  void run(Fiber& fiber) {
    if (_setjmp(scheduler_)) return;
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = fiber.stack.size();
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, &Device::enter, 0);
    setcontext(&fiber.start);
  }
  static void enter();
  void leave() { _longjmp(scheduler_, 1); }

  void wait() {
    Fiber& fiber = fibers_[static_cast<size_t>(current_)];
    fiber.waiting = true;
    const int self = current_;
    if (!_setjmp(fiber.resume)) leave();
    current_ = self;
  }
  void wake(int i) {
    Fiber& fiber = fibers_[static_cast<size_t>(i)];
    if (!fiber.waiting) return;
    fiber.waiting = false;
    runnable_.push_back(i);
  }

  const std::function<void()>* kernel_ = nullptr;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<int> runnable_;
  jmp_buf scheduler_;
  int current_ = 0, fibers_in_block_ = 0, at_barrier_ = 0;
  std::string error_;
};

inline Device device;

inline void Device::enter() {
  try {
    (*device.kernel_)();
  } catch (const std::exception& error) {
    device.error_ = error.what();
  }
  device.fibers_[static_cast<size_t>(device.current_)].done = true;
  device.leave();
}

}  // namespace gingham::emulation

inline void __syncthreads() { gingham::emulation::device.barrier(); }
