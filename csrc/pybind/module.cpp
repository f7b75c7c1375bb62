// gingham._native: the operators on raw buffers for gingham.array, and build information. Knows no torch.
//
// Arguments were validated in Python; arrays arrive as addresses with shapes and byte strides, so that NumPy, ml_dtypes
// and CuPy share one entry per operator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <memory>

#include "dispatch.h"
#include "gingham/criss_cross_attention.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace {

using gingham::DType;
using gingham::MapView;

// (address, strides in bytes of [batch, channel, frame, row, column])
using Map = std::pair<uintptr_t, std::array<int64_t, 5>>;

MapView view_of(const Map& map, DType dtype) {
  const int64_t size = gingham::element_size(dtype);
  const auto& s = map.second;
  return {reinterpret_cast<void*>(map.first), s[0] / size, s[1] / size, s[2] / size, s[3] / size, s[4] / size};
}

gingham::CrissCrossForward criss_cross_call(const std::array<int64_t, 6>& shape, int dtype, double scale,
                                            const Map& query, const Map& key, const Map& value, const Map& output,
                                            uintptr_t lse) {
  gingham::CrissCrossForward call;
  call.shape = {shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]};
  call.dtype = DType(dtype);
  call.scale = scale;
  call.query = view_of(query, call.dtype);
  call.key = view_of(key, call.dtype);
  call.value = view_of(value, call.dtype);
  call.output = view_of(output, call.dtype);
  call.lse = reinterpret_cast<double*>(lse);
  return call;
}

void criss_cross_attention(std::array<int64_t, 6> shape, int dtype, double scale, Map query, Map key, Map value,
                           Map output, uintptr_t lse, int threads) {
  const auto call = criss_cross_call(shape, dtype, scale, query, key, value, output, lse);
  const py::gil_scoped_release release;
  const size_t size = (gingham::cpu::workspace_size(call, threads) + 63) / 64 * 64;
  const std::unique_ptr<void, void (*)(void*)> workspace(size ? std::aligned_alloc(64, size) : nullptr, std::free);
  if (size && !workspace) throw std::bad_alloc();
  gingham::cpu::criss_cross_attention(call, threads, workspace.get(), gingham::python::ThreadPool::parallel_for);
}

#if defined(GINGHAM_CUDA)
size_t criss_cross_attention_cuda_workspace(std::array<int64_t, 6> shape, int dtype) {
  return gingham::cuda::workspace_size(criss_cross_call(shape, dtype, 1.0, {}, {}, {}, {}, 0));
}
void criss_cross_attention_cuda(std::array<int64_t, 6> shape, int dtype, double scale, Map query, Map key, Map value,
                                Map output, uintptr_t lse, uintptr_t workspace, uintptr_t stream) {
  const auto call = criss_cross_call(shape, dtype, scale, query, key, value, output, lse);
  const py::gil_scoped_release release;
  gingham::cuda::criss_cross_attention(call, false, reinterpret_cast<void*>(workspace),
                                       reinterpret_cast<void*>(stream));
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Gingham's kernels on raw buffers; use gingham.array";
  m.attr("version") = GINGHAM_VERSION;
  m.attr("git_commit") = GINGHAM_GIT_COMMIT;
  m.attr("compiler") = GINGHAM_COMPILER;
  m.attr("cuda_architectures") = GINGHAM_CUDA_ARCHITECTURES;
  m.def("instruction_set", [] { return gingham::cpu::isa_name(gingham::cpu::isa()); });
  m.def("available_instruction_sets", &gingham::cpu::available_isas);
  m.def("criss_cross_attention", &criss_cross_attention);
#if defined(GINGHAM_CUDA)
  m.def("criss_cross_attention_cuda_workspace", &criss_cross_attention_cuda_workspace);
  m.def("criss_cross_attention_cuda", &criss_cross_attention_cuda);
#endif
}
