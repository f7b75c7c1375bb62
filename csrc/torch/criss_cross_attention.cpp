// torch.ops.gingham.criss_cross_attention and its backward.
#include "gingham/criss_cross_attention.h"

#include "run_call.h"
#include "tensor.h"

namespace gingham::torch_front {
namespace {

constexpr Checks require("criss_cross_attention");

CrissCrossShape checked_shape(const Tensor& query, const Tensor& key, const Tensor& value) {
  require.floating(query);
  const int64_t dim = query.dim();
  require(dim == 4 || dim == 5, "query must be [B, Ck, H, W] or [B, Ck, T, H, W]");
  for (const Tensor* map : {&key, &value}) {
    require(map->dim() == dim, "query, key and value must have the same number of dimensions");
    require(map->dtype() == query.dtype(), "query, key and value must have one dtype");
    require.same_device(*map, query, "query, key and value must be on one device");
    for (int64_t d = 0; d < dim; ++d) {
      require(d == 1 || map->size(d) == query.size(d),
              "query, key and value must have the same batch and spatial sizes");
    }
  }
  require(key.size(1) == query.size(1), "query and key must have the same number of channels");
  require(query.size(1) > 0, "query must have at least one channel");
  return {query.size(0),       query.size(1),      value.size(1), dim == 5 ? query.size(2) : 1,
          query.size(dim - 2), query.size(dim - 1)};
}

// The log-sum-exp: float64 [B, (T,) H, W], contiguous.
struct LseSizes {
  int64_t dim, sizes[4];

  explicit LseSizes(const Tensor& value) : dim(value.dim() - 1) {
    for (int64_t d = 0; d < dim; ++d) sizes[d] = value.size(d == 0 ? 0 : d + 1);
  }
};

template <bool cuda>
void forward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor query = tensor_argument(stack[0]), key = tensor_argument(stack[1]), value = tensor_argument(stack[2]);
  CrissCrossForward call;
  call.shape = checked_shape(query, key, value);
  call.dtype = dtype_of(query);
  call.scale = double_argument(stack[3]);
  call.allow_tf32 = bool_argument(stack[4]);
  const bool channels_last = is_channels_last(value);
  Tensor copies[3];
  call.query = read_view(native_map(query, channels_last, copies[0]));
  call.key = read_view(native_map(key, channels_last, copies[1]));
  call.value = read_view(native_map(value, channels_last, copies[2]));
  const LseSizes sizes(value);
  Tensor output = empty_map(value.sizes(), value, channels_last);
  Tensor lse = empty_contiguous(sizes.dim, sizes.sizes, aoti_torch_dtype_float64(), value);
  call.output = write_view(output);
  call.lse = static_cast<double*>(lse.mutable_data());
  run_call<cuda>(call, value);
  stack[0] = output.release();
  stack[1] = lse.release();
}

template <bool cuda>
void backward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor grad = tensor_argument(stack[0]), query = tensor_argument(stack[1]), key = tensor_argument(stack[2]),
         value = tensor_argument(stack[3]), output = tensor_argument(stack[4]), lse = tensor_argument(stack[5]);
  CrissCrossBackward call;
  call.shape = checked_shape(query, key, value);
  call.dtype = dtype_of(query);
  call.scale = double_argument(stack[6]);
  call.allow_tf32 = bool_argument(stack[7]);
  require.same(grad, value, "grad_output must have the shape, dtype and device of value");
  require.same(output, value, "output must have the shape, dtype and device of value");
  const LseSizes sizes(value);
  require.same(lse, sizes.sizes, sizes.dim, aoti_torch_dtype_float64(), value,
               "lse must have the shape, dtype and device of what the forward returned");
  const bool channels_last = is_channels_last(value);
  Tensor copies[5], lse_copy;
  call.query = read_view(native_map(query, channels_last, copies[0]));
  call.key = read_view(native_map(key, channels_last, copies[1]));
  call.value = read_view(native_map(value, channels_last, copies[2]));
  call.output = read_view(native_map(output, channels_last, copies[3]));
  call.grad_output = read_view(native_map(grad, channels_last, copies[4]));
  call.lse = static_cast<const double*>(contiguous(lse, lse_copy).data());
  Tensor grad_query = empty_map(query.sizes(), query, channels_last);
  Tensor grad_key = empty_map(key.sizes(), key, channels_last);
  Tensor grad_value = empty_map(value.sizes(), value, channels_last);
  call.grad_query = write_view(grad_query);
  call.grad_key = write_view(grad_key);
  call.grad_value = write_view(grad_value);
  run_call<cuda>(call, value);
  stack[0] = grad_query.release();
  stack[1] = grad_key.release();
  stack[2] = grad_value.release();
}

}  // namespace

void define_criss_cross_attention(Library& library) {
  library.define_with_backward(
      "criss_cross_attention",
      "(Tensor query, Tensor key, Tensor value, float scale, bool allow_tf32=False) -> (Tensor, Tensor)",
      "(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor lse, float scale, "
      "bool allow_tf32=False) -> (Tensor, Tensor, Tensor)");
}

void implement_criss_cross_attention(Library& library, bool cuda) {
  library.implement_with_backward("criss_cross_attention", cuda ? forward<true> : forward<false>,
                                  cuda ? backward<true> : backward<false>);
}

}  // namespace gingham::torch_front
