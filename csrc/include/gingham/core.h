// What every operator's interface is made of: element types, parallel loops, errors. No torch, no Python, no CUDA
// header.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#define GINGHAM_API __attribute__((visibility("default")))

namespace gingham {

enum class DType : int32_t { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };

constexpr int64_t element_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// Calls fn(begin, end, context) on disjoint ranges that cover [0, count), perhaps on several threads, and returns when
// all are done. The caller of an operator supplies it, so that the core owns no threads: torch's pool, our own, or
// none.
using RangeFn = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t count, int64_t grain, RangeFn fn, void* context);

// A feature map [batch, channel, frame, row, column] with free strides, counted in elements. 2-D maps have one frame.
struct MapView {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t channel_stride = 0;
  int64_t frame_stride = 0;
  int64_t row_stride = 0;
  int64_t column_stride = 0;
};

}  // namespace gingham

// How every operator is called. A call is a struct: shape, dtype, options, and where inputs and results lie. `run`
// computes it; the caller supplies the workspace, at least workspace_size bytes.
//   cpu    on at most `threads` threads of parallel_for, on which the results do not depend; workspace aligned to 64.
//   cuda   all pointers, the workspace's too, are of the current device; the work is queued on `stream` (a
//          cudaStream_t). Throws std::runtime_error when a launch fails.
#define GINGHAM_DECLARE_CPU_CALL(Call)                                                            \
  namespace cpu {                                                                                 \
  GINGHAM_API size_t workspace_size(const Call& call, int threads);                               \
  GINGHAM_API void run(const Call& call, int threads, void* workspace, ParallelFor parallel_for); \
  }
#define GINGHAM_DECLARE_CALL(Call)                                       \
  GINGHAM_DECLARE_CPU_CALL(Call)                                         \
  namespace cuda {                                                       \
  GINGHAM_API size_t workspace_size(const Call& call);                   \
  GINGHAM_API void run(const Call& call, void* workspace, void* stream); \
  }

// What the front ends find where a call has no CUDA kernel: an error where it is used.
namespace gingham::cuda {
template <class Call>
size_t workspace_size(const Call&) = delete;
template <class Call>
void run(const Call&, void*, void*) = delete;
}  // namespace gingham::cuda
