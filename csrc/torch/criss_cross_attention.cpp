// torch.ops.gingham.criss_cross_attention and its backward.
//
// Each exists twice with the same kernel: the public name carries the autograd formula for torch.compile and
// torch.export, the name with an underscore carries none and is what the eager fast path calls.
#include "gingham/criss_cross_attention.h"

#include "tensor.h"

namespace gingham::torch_front {
namespace {

void require(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(std::string("gingham: criss_cross_attention: ") + message);
}

CrissCrossShape checked_shape(const Tensor& query, const Tensor& key, const Tensor& value) {
  const int64_t dim = query.dim();
  require(dim == 4 || dim == 5, "query must be [B, Ck, H, W] or [B, Ck, T, H, W]");
  for (const Tensor* map : {&key, &value}) {
    require(map->dim() == dim, "query, key and value must have the same number of dimensions");
    require(map->dtype() == query.dtype(), "query, key and value must have one dtype");
    require(map->device_type() == query.device_type() && map->device_index() == query.device_index(),
            "query, key and value must be on one device");
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

void check_like(const Tensor& tensor, const Tensor& like, const char* message) {
  bool same = tensor.dim() == like.dim() && tensor.dtype() == like.dtype() &&
              tensor.device_type() == like.device_type() && tensor.device_index() == like.device_index();
  for (int64_t d = 0; same && d < like.dim(); ++d) same = tensor.size(d) == like.size(d);
  require(same, message);
}

// The log-sum-exp: float64 [B, (T,) H, W], contiguous.
struct LseLayout {
  int64_t dim, sizes[4], strides[4];
  int32_t dtype = aoti_torch_dtype_float64();

  explicit LseLayout(const Tensor& value) : dim(value.dim() - 1) {
    int64_t step = 1;
    for (int64_t d = dim - 1; d >= 0; --d) {
      sizes[d] = value.size(d == 0 ? 0 : d + 1);
      strides[d] = step;
      step *= sizes[d] > 0 ? sizes[d] : 1;
    }
  }
};

// lse itself when it has that layout, otherwise a copy in `copy`.
const Tensor& native_lse(const Tensor& lse, const Tensor& value, Tensor& copy) {
  const LseLayout expected(value);
  bool same = lse.dim() == expected.dim && lse.dtype() == expected.dtype && lse.device_type() == value.device_type() &&
              lse.device_index() == value.device_index();
  bool contiguous = true;
  for (int64_t d = 0; same && d < expected.dim; ++d) {
    same = lse.size(d) == expected.sizes[d];
    contiguous = contiguous && (lse.size(d) <= 1 || lse.stride(d) == expected.strides[d]);
  }
  require(same, "lse must have the shape, dtype and device of what the forward returned");
  if (contiguous) return lse;
  copy = Tensor::empty(expected.dim, expected.sizes, expected.strides, expected.dtype, value);
  check(aoti_torch_copy_(copy.handle(), lse.handle(), 0), "copy a tensor");
  return copy;
}

template <bool cuda>
void forward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor query = tensor_argument(stack[0]), key = tensor_argument(stack[1]), value = tensor_argument(stack[2]);
  CrissCrossForward call;
  call.shape = checked_shape(query, key, value);
  call.dtype = dtype_of(query);
  call.scale = double_argument(stack[3]);
  const bool channels_last = is_channels_last(value);
  Tensor copies[3];
  call.query = read_view(native_map(query, channels_last, copies[0]));
  call.key = read_view(native_map(key, channels_last, copies[1]));
  call.value = read_view(native_map(value, channels_last, copies[2]));
  const LseLayout layout(value);
  Tensor output = empty_map(value.sizes(), value, channels_last);
  Tensor lse = Tensor::empty(layout.dim, layout.sizes, layout.strides, layout.dtype, value);
  call.output = write_view(output);
  call.lse = static_cast<double*>(lse.mutable_data());
  if constexpr (cuda) {
#if defined(GINGHAM_CUDA)
    const CudaScope scope(value);
    const Tensor workspace = device_memory(cuda::workspace_size(call), value);
    cuda::criss_cross_attention(call, stack[4] != 0, workspace.mutable_data(), scope.stream());
#endif
  } else {
    const int threads = thread_count();
    const HostMemory workspace = host_memory(cpu::workspace_size(call, threads));
    cpu::criss_cross_attention(call, threads, workspace.get(), parallel_for);
  }
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
  check_like(grad, value, "grad_output must have the shape, dtype and device of value");
  check_like(output, value, "output must have the shape, dtype and device of value");
  const bool channels_last = is_channels_last(value);
  Tensor copies[5], lse_copy;
  call.query = read_view(native_map(query, channels_last, copies[0]));
  call.key = read_view(native_map(key, channels_last, copies[1]));
  call.value = read_view(native_map(value, channels_last, copies[2]));
  call.output = read_view(native_map(output, channels_last, copies[3]));
  call.grad_output = read_view(native_map(grad, channels_last, copies[4]));
  call.lse = static_cast<const double*>(native_lse(lse, value, lse_copy).data());
  Tensor grad_query = empty_map(query.sizes(), query, channels_last);
  Tensor grad_key = empty_map(key.sizes(), key, channels_last);
  Tensor grad_value = empty_map(value.sizes(), value, channels_last);
  call.grad_query = write_view(grad_query);
  call.grad_key = write_view(grad_key);
  call.grad_value = write_view(grad_value);
  if constexpr (cuda) {
#if defined(GINGHAM_CUDA)
    const CudaScope scope(value);
    const Tensor workspace = device_memory(cuda::workspace_size(call), value);
    cuda::criss_cross_attention_backward(call, stack[7] != 0, workspace.mutable_data(), scope.stream());
#endif
  } else {
    const int threads = thread_count();
    const HostMemory workspace = host_memory(cpu::workspace_size(call, threads));
    cpu::criss_cross_attention_backward(call, threads, workspace.get(), parallel_for);
  }
  stack[0] = grad_query.release();
  stack[1] = grad_key.release();
  stack[2] = grad_value.release();
}

}  // namespace

void define_criss_cross_attention(Library& library) {
  for (const char* prefix : {"", "_"}) {
    const std::string name = prefix + std::string("criss_cross_attention");
    library.define(
        (name + "(Tensor query, Tensor key, Tensor value, float scale, bool allow_tf32=False) -> (Tensor, Tensor)")
            .c_str());
    library.define((name +
                    "_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor lse, "
                    "float scale, bool allow_tf32=False) -> (Tensor, Tensor, Tensor)")
                       .c_str());
  }
}

void implement_criss_cross_attention(Library& library, bool cuda) {
  for (const char* prefix : {"", "_"}) {
    const std::string name = prefix + std::string("criss_cross_attention");
    library.implement(name.c_str(), cuda ? forward<true> : forward<false>);
    library.implement((name + "_backward").c_str(), cuda ? backward<true> : backward<false>);
  }
}

}  // namespace gingham::torch_front
