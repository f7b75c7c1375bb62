#include "gingham/criss_cross_attention.h"

#include "arrays.h"
#include "run_call.h"

namespace gingham::python {
namespace {

CrissCrossForward call_of(const std::array<int64_t, 6>& shape, int dtype, double scale, const Map& query,
                          const Map& key, const Map& value, const Map& output, uintptr_t lse) {
  CrissCrossForward call;
  call.shape = {shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]};
  call.dtype = DType(dtype);
  call.scale = scale;
  call.query = view_of(query, call.dtype);
  call.key = view_of(key, call.dtype);
  call.value = view_of(value, call.dtype);
  call.output = view_of(output, call.dtype);
  call.lse = pointer<double>(lse);
  return call;
}

void forward(std::array<int64_t, 6> shape, int dtype, double scale, Map query, Map key, Map value, Map output,
             uintptr_t lse, int threads) {
  run_call(call_of(shape, dtype, scale, query, key, value, output, lse), threads);
}

#if defined(GINGHAM_CUDA)
size_t cuda_workspace(std::array<int64_t, 6> shape, int dtype, Map query, Map key, Map value, Map output) {
  return cuda::workspace_size(call_of(shape, dtype, 1.0, query, key, value, output, 0));
}
void cuda_forward(std::array<int64_t, 6> shape, int dtype, double scale, Map query, Map key, Map value, Map output,
                  uintptr_t lse, uintptr_t workspace, uintptr_t stream) {
  run_call_on_stream(call_of(shape, dtype, scale, query, key, value, output, lse), workspace, stream);
}
#endif

}  // namespace

void bind_criss_cross_attention(py::module_& m) {
  m.def("criss_cross_attention", &forward);
#if defined(GINGHAM_CUDA)
  m.def("criss_cross_attention_cuda_workspace", &cuda_workspace);
  m.def("criss_cross_attention_cuda", &cuda_forward);
#endif
}

}  // namespace gingham::python
