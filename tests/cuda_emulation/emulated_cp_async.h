// Twin of csrc/cuda/cp_async.cuh: what is copied arrives when it is waited for, and the target is spoilt until then.
#pragma once

#include <cstdint>
#include <cstring>

#include "device.h"

namespace gingham::cuda {

inline void copy_async(void* shared, const void* global, int bytes) {
  emulation::require(reinterpret_cast<uintptr_t>(shared) % 16 == 0 && emulation::device.is_shared(shared, 16),
                     "copy_async: the target is not 16 aligned bytes of shared memory");
  emulation::require(reinterpret_cast<uintptr_t>(global) % 16 == 0, "copy_async: the source is not aligned");
  emulation::require(bytes >= 0 && bytes <= 16, "copy_async: a copy has 0 to 16 bytes");
  emulation::Copy copy{static_cast<unsigned char*>(shared), {}};
  memcpy(copy.bytes, global, static_cast<size_t>(bytes));
  memset(shared, 0xff, 16);
  emulation::device.copies().push_back(copy);
}

inline void wait_for_copies() {
  for (const emulation::Copy& copy : emulation::device.copies()) memcpy(copy.to, copy.bytes, 16);
  emulation::device.copies().clear();
}

}  // namespace gingham::cuda
