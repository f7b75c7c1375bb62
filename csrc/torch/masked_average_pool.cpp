// torch.ops.gingham.masked_average_pool and its backward, each with and without an autograd formula (see
// criss_cross_attention.cpp).
#include "gingham/masked_average_pool.h"

#include "masks.h"
#include "run_call.h"
#include "tensor.h"

namespace gingham::torch_front {
namespace {

constexpr Checks require("masked_average_pool");

MaskedAveragePoolShape checked_shape(const Tensor& features, const Tensor& mask) {
  require.floating(features);
  require(features.dim() == 4, "features must be [B, C, h, w]");
  require(mask.dim() == 4 && mask.size(0) == features.size(0) && mask.size(1) == 1, "mask must be [B, 1, H, W]");
  require.same_device(mask, features, "features and mask must be on one device");
  return {features.size(0), features.size(1), features.size(2), features.size(3), mask.size(2), mask.size(3)};
}

template <bool cuda>
void forward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor features = tensor_argument(stack[0]), mask = tensor_argument(stack[1]);
  MaskedAveragePoolForward call;
  const auto& s = call.shape = checked_shape(features, mask);
  call.dtype = dtype_of(features);
  call.mask_type = mask_type_of(require, mask);
  call.resize = resize_argument(stack[2]);
  Tensor copies[2];
  call.features = read_view(native_map(features, is_channels_last(features), copies[0]));
  call.mask = read_view(native_map(mask, false, copies[1]));
  Tensor pooled = empty_contiguous({s.batch, s.channels}, features.dtype(), features);
  Tensor weights = empty_contiguous({s.batch, s.rows, s.columns}, sum_dtype(features), features);
  Tensor total = empty_contiguous({s.batch}, sum_dtype(features), features);
  call.pooled = pooled.mutable_data();
  call.weights = weights.mutable_data();
  call.total = total.mutable_data();
  run_call<cuda>(call, features);
  stack[0] = pooled.release();
  stack[1] = weights.release();
  stack[2] = total.release();
}

template <bool cuda>
void backward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor grad = tensor_argument(stack[0]), features = tensor_argument(stack[1]), mask = tensor_argument(stack[2]),
         weights = tensor_argument(stack[3]), total = tensor_argument(stack[4]);
  const int64_t wanted = int_argument(stack[6]);
  MaskedAveragePoolBackward call;
  const auto& s = call.shape = checked_shape(features, mask);
  call.dtype = dtype_of(features);
  call.mask_type = mask_type_of(require, mask);
  call.resize = resize_argument(stack[5]);
  const int64_t pooled_sizes[] = {s.batch, s.channels}, weight_sizes[] = {s.batch, s.rows, s.columns};
  require.same(grad, pooled_sizes, 2, features.dtype(), features, "grad_pooled must be [B, C], like the output");
  require.same(weights, weight_sizes, 3, sum_dtype(features), features, "weights must be what the forward returned");
  require.same(total, &s.batch, 1, sum_dtype(features), features, "total must be what the forward returned");
  require(!(wanted & 2) || call.mask_type != MaskType::uint8, "a mask of whole numbers has no gradient");
  const bool channels_last = is_channels_last(features);
  Tensor copies[4];
  if (wanted & 2) call.features = read_view(native_map(features, channels_last, copies[0]));
  call.grad_pooled = contiguous(grad, copies[1]).data();
  call.weights = contiguous(weights, copies[2]).data();
  call.total = contiguous(total, copies[3]).data();
  Tensor grad_features = wanted & 1 ? empty_map(features.sizes(), features, channels_last) : no_gradient(features);
  Tensor grad_mask = wanted & 2 ? empty_contiguous(4, mask.sizes(), mask.dtype(), mask) : no_gradient(mask);
  if (wanted & 1) call.grad_features = write_view(grad_features);
  if (wanted & 2) call.grad_mask = write_view(grad_mask);
  run_call<cuda>(call, features);
  stack[0] = grad_features.release();
  stack[1] = grad_mask.release();
}

}  // namespace

void define_masked_average_pool(Library& library) {
  library.define_with_backward("masked_average_pool",
                               "(Tensor features, Tensor mask, bool resize_mask=False) -> (Tensor, Tensor, Tensor)",
                               "(Tensor grad_pooled, Tensor features, Tensor mask, Tensor weights, Tensor total, bool "
                               "resize_mask, int wanted) -> "
                               "(Tensor, Tensor)");
}

void implement_masked_average_pool(Library& library, bool cuda) {
  library.implement_with_backward("masked_average_pool", cuda ? forward<true> : forward<false>,
                                  cuda ? backward<true> : backward<false>);
}

}  // namespace gingham::torch_front
