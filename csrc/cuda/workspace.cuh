// Cutting a call's workspace into what its kernels hold there.
#pragma once

#include "elements.cuh"

namespace gingham::cuda {

// Hands out pieces of a workspace, aligned to 256. A null workspace is for counting bytes.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(reinterpret_cast<uintptr_t>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(memory_ + size_);
    size_ += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return piece;
  }
  size_t size() const { return size_; }

 private:
  uintptr_t memory_;
  size_t size_ = 0;
};

// Work<T> lays itself out in a workspace when it is made; to be run so, it has run(stream).
template <template <class> class Work, class Call>
size_t size_of_workspace(const Call& call) {
  size_t size = 0;
  with_element(call.dtype, [&](auto element) {
    Workspace workspace(nullptr);
    const Work<decltype(element)> work(call, workspace);
    size = workspace.size();
  });
  return size;
}
template <template <class> class Work, class Call>
void run_in_workspace(const Call& call, void* memory, void* stream) {
  with_element(call.dtype, [&](auto element) {
    Workspace workspace(memory);
    Work<decltype(element)>(call, workspace).run(stream);
  });
}

}  // namespace gingham::cuda
