// Twin of csrc/cuda/launch.cuh.
#pragma once

#include <cstdint>

#include "device.h"

namespace gingham::cuda {

#define GINGHAM_SHARED_MEMORY(name) unsigned char* const name = ::gingham::emulation::device.shared

template <class T>
inline T shuffle_xor(T value, int mask) {
  return emulation::device.collective("shuffle_xor", value,
                                      [&](const T* lanes, int lane) { return lanes[lane ^ mask]; });
}

// So small a device that batches are taken in parts.
inline int64_t multiprocessors() { return 1; }
inline int64_t cache_bytes() { return 1024; }

template <class Parameters>
void launch(void (*kernel)(Parameters), int64_t blocks, int threads, size_t shared_bytes, void*,
            Parameters parameters) {
  if (blocks == 0) return;
  emulation::device.run_grid(blocks, threads, shared_bytes, [&] { kernel(parameters); });
}

}  // namespace gingham::cuda
