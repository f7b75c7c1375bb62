// Neighbouring elements that are loaded and stored at once.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace gingham::cuda {

// 16 bytes of a row of channels, or one element.
template <class T, bool wide>
struct alignas(wide ? 16 : sizeof(T)) Pack {
  static constexpr int kCount = wide ? 16 / static_cast<int>(sizeof(T)) : 1;
  T x[kCount];
};

template <class T>
bool is_wide(const void* data, std::initializer_list<int64_t> strides) {
  constexpr int64_t kCount = Pack<T, true>::kCount;
  bool wide = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (const int64_t stride : strides) wide = wide && stride % kCount == 0;
  return wide;
}

}  // namespace gingham::cuda
