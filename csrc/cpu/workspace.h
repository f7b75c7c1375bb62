// Cutting a call's workspace into what its kernels hold there.
#pragma once

#include "simd.h"

namespace {

// Hands out pieces of a workspace, aligned to 64. A null workspace is for counting bytes.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(reinterpret_cast<uintptr_t>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(memory_ + size_);
    size_ += size_t(round_up(count * int64_t(sizeof(T)), 64));
    return piece;
  }
  size_t size() const { return size_; }

 private:
  uintptr_t memory_;
  size_t size_ = 0;
};

}  // namespace
