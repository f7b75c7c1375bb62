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

inline uint32_t ballot(bool condition) {
  return emulation::device.collective("ballot", condition, [](const bool* lanes, int) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(lanes[i]) << i;
    return bits;
  });
}

inline void synchronize_warp() {
  emulation::device.collective("synchronize_warp", 0, [](const int*, int) { return 0; });
}

inline int lowest_bit(uint32_t bits) { return __builtin_ctz(bits); }
inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }

constexpr size_t kMostSharedBytes = 96 * 1024;

// So small a device, and so few bytes of a workspace, that batches are taken in parts.
inline int64_t cache_bytes() { return 1024; }
constexpr int64_t kCopyBytes = 1024;

template <class Parameters>
void launch(void (*kernel)(Parameters), int64_t blocks, int threads, size_t shared_bytes, void*,
            Parameters parameters) {
  if (blocks == 0) return;
  emulation::device.run_grid(blocks, threads, shared_bytes, [&] { kernel(parameters); });
}

}  // namespace gingham::cuda
