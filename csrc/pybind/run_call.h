// Included behind an operator's header: what it calls must be declared by then.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "arrays.h"
#include "thread_pool.h"

namespace gingham::python {

// On our own threads, without the interpreter's lock.
template <class Call>
void run_call(const Call& call, int threads) {
  const py::gil_scoped_release release;
  const size_t size = (cpu::workspace_size(call, threads) + 63) / 64 * 64;
  const std::unique_ptr<void, void (*)(void*)> workspace(size ? std::aligned_alloc(64, size) : nullptr, std::free);
  if (size && !workspace) throw std::bad_alloc();
  cpu::run(call, threads, workspace.get(), ThreadPool::parallel_for);
}
#if defined(GINGHAM_CUDA)
// On a stream of CuPy, with workspace that CuPy allocated.
template <class Call>
void run_call_on_stream(const Call& call, uintptr_t workspace, uintptr_t stream) {
  const py::gil_scoped_release release;
  cuda::run(call, pointer<void>(workspace), pointer<void>(stream));
}
#endif

}  // namespace gingham::python
