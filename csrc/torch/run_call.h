// Included behind an operator's header: what it calls must be declared by then.
#pragma once

#include "tensor.h"

namespace gingham::torch_front {

// Runs a call on the device of `like`, with workspace that lives as long as the call.
template <bool cuda, class Call>
void run_call(const Call& call, const Tensor& like) {
  if constexpr (cuda) {
#if defined(GINGHAM_CUDA)
    const CudaScope scope(like);
    const Tensor workspace = device_memory(cuda::workspace_size(call), like);
    cuda::run(call, workspace.mutable_data(), scope.stream());
#endif
  } else {
    const int threads = thread_count();
    const HostMemory workspace = host_memory(cpu::workspace_size(call, threads));
    cpu::run(call, threads, workspace.get(), parallel_for);
  }
}

}  // namespace gingham::torch_front
