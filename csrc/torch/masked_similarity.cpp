// torch.ops.gingham.masked_similarity and its backward, each with and without an autograd formula (see
// criss_cross_attention.cpp).
#include "gingham/masked_similarity.h"

#include <optional>

#include "masks.h"
#include "norms.h"
#include "run_call.h"
#include "tensor.h"

namespace gingham::torch_front {
namespace {

constexpr Checks require("masked_similarity");

MaskedSimilarityShape checked_shape(const Tensor& query, const Tensor& support, const Tensor& mask) {
  require.floating(query);
  require(query.dim() == 4, "query must be [B, C, h, w]");
  require(support.dim() == 5 && support.size(0) == query.size(0) && support.size(2) == query.size(1),
          "support must be [B, K, C, h', w']");
  require(mask.dim() == 5 && mask.size(0) == query.size(0) && mask.size(1) == support.size(1) && mask.size(2) == 1,
          "mask must be [B, K, 1, H, W]");
  require(query.size(1) > 0, "query must have at least one channel");
  require(support.size(1) > 0, "support must have at least one shot");
  require(support.dtype() == query.dtype(), "query and support must have one dtype");
  require.same_device(support, query, "query and support must be on one device");
  require.same_device(mask, query, "query and mask must be on one device");
  return {query.size(0),   support.size(1), query.size(1), query.size(2), query.size(3),
          support.size(3), support.size(4), mask.size(3),  mask.size(4)};
}

// Null where there are none. Values are checked on the CPU only: on CUDA that would wait for the device.
template <bool cuda>
const int64_t* checked_sizes(const std::optional<Tensor>& valid_sizes, const MaskedSimilarityShape& s,
                             const Tensor& query, Tensor& copy) {
  if (!valid_sizes) return nullptr;
  const int64_t sizes[] = {s.batch, s.shots, 4};
  require.same(*valid_sizes, sizes, 3, aoti_torch_dtype_int64(), query, "valid_sizes must be int64 [B, K, 4]");
  const auto* values = static_cast<const int64_t*>(contiguous(*valid_sizes, copy).data());
  if constexpr (!cuda) {
    const int64_t most[] = {s.support_rows, s.support_columns, s.mask_rows, s.mask_columns};
    for (int64_t i = 0; i < 4 * s.batch * s.shots; ++i) {
      require(0 <= values[i] && values[i] <= most[i % 4], "valid_sizes must be within the sizes of support and mask");
    }
  }
  return values;
}

// Maps of shots: [batch, shot, channel, row, column], the shot in the place of the frame.
MapView shots_view(const Tensor& map, void* data) {
  return {data, map.stride(0), map.stride(2), map.stride(1), map.stride(3), map.stride(4)};
}
MapView read_shots(const Tensor& map) { return shots_view(map, const_cast<void*>(map.data())); }

template <bool cuda>
void forward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor query = tensor_argument(stack[0]), support = tensor_argument(stack[1]), mask = tensor_argument(stack[2]);
  const std::optional<Tensor> valid_sizes = optional_tensor_argument(stack[3]);
  MaskedSimilarityForward call;
  const auto& s = call.shape = checked_shape(query, support, mask);
  call.dtype = dtype_of(query);
  call.mask_type = mask_type_of(require, mask);
  call.resize = resize_argument(stack[4]);
  call.norms = norms_argument(require, stack[5], stack[6]);
  Tensor copies[4];
  call.query = read_view(native_map(query, is_channels_last(query), copies[0]));
  call.support = read_shots(native_map(support, is_channels_last(support, 2), copies[1], 2));
  call.mask = read_shots(native_map(mask, false, copies[2], 2));
  call.valid_sizes = checked_sizes<cuda>(valid_sizes, s, query, copies[3]);
  const int32_t sums = sum_dtype(query);
  Tensor similarity = empty_contiguous({s.batch, 1, s.rows, s.columns}, query.dtype(), query);
  Tensor weights = empty_contiguous({s.batch, s.shots, s.support_rows * s.support_columns}, sums, query);
  Tensor totals = empty_contiguous({s.batch, s.shots}, sums, query);
  Tensor prototype = empty_contiguous({s.batch, s.channels}, sums, query);
  Tensor query_norms = empty_contiguous({s.batch, s.rows, s.columns}, sums, query);
  call.similarity = similarity.mutable_data();
  call.weights = weights.mutable_data();
  call.totals = totals.mutable_data();
  call.prototype = prototype.mutable_data();
  call.query_norms = query_norms.mutable_data();
  run_call<cuda>(call, query);
  stack[0] = similarity.release();
  stack[1] = weights.release();
  stack[2] = totals.release();
  stack[3] = prototype.release();
  stack[4] = query_norms.release();
}

template <bool cuda>
void backward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor grad = tensor_argument(stack[0]), query = tensor_argument(stack[1]), support = tensor_argument(stack[2]),
         mask = tensor_argument(stack[3]), similarity = tensor_argument(stack[4]), weights = tensor_argument(stack[5]),
         totals = tensor_argument(stack[6]), prototype = tensor_argument(stack[7]),
         query_norms = tensor_argument(stack[8]);
  const std::optional<Tensor> valid_sizes = optional_tensor_argument(stack[9]);
  const int64_t wanted = int_argument(stack[13]);
  MaskedSimilarityBackward call;
  const auto& s = call.shape = checked_shape(query, support, mask);
  call.dtype = dtype_of(query);
  call.mask_type = mask_type_of(require, mask);
  call.resize = resize_argument(stack[10]);
  call.norms = norms_argument(require, stack[11], stack[12]);
  const int32_t sums = sum_dtype(query);
  const int64_t map_sizes[] = {s.batch, 1, s.rows, s.columns};
  const int64_t weight_sizes[] = {s.batch, s.shots, s.support_rows * s.support_columns};
  const int64_t prototype_sizes[] = {s.batch, s.channels}, norm_sizes[] = {s.batch, s.rows, s.columns};
  require.same(grad, map_sizes, 4, query.dtype(), query, "grad_similarity must be [B, 1, h, w], like the output");
  require.same(similarity, map_sizes, 4, query.dtype(), query, "similarity must be what the forward returned");
  require.same(weights, weight_sizes, 3, sums, query, "weights must be what the forward returned");
  require.same(totals, weight_sizes, 2, sums, query, "totals must be what the forward returned");
  require.same(prototype, prototype_sizes, 2, sums, query, "prototype must be what the forward returned");
  require.same(query_norms, norm_sizes, 3, sums, query, "query_norms must be what the forward returned");
  require(!(wanted & 4) || call.mask_type != MaskType::uint8, "a mask of whole numbers has no gradient");
  const bool query_last = is_channels_last(query), support_last = is_channels_last(support, 2);
  Tensor copies[9];
  call.query = read_view(native_map(query, query_last, copies[0]));
  if (wanted & 4) call.support = read_shots(native_map(support, support_last, copies[1], 2));
  call.valid_sizes = checked_sizes<cuda>(valid_sizes, s, query, copies[2]);
  call.grad_similarity = contiguous(grad, copies[3]).data();
  call.similarity = contiguous(similarity, copies[4]).data();
  call.weights = contiguous(weights, copies[5]).data();
  call.totals = contiguous(totals, copies[6]).data();
  call.prototype = contiguous(prototype, copies[7]).data();
  call.query_norms = contiguous(query_norms, copies[8]).data();
  Tensor grad_query = wanted & 1 ? empty_map(query.sizes(), query, query_last) : no_gradient(query);
  Tensor grad_support = wanted & 2 ? empty_map(support.sizes(), support, support_last, 2) : no_gradient(support);
  Tensor grad_mask = wanted & 4 ? empty_contiguous(5, mask.sizes(), mask.dtype(), mask) : no_gradient(mask);
  if (wanted & 1) call.grad_query = write_view(grad_query);
  if (wanted & 2) call.grad_support = shots_view(grad_support, grad_support.mutable_data());
  if (wanted & 4) call.grad_mask = shots_view(grad_mask, grad_mask.mutable_data());
  run_call<cuda>(call, query);
  stack[0] = grad_query.release();
  stack[1] = grad_support.release();
  stack[2] = grad_mask.release();
}

}  // namespace

void define_masked_similarity(Library& library) {
  library.define_with_backward(
      "masked_similarity",
      "(Tensor query, Tensor support, Tensor mask, Tensor? valid_sizes, bool resize_mask, float eps, bool "
      "torch_compat) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      "(Tensor grad_similarity, Tensor query, Tensor support, Tensor mask, Tensor similarity, Tensor weights, "
      "Tensor totals, Tensor prototype, Tensor query_norms, Tensor? valid_sizes, bool resize_mask, float eps, "
      "bool torch_compat, int wanted) -> (Tensor, Tensor, Tensor)");
}

void implement_masked_similarity(Library& library, bool cuda) {
  library.implement_with_backward("masked_similarity", cuda ? forward<true> : forward<false>,
                                  cuda ? backward<true> : backward<false>);
}

}  // namespace gingham::torch_front
