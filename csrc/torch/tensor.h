// Small owners for the handles of shim.h, and what the operators' front ends share: checks, layouts, registration.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "gingham/core.h"
#include "shim.h"

namespace gingham::torch_front {

inline void check(AOTITorchError error, const char* what) {
  if (error) throw std::runtime_error(std::string("gingham: torch failed to ") + what);
}

class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {
    check(aoti_torch_get_dim(handle_, &dim_), "read a tensor");
    check(aoti_torch_get_sizes(handle_, &sizes_), "read a tensor");
    check(aoti_torch_get_strides(handle_, &strides_), "read a tensor");
    check(aoti_torch_get_dtype(handle_, &dtype_), "read a tensor");
    check(aoti_torch_get_device_type(handle_, &device_type_), "read a tensor");
    check(aoti_torch_get_device_index(handle_, &device_index_), "read a tensor");
  }
  // A new tensor on the device of `like`.
  static Tensor empty(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype, const Tensor& like) {
    Tensor tensor;
    check(aoti_torch_empty_strided(dim, sizes, strides, dtype, like.device_type_, like.device_index_, &tensor.handle_),
          "allocate memory");
    tensor.dim_ = dim, tensor.dtype_ = dtype;
    tensor.device_type_ = like.device_type_, tensor.device_index_ = like.device_index_;
    check(aoti_torch_get_sizes(tensor.handle_, &tensor.sizes_), "read a tensor");
    check(aoti_torch_get_strides(tensor.handle_, &tensor.strides_), "read a tensor");
    return tensor;
  }
  Tensor(Tensor&& other) noexcept { *this = std::move(other); }
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    dim_ = other.dim_, sizes_ = other.sizes_, strides_ = other.strides_;
    dtype_ = other.dtype_, device_type_ = other.device_type_, device_index_ = other.device_index_;
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  int64_t dim() const { return dim_; }
  int64_t size(int64_t d) const { return sizes_[d]; }
  const int64_t* sizes() const { return sizes_; }
  int64_t stride(int64_t d) const { return strides_[d]; }
  int32_t dtype() const { return dtype_; }
  int32_t device_type() const { return device_type_; }
  int32_t device_index() const { return device_index_; }
  AtenTensorHandle handle() const { return handle_; }
  StableIValue release() { return reinterpret_cast<StableIValue>(std::exchange(handle_, nullptr)); }

  const void* data() const {
    const void* p;
    check(torch_get_const_data_ptr(handle_, &p), "read a tensor");
    return p;
  }
  void* mutable_data() const {
    void* p;
    check(torch_get_mutable_data_ptr(handle_, &p), "write a tensor");
    return p;
  }

 private:
  AtenTensorHandle handle_ = nullptr;
  int64_t dim_ = 0, *sizes_ = nullptr, *strides_ = nullptr;
  int32_t dtype_ = 0, device_type_ = 0, device_index_ = 0;
};

inline DType dtype_of(const Tensor& tensor) {
  static const int32_t kFloat32 = aoti_torch_dtype_float32(), kFloat64 = aoti_torch_dtype_float64(),
                       kFloat16 = aoti_torch_dtype_float16(), kBFloat16 = aoti_torch_dtype_bfloat16();
  if (tensor.dtype() == kFloat32) return DType::float32;
  if (tensor.dtype() == kFloat64) return DType::float64;
  if (tensor.dtype() == kFloat16) return DType::float16;
  if (tensor.dtype() == kBFloat16) return DType::bfloat16;
  throw std::runtime_error("gingham: expected float32, float64, float16 or bfloat16 tensors");
}

// The dtype in which sums of the tensor's elements are held.
inline int32_t sum_dtype(const Tensor& tensor) {
  return tensor.dtype() == aoti_torch_dtype_float64() ? tensor.dtype() : aoti_torch_dtype_float32();
}

// Checks at the border of an operator; errors begin with its name.
class Checks {
 public:
  constexpr explicit Checks(const char* name) : name_(name) {}
  void operator()(bool condition, const char* message) const {
    if (!condition) throw std::runtime_error(std::string("gingham: ") + name_ + ": " + message);
  }
  void same_device(const Tensor& tensor, const Tensor& like, const char* message) const {
    (*this)(tensor.device_type() == like.device_type() && tensor.device_index() == like.device_index(), message);
  }
  void floating(const Tensor& tensor) const {
    for (const int32_t dtype : {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(), aoti_torch_dtype_float16()}) {
      if (tensor.dtype() == dtype) return;
    }
    (*this)(tensor.dtype() == aoti_torch_dtype_bfloat16(), "expected float32, float64, float16 or bfloat16 tensors");
  }
  // Shape, dtype and device.
  void same(const Tensor& tensor, const int64_t* sizes, int64_t dim, int32_t dtype, const Tensor& like,
            const char* message) const {
    (*this)(tensor.dim() == dim && tensor.dtype() == dtype && std::equal(sizes, sizes + dim, tensor.sizes()), message);
    same_device(tensor, like, message);
  }
  void same(const Tensor& tensor, const Tensor& like, const char* message) const {
    same(tensor, like.sizes(), like.dim(), like.dtype(), like, message);
  }

