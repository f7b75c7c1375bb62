#include "gingham/cosine_similarity_map.h"

#include "arrays.h"
#include "run_call.h"

namespace gingham::python {
namespace {

// (address, strides in bytes of [batch, prototype])
using Prototypes = std::pair<uintptr_t, std::array<int64_t, 2>>;

CosineSimilarityMapForward call_of(const std::array<int64_t, 5>& shape, int dtype, double eps, bool torch_compat,
                                   const Map& features, const Prototypes& prototypes, const Map& output,
                                   uintptr_t feature_norms, uintptr_t prototype_norms) {
  CosineSimilarityMapForward call;
  call.shape = {shape[0], shape[1], shape[2], shape[3], shape[4]};
  call.dtype = DType(dtype);
  call.norms = {eps, torch_compat};
  call.features = view_of(features, call.dtype);
  const int64_t size = element_size(call.dtype);
  call.prototypes = {pointer<void>(prototypes.first), prototypes.second[0] / size, prototypes.second[1] / size};
  call.output = view_of(output, call.dtype);
  call.feature_norms = pointer<void>(feature_norms);
  call.prototype_norms = pointer<void>(prototype_norms);
  return call;
}

void forward(std::array<int64_t, 5> shape, int dtype, double eps, bool torch_compat, Map features,
             Prototypes prototypes, Map output, uintptr_t feature_norms, uintptr_t prototype_norms, int threads) {
  run_call(call_of(shape, dtype, eps, torch_compat, features, prototypes, output, feature_norms, prototype_norms),
           threads);
}

#if defined(GINGHAM_CUDA)
size_t cuda_workspace(std::array<int64_t, 5> shape, int dtype) {
  return cuda::workspace_size(call_of(shape, dtype, 0, false, {}, {}, {}, 0, 0));
}
void cuda_forward(std::array<int64_t, 5> shape, int dtype, double eps, bool torch_compat, Map features,
                  Prototypes prototypes, Map output, uintptr_t feature_norms, uintptr_t prototype_norms,
                  uintptr_t workspace, uintptr_t stream) {
  run_call_on_stream(
      call_of(shape, dtype, eps, torch_compat, features, prototypes, output, feature_norms, prototype_norms), workspace,
      stream);
}
#endif

}  // namespace

void bind_cosine_similarity_map(py::module_& m) {
  m.def("cosine_similarity_map", &forward);
#if defined(GINGHAM_CUDA)
  m.def("cosine_similarity_map_cuda_workspace", &cuda_workspace);
  m.def("cosine_similarity_map_cuda", &cuda_forward);
#endif
}

}  // namespace gingham::python
