#include "gingham/masked_average_pool.h"

#include "arrays.h"
#include "run_call.h"

namespace gingham::python {
namespace {

MaskedAveragePoolForward call_of(const std::array<int64_t, 6>& shape, int dtype, int mask_type, bool resize_mask,
                                 const Map& features, const Map& mask, uintptr_t pooled, uintptr_t weights,
                                 uintptr_t total) {
  MaskedAveragePoolForward call;
  call.shape = {shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]};
  call.dtype = DType(dtype);
  call.mask_type = MaskType(mask_type);
  call.resize = resize_mask ? MaskResize::mask : MaskResize::features;
  call.features = view_of(features, call.dtype);
  call.mask = view_of(mask, mask_element_size(call.mask_type));
  call.pooled = pointer<void>(pooled);
  call.weights = pointer<void>(weights);
  call.total = pointer<void>(total);
  return call;
}

void forward(std::array<int64_t, 6> shape, int dtype, int mask_type, bool resize_mask, Map features, Map mask,
             uintptr_t pooled, uintptr_t weights, uintptr_t total, int threads) {
  run_call(call_of(shape, dtype, mask_type, resize_mask, features, mask, pooled, weights, total), threads);
}

#if defined(GINGHAM_CUDA)
size_t cuda_workspace(std::array<int64_t, 6> shape, int dtype, Map features) {  // its layout decides the size
  return cuda::workspace_size(call_of(shape, dtype, 0, false, features, {}, 0, 0, 0));
}
void cuda_forward(std::array<int64_t, 6> shape, int dtype, int mask_type, bool resize_mask, Map features, Map mask,
                  uintptr_t pooled, uintptr_t weights, uintptr_t total, uintptr_t workspace, uintptr_t stream) {
  run_call_on_stream(call_of(shape, dtype, mask_type, resize_mask, features, mask, pooled, weights, total), workspace,
                     stream);
}
#endif

}  // namespace

void bind_masked_average_pool(py::module_& m) {
  m.def("masked_average_pool", &forward);
#if defined(GINGHAM_CUDA)
  m.def("masked_average_pool_cuda_workspace", &cuda_workspace);
  m.def("masked_average_pool_cuda", &cuda_forward);
#endif
}

}  // namespace gingham::python