 private:
  const char* name_;
};

// A row-major tensor of at most six dimensions.
inline Tensor empty_contiguous(int64_t dim, const int64_t* sizes, int32_t dtype, const Tensor& like) {
  int64_t strides[6], step = 1;
  for (int64_t d = dim - 1; d >= 0; --d) strides[d] = step, step *= sizes[d] > 0 ? sizes[d] : 1;
  return Tensor::empty(dim, sizes, strides, dtype, like);
}
inline Tensor empty_contiguous(std::initializer_list<int64_t> sizes, int32_t dtype, const Tensor& like) {
  return empty_contiguous(int64_t(sizes.size()), sizes.begin(), dtype, like);
}

// The tensor itself when it is row-major, otherwise a copy in `copy`.
inline const Tensor& contiguous(const Tensor& tensor, Tensor& copy) {
  int64_t step = 1;
  bool is_contiguous = true;
  for (int64_t d = tensor.dim() - 1; d >= 0; --d) {
    is_contiguous = is_contiguous && (tensor.size(d) <= 1 || tensor.stride(d) == step);
    step *= tensor.size(d);
  }
  if (is_contiguous || step == 0) return tensor;
  copy = empty_contiguous(tensor.dim(), tensor.sizes(), tensor.dtype(), tensor);
  check(aoti_torch_copy_(copy.handle(), tensor.handle(), 0), "copy a tensor");
  return copy;
}

// Maps are [batch, channel, (frame,) row, column], or with the channel at another place `channel`.
inline bool is_channels_last(const Tensor& map, int64_t channel = 1) {
  return map.stride(channel) == 1 && map.stride(map.dim() - 1) != 1;
}

inline bool is_native(const Tensor& map, bool channels_last, int64_t channel = 1) {
  const int64_t adjacent = channels_last ? channel : map.dim() - 1;
  return map.stride(adjacent) == 1 || map.size(adjacent) <= 1;
}

inline Tensor empty_map(const int64_t* sizes, int32_t dtype, const Tensor& like, bool channels_last,
                        int64_t channel = 1) {
  if (!channels_last) return empty_contiguous(like.dim(), sizes, dtype, like);
  int64_t strides[5], step = sizes[channel] > 0 ? sizes[channel] : 1;
  strides[channel] = 1;
  for (int64_t d = like.dim() - 1; d >= 0; --d) {
    if (d != channel) strides[d] = step, step *= sizes[d] > 0 ? sizes[d] : 1;
  }
  return Tensor::empty(like.dim(), sizes, strides, dtype, like);
}
inline Tensor empty_map(const int64_t* sizes, const Tensor& like, bool channels_last, int64_t channel = 1) {
  return empty_map(sizes, like.dtype(), like, channels_last, channel);
}

// The map itself when the kernels can read it in place, otherwise a copy in `copy`.
inline const Tensor& native_map(const Tensor& map, bool channels_last, Tensor& copy, int64_t channel = 1) {
  if (is_native(map, channels_last, channel)) return map;
  copy = empty_map(map.sizes(), map, channels_last, channel);
  check(aoti_torch_copy_(copy.handle(), map.handle(), 0), "copy a tensor");
  return copy;
}

inline MapView view_of(const Tensor& map, void* data) {
  const int64_t last = map.dim() - 1;
  return {
      data, map.stride(0), map.stride(1), map.dim() == 5 ? map.stride(2) : 0, map.stride(last - 1), map.stride(last)};
}
inline MapView read_view(const Tensor& map) { return view_of(map, const_cast<void*>(map.data())); }
inline MapView write_view(const Tensor& map) { return view_of(map, map.mutable_data()); }

inline int thread_count() {
  uint32_t threads = 1;
  check(torch_get_num_threads(&threads), "count its threads");
  return threads > 0 ? int(threads) : 1;
}
inline void parallel_for(int64_t count, int64_t grain, RangeFn fn, void* context) {
  check(torch_parallel_for(0, count, grain, fn, context), "run a parallel loop");
}

struct FreeMemory {
  void operator()(void* p) const { std::free(p); }
};
using HostMemory = std::unique_ptr<void, FreeMemory>;
inline HostMemory host_memory(size_t bytes) {
  HostMemory memory(bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr);
  if (bytes && !memory) throw std::bad_alloc();
  return memory;
}

