// Arrays as Python hands them over.
//
// Arguments were validated in Python; arrays arrive as addresses with shapes and byte strides, so that NumPy, ml_dtypes
// and CuPy share one entry per operator.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <utility>

#include "gingham/core.h"

namespace gingham::python {

namespace py = pybind11;

// (address, strides in bytes of [batch, channel, frame, row, column])
using Map = std::pair<uintptr_t, std::array<int64_t, 5>>;

inline MapView view_of(const Map& map, int64_t size) {
  const auto& s = map.second;
  return {reinterpret_cast<void*>(map.first), s[0] / size, s[1] / size, s[2] / size, s[3] / size, s[4] / size};
}

inline MapView view_of(const Map& map, DType dtype) { return view_of(map, element_size(dtype)); }

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Each operator's file says what it binds; module.cpp calls them in order.
void bind_cosine_similarity_map(py::module_& m);
void bind_criss_cross_attention(py::module_& m);
void bind_k_reciprocal_rerank(py::module_& m);
void bind_masked_average_pool(py::module_& m);
void bind_masked_similarity(py::module_& m);
void bind_spatial_temporal_attention(py::module_& m);
void bind_roi_pool(py::module_& m);

}  // namespace gingham::python
