#include "gingham/masked_similarity.h"

#include "arrays.h"
#include "run_call.h"

namespace gingham::python {
namespace {

// (whether the mask is resized, eps, whether small norms are treated as torch does)
struct Options {
  bool resize_mask;
  double eps;
  bool torch_compat;

  explicit Options(const std::tuple<bool, double, bool>& options)
      : resize_mask(std::get<0>(options)), eps(std::get<1>(options)), torch_compat(std::get<2>(options)) {}
};

// maps: query, support, mask; results: similarity, weights, totals, prototype, query_norms. In support and mask the
// frame is the shot.
MaskedSimilarityForward call_of(const std::array<int64_t, 9>& s, int dtype, int mask_type, const Options& options,
                                const std::array<Map, 3>& maps, uintptr_t valid_sizes,
                                const std::array<uintptr_t, 5>& results) {
  MaskedSimilarityForward call;
  call.shape = {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8]};
  call.dtype = DType(dtype);
  call.mask_type = MaskType(mask_type);
  call.resize = options.resize_mask ? MaskResize::mask : MaskResize::features;
  call.norms = {options.eps, options.torch_compat};
  call.query = view_of(maps[0], call.dtype);
  call.support = view_of(maps[1], call.dtype);
  call.mask = view_of(maps[2], mask_element_size(call.mask_type));
  call.valid_sizes = pointer<int64_t>(valid_sizes);
  call.similarity = pointer<void>(results[0]);
  call.weights = pointer<void>(results[1]);
  call.totals = pointer<void>(results[2]);
  call.prototype = pointer<void>(results[3]);
  call.query_norms = pointer<void>(results[4]);
  return call;
}

void forward(std::array<int64_t, 9> shape, int dtype, int mask_type, std::tuple<bool, double, bool> options,
             std::array<Map, 3> maps, uintptr_t valid_sizes, std::array<uintptr_t, 5> results, int threads) {
  run_call(call_of(shape, dtype, mask_type, Options(options), maps, valid_sizes, results), threads);
}

#if defined(GINGHAM_CUDA)
size_t cuda_workspace(std::array<int64_t, 9> shape, int dtype, std::array<Map, 3> maps) {  // layouts decide the size
  return cuda::workspace_size(call_of(shape, dtype, 0, Options({false, 0, false}), maps, 0, {}));
}
void cuda_forward(std::array<int64_t, 9> shape, int dtype, int mask_type, std::tuple<bool, double, bool> options,
                  std::array<Map, 3> maps, uintptr_t valid_sizes, std::array<uintptr_t, 5> results, uintptr_t workspace,
                  uintptr_t stream) {
  run_call_on_stream(call_of(shape, dtype, mask_type, Options(options), maps, valid_sizes, results), workspace, stream);
}
#endif

}  // namespace

void bind_masked_similarity(py::module_& m) {
  m.def("masked_similarity", &forward);
#if defined(GINGHAM_CUDA)
  m.def("masked_similarity_cuda_workspace", &cuda_workspace);
  m.def("masked_similarity_cuda", &cuda_forward);
#endif
}

}  // namespace gingham::python
