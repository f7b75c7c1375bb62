// torch.ops.gingham.roi_pool and roi_pool_with_places, which keeps where the maxima are for its backward.
//
// Each exists twice with the same kernel: the public name carries the autograd formula for torch.compile and
// torch.export, the name with an underscore carries none and is what the eager fast path calls. The backward that takes
// places is meant for those of its forward: with others it touches no foreign memory, but its result is not specified.
#include "gingham/roi_pool.h"

#include <sstream>

#include "run_call.h"
#include "tensor.h"

namespace gingham::torch_front {
namespace {

constexpr Checks require("roi_pool");

// On CUDA nobody waits to look at the numbers: the kernel gives NaN for such a box.
void check_numbers(const void* boxes, DType dtype, const RoiPoolShape& shape) {
  const int64_t n = first_invalid_box(boxes, dtype, shape.boxes, shape.batch);
  if (n < 0) return;
  std::ostringstream message;
  message << "boxes[" << n << "] must name an image in [0, " << shape.batch << ") and have finite coordinates, got (";
  for (int64_t i = 0; i < 5; ++i) {
    message << (i ? ", " : "");
    if (dtype == DType::float64) {
      message << static_cast<const double*>(boxes)[5 * n + i];
    } else {
      message << static_cast<const float*>(boxes)[5 * n + i];
    }
  }
  message << ")";
  require(false, message.str().c_str());
}

// What forward and backward share; boxes that are not contiguous are copied to `copy`.
template <bool cuda, class Call>
Call checked_call(const Tensor& features, const Tensor& boxes, const StableIValue* options, Tensor& copy) {
  static const int32_t kFloat32 = aoti_torch_dtype_float32(), kFloat64 = aoti_torch_dtype_float64();
  Call call;
  require.floating(features);
  require(features.dim() == 4, "features must be [B, C, H, W]");
  call.dtype = dtype_of(features);
  require(boxes.dim() == 2 && boxes.size(1) == 5, "boxes must be [N, 5]");
  require(boxes.dtype() == (call.dtype == DType::float64 ? kFloat64 : kFloat32),
          "boxes must be float64 beside float64 features, otherwise float32");
  require.same_device(boxes, features, "boxes must be on the device of features");
  call.shape = {features.size(0), features.size(1),         features.size(2),        features.size(3),
                boxes.size(0),    int_argument(options[0]), int_argument(options[1])};
  call.spatial_scale = double_argument(options[2]);
  constexpr int64_t kMost = int64_t{1} << 31;
  require(call.shape.pooled_rows > 0 && call.shape.pooled_columns > 0, "output_size must be positive");
  require(call.shape.pooled_rows < kMost && call.shape.pooled_columns < kMost &&
              call.shape.pooled_rows * call.shape.pooled_columns < kMost,
          "output_size must have fewer than 2^31 bins");
  require(std::isfinite(call.spatial_scale), "spatial_scale must be finite");
  require(features.size(2) < kMost && features.size(3) < kMost && features.size(2) * features.size(3) < kMost,
          "features must have fewer than 2^31 pixels");
  call.boxes = contiguous(boxes, copy).data();
  if (!cuda) check_numbers(call.boxes, call.dtype, call.shape);
  return call;
}

template <bool cuda, bool keep>
void forward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor features = tensor_argument(stack[0]), boxes = tensor_argument(stack[1]), copies[2];
  auto call = checked_call<cuda, RoiPoolForward>(features, boxes, stack + 2, copies[0]);
  const bool channels_last = is_channels_last(features);
  call.features = read_view(native_map(features, channels_last, copies[1]));
  const int64_t sizes[] = {call.shape.boxes, call.shape.channels, call.shape.pooled_rows, call.shape.pooled_columns};
  Tensor output = empty_map(sizes, features, channels_last);
  call.output = write_view(output);
  Tensor places;
  if constexpr (keep) {
    places = empty_map(sizes, aoti_torch_dtype_int32(), features, channels_last);
    call.places = write_view(places);
  }
  run_call<cuda>(call, features);
  stack[0] = output.release();
  if constexpr (keep) stack[1] = places.release();
}

template <bool cuda, bool kept>
void backward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor grad = tensor_argument(stack[0]), features = tensor_argument(stack[1]), boxes = tensor_argument(stack[2]);
  Tensor places, copies[4];
  if constexpr (kept) places = tensor_argument(stack[3]);
  auto call = checked_call<cuda, RoiPoolBackward>(features, boxes, stack + (kept ? 4 : 3), copies[0]);
  const int64_t sizes[] = {call.shape.boxes, call.shape.channels, call.shape.pooled_rows, call.shape.pooled_columns};
  require.same(grad, sizes, 4, features.dtype(), features,
               "grad_output must have the shape, dtype and device of the output");
  const bool channels_last = is_channels_last(features);
  // Where channels come first, the kernels take any strides.
  call.grad_output = read_view(channels_last ? native_map(grad, channels_last, copies[2]) : grad);
  if constexpr (kept) {
    require.same(places, sizes, 4, aoti_torch_dtype_int32(), features,
                 "places must be int32 and have the shape and device of the output");
    call.places = read_view(native_map(places, channels_last, copies[3]));
  }
  Tensor grad_features = empty_map(features.sizes(), features, channels_last);
  call.grad_features = write_view(grad_features);
  // With places the features' layout is all that is needed of them.
  call.features = kept ? call.grad_features : read_view(native_map(features, channels_last, copies[1]));
  run_call<cuda>(call, features);
  stack[0] = grad_features.release();
}

}  // namespace

void define_roi_pool(Library& library) {
  const std::string arguments = "Tensor features, Tensor boxes, ", kept = "Tensor places, ",
                    given = "(Tensor grad_output, ";
  const std::string options = "int rows, int columns, float spatial_scale) -> ";
  library.define_with_backward("roi_pool", ("(" + arguments + options + "Tensor").c_str(),
                               (given + arguments + options + "Tensor").c_str());
  library.define_with_backward("roi_pool_with_places", ("(" + arguments + options + "(Tensor, Tensor)").c_str(),
                               (given + arguments + kept + options + "Tensor").c_str());
}

void implement_roi_pool(Library& library, bool cuda) {
  library.implement_with_backward("roi_pool", cuda ? forward<true, false> : forward<false, false>,
                                  cuda ? backward<true, false> : backward<false, false>);
  library.implement_with_backward("roi_pool_with_places", cuda ? forward<true, true> : forward<false, true>,
                                  cuda ? backward<true, true> : backward<false, true>);
}

}  // namespace gingham::torch_front
