#include "gingham/roi_pool.h"

#include "arrays.h"
#include "run_call.h"

namespace gingham::python {
namespace {

RoiPoolForward call_of(const std::array<int64_t, 7>& shape, int dtype, double spatial_scale, const Map& features,
                       uintptr_t boxes, const Map& output) {
  RoiPoolForward call;
  call.shape = {shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6]};
  call.dtype = DType(dtype);
  call.spatial_scale = spatial_scale;
  call.features = view_of(features, call.dtype);
  call.boxes = pointer<void>(boxes);
  call.output = view_of(output, call.dtype);
  return call;
}

// Returns the first invalid box, for which nothing is computed, or -1.
int64_t forward(std::array<int64_t, 7> shape, int dtype, double spatial_scale, Map features, uintptr_t boxes,
                Map output, int threads) {
  const RoiPoolForward call = call_of(shape, dtype, spatial_scale, features, boxes, output);
  const int64_t invalid = first_invalid_box(call.boxes, call.dtype, call.shape.boxes, call.shape.batch);
  if (invalid < 0) run_call(call, threads);
  return invalid;
}

#if defined(GINGHAM_CUDA)
size_t cuda_workspace(std::array<int64_t, 7> shape, int dtype) {
  return cuda::workspace_size(call_of(shape, dtype, 1.0, {}, 0, {}));
}
void cuda_forward(std::array<int64_t, 7> shape, int dtype, double spatial_scale, Map features, uintptr_t boxes,
                  Map output, uintptr_t workspace, uintptr_t stream) {
  run_call_on_stream(call_of(shape, dtype, spatial_scale, features, boxes, output), workspace, stream);
}
#endif

}  // namespace

void bind_roi_pool(py::module_& m) {
  m.def("roi_pool", &forward);
#if defined(GINGHAM_CUDA)
  m.def("roi_pool_cuda_workspace", &cuda_workspace);
  m.def("roi_pool_cuda", &cuda_forward);
#endif
}

}  // namespace gingham::python