class CudaScope {  // makes the tensor's device current and finds torch's stream on it
 public:
  explicit CudaScope(const Tensor& tensor) {
    if (!aoti_torch_get_current_cuda_stream) throw std::runtime_error("gingham: this build of torch has no CUDA");
    check(aoti_torch_get_current_cuda_stream(tensor.device_index(), &stream_), "find the current CUDA stream");
    // Last: a constructor that throws never gives its guard back.
    check(aoti_torch_create_device_guard(tensor.device_index(), &guard_), "select the CUDA device");
  }
  ~CudaScope() { aoti_torch_delete_device_guard(guard_); }
  CudaScope(const CudaScope&) = delete;
  CudaScope& operator=(const CudaScope&) = delete;
  void* stream() const { return stream_; }

 private:
  DeviceGuardHandle guard_ = nullptr;
  void* stream_ = nullptr;
};

inline Tensor device_memory(size_t bytes, const Tensor& like) {
  const int64_t size = int64_t(bytes), stride = 1;
  return Tensor::empty(1, &size, &stride, aoti_torch_dtype_uint8(), like);
}

// Arguments and results of a boxed kernel: a tensor is a handle that we own, numbers and a bool are their bits.
inline Tensor tensor_argument(StableIValue value) { return Tensor(reinterpret_cast<AtenTensorHandle>(value)); }
inline double double_argument(StableIValue value) {
  double result;
  static_assert(sizeof result == sizeof value);
  __builtin_memcpy(&result, &value, sizeof result);
  return result;
}

inline int64_t int_argument(StableIValue value) { return int64_t(value); }
inline bool bool_argument(StableIValue value) { return (value & 1) != 0; }
// A tensor that may be None is null or the address of the value, allocated for us.
inline std::optional<Tensor> optional_tensor_argument(StableIValue value) {
  const std::unique_ptr<StableIValue> inner(reinterpret_cast<StableIValue*>(value));
  if (!inner) return std::nullopt;
  return tensor_argument(*inner);
}

constexpr uint64_t kBuildVersion = (2ull << 56) | (10ull << 48);  // the calling convention of torch 2.10

class Library {
 public:
  static Library definitions(const char* file, uint32_t line) {
    Library library;
    check(aoti_torch_library_init_def("gingham", file, line, &library.handle_), "register the library");
    return library;
  }
  static Library kernels(const char* key, const char* file, uint32_t line) {
    Library library;
    check(aoti_torch_library_init_impl("gingham", key, file, line, &library.handle_), "register kernels");
    return library;
  }
  using Kernel = void (*)(StableIValue*, uint64_t, uint64_t);
  void define(const std::string& schema) {
    check(aoti_torch_library_def(handle_, schema.c_str()), "define an operator");
  }
  void implement(const std::string& name, Kernel kernel) {
    check(torch_library_impl(handle_, name.c_str(), kernel, kBuildVersion), "register a kernel");
  }
  // An operator and its backward, each twice with the same kernel: the public name carries the autograd formula for
  // torch.compile and torch.export, the name with an underscore carries none and is what the eager fast path calls.
  // A signature is what follows the name in a schema.
  void define_with_backward(const std::string& name, const char* signature, const char* backward_signature) {
    for (const char* prefix : {"", "_"}) {
      define(prefix + name + signature);
      define(prefix + name + "_backward" + backward_signature);
    }
  }
  void implement_with_backward(const std::string& name, Kernel forward, Kernel backward) {
    for (const char* prefix : {"", "_"}) {
      implement(prefix + name, forward);
      implement(prefix + name + "_backward", backward);
    }
  }

 private:
  TorchLibraryHandle handle_ = nullptr;  // lives as long as the process, like the operators
};

// Each operator's file says what it registers; library.cpp calls them in order.
void define_cosine_similarity_map(Library& library);
void implement_cosine_similarity_map(Library& library, bool cuda);
void define_criss_cross_attention(Library& library);
void implement_criss_cross_attention(Library& library, bool cuda);
void define_k_reciprocal_rerank(Library& library);
void implement_k_reciprocal_rerank(Library& library);
void define_masked_average_pool(Library& library);
void implement_masked_average_pool(Library& library, bool cuda);
void define_masked_similarity(Library& library);
void implement_masked_similarity(Library& library, bool cuda);
void define_spatial_temporal_attention(Library& library);
void implement_spatial_temporal_attention(Library& library, bool cuda);
void define_roi_pool(Library& library);
void implement_roi_pool(Library& library, bool cuda);

}  // namespace gingham::torch_front
