// Copies from global to shared memory that pass by the registers and overlap with arithmetic.
#pragma once

#include <cstdint>

namespace gingham::cuda {

// 16 bytes, both addresses aligned to 16; only the first `bytes` are read, the rest becomes zero.
__device__ inline void copy_async(void* shared, const void* global, int bytes) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(global), "r"(bytes)
      : "memory");
}

// Waits for this thread's copies; a barrier must follow before other threads read them.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace gingham::cuda
