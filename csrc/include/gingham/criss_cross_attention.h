// Criss-cross attention (Huang et al., CCNet, ICCV 2019), 2-D and 3-D, forward and backward.
//
// Every position u attends to the positions that differ from it in at most one coordinate (u itself once):
//   logits[u, p] = scale * sum_c query[c, u] * key[c, p]
//   output[c, u] = sum_p softmax_p(logits[u, p]) * value[c, p]
//   lse[u]       = log sum_p exp(logits[u, p])
#pragma once

#include "gingham/core.h"

namespace gingham {

struct CrissCrossShape {
  int64_t batch = 0;
  int64_t key_channels = 0;
  int64_t value_channels = 0;
  int64_t frames = 1;  // 1 for a 2-D map
  int64_t rows = 0;
  int64_t columns = 0;
};

// query, key, value, output share one dtype and one layout: either every column_stride is 1 (channels first) or every
// channel_stride is 1 (channels last); the other strides are free. lse is [batch, frames, rows, columns], contiguous,
// float64 whatever the dtype: beside a large logit float32 has no room for the logarithm of the sum.
struct CrissCrossForward {
  CrissCrossShape shape;
  DType dtype = DType::float32;
  double scale = 1.0;
  MapView query, key, value, output;
  double* lse = nullptr;
};

// The gradients are written, not accumulated into; they have the layout of the inputs.
struct CrissCrossBackward {
  CrissCrossShape shape;
  DType dtype = DType::float32;
  double scale = 1.0;
  MapView query, key, value, output, grad_output;
  const double* lse = nullptr;
  MapView grad_query, grad_key, grad_value;
};

namespace cpu {
// Bytes of scratch memory that a call needs when parallel_for runs on at most `threads` threads.
GINGHAM_API size_t workspace_size(const CrissCrossForward& call, int threads);
GINGHAM_API size_t workspace_size(const CrissCrossBackward& call, int threads);
// workspace: at least workspace_size bytes, aligned to 64. Results do not depend on `threads`.
GINGHAM_API void criss_cross_attention(const CrissCrossForward& call, int threads, void* workspace,
                                       ParallelFor parallel_for);
GINGHAM_API void criss_cross_attention_backward(const CrissCrossBackward& call, int threads, void* workspace,
                                                ParallelFor parallel_for);
}  // namespace cpu

namespace cuda {
GINGHAM_API size_t workspace_size(const CrissCrossForward& call);
GINGHAM_API size_t workspace_size(const CrissCrossBackward& call);
// All pointers are device pointers of the current device; the work is queued on `stream` (a cudaStream_t).
// allow_tf32: float32 products may use TF32 tensor cores. Throws std::runtime_error when a launch fails.
GINGHAM_API void criss_cross_attention(const CrissCrossForward& call, bool allow_tf32, void* workspace, void* stream);
GINGHAM_API void criss_cross_attention_backward(const CrissCrossBackward& call, bool allow_tf32, void* workspace,
                                                void* stream);
}  // namespace cuda

}  // namespace gingham
