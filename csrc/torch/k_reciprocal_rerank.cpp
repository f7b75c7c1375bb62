// torch.ops.gingham.k_reciprocal_rerank, and the same with an underscore, which the eager path calls: the public name
// is given an autograd formula, which says that there are no gradients.
#include "gingham/k_reciprocal_rerank.h"

#include "run_call.h"
#include "tensor.h"

namespace gingham::torch_front {
namespace {

constexpr Checks require("k_reciprocal_rerank");

FeatureRows rows_of(const Tensor& features, Tensor& copy) {
  const bool adjacent = features.stride(1) == 1 || features.size(1) == 1;
  const Tensor& rows = adjacent ? features : contiguous(features, copy);
  return {rows.data(), rows.stride(0)};
}

void forward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor query = tensor_argument(stack[0]), gallery = tensor_argument(stack[1]);
  require.floating(query);
  require(query.dim() == 2, "query_features must be [Nq, D]");
  require(gallery.dim() == 2, "gallery_features must be [Ng, D]");
  require(gallery.dtype() == query.dtype(), "query_features and gallery_features must have one dtype");
  require.same_device(gallery, query, "query_features and gallery_features must be on one device");
  require(gallery.size(1) == query.size(1),
          "query_features and gallery_features must have the same number of features");
  require(query.size(1) > 0, "query_features must have at least one feature");
  KReciprocalRerankForward call;
  call.shape = {query.size(0), gallery.size(0), query.size(1)};
  call.dtype = dtype_of(query);
  call.k1 = int_argument(stack[2]);
  call.k2 = int_argument(stack[3]);
  call.lambda = double_argument(stack[4]);
  require(call.k1 >= 1, "k1 must be at least 1");
  require(call.k2 >= 1, "k2 must be at least 1");
  require(call.lambda >= 0 && call.lambda <= 1, "lambda_value must be in [0, 1]");
  Tensor copies[2];
  call.query_features = rows_of(query, copies[0]);
  call.gallery_features = rows_of(gallery, copies[1]);
  const int32_t dtype = call.dtype == DType::float64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  Tensor output = empty_contiguous({query.size(0), gallery.size(0)}, dtype, query);
  call.output = output.mutable_data();
  NotFinite not_finite = NotFinite::none;
  call.not_finite = &not_finite;
  run_call<false>(call, query);
  require(not_finite != NotFinite::query_features, "query_features must be finite, got NaN or infinity");
  require(not_finite != NotFinite::gallery_features, "gallery_features must be finite, got NaN or infinity");
  stack[0] = output.release();
}

}  // namespace

void define_k_reciprocal_rerank(Library& library) {
  for (const char* prefix : {"", "_"}) {
    library.define(
        (prefix + std::string("k_reciprocal_rerank(Tensor query_features, Tensor gallery_features, int k1=20, "
                              "int k2=6, float lambda_value=0.3) -> Tensor"))
            .c_str());
  }
}

void implement_k_reciprocal_rerank(Library& library) {
  for (const char* name : {"k_reciprocal_rerank", "_k_reciprocal_rerank"}) library.implement(name, forward);
}

}  // namespace gingham::torch_front
