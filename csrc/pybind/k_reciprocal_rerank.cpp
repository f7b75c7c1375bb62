#include "gingham/k_reciprocal_rerank.h"

#include "arrays.h"
#include "run_call.h"

namespace gingham::python {
namespace {

using Rows = std::pair<uintptr_t, int64_t>;  // (address, bytes from one row to the next)

FeatureRows rows_of(const Rows& rows, DType dtype) {
  return {pointer<void>(rows.first), rows.second / element_size(dtype)};
}

// Which features are not finite: 0 none, 1 query_features, 2 gallery_features.
int forward(std::array<int64_t, 3> shape, int dtype, int64_t k1, int64_t k2, double lambda_value, Rows query_features,
            Rows gallery_features, uintptr_t output, int threads) {
  KReciprocalRerankForward call;
  call.shape = {shape[0], shape[1], shape[2]};
  call.dtype = DType(dtype);
  call.k1 = k1;
  call.k2 = k2;
  call.lambda = lambda_value;
  call.query_features = rows_of(query_features, call.dtype);
  call.gallery_features = rows_of(gallery_features, call.dtype);
  call.output = pointer<void>(output);
  NotFinite not_finite = NotFinite::none;
  call.not_finite = &not_finite;
  run_call(call, threads);
  return int(not_finite);
}

}  // namespace

void bind_k_reciprocal_rerank(py::module_& m) { m.def("k_reciprocal_rerank", &forward); }

}  // namespace gingham::python
