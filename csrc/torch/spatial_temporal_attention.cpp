// torch.ops.gingham.spatial_temporal_attention, and the same in two steps, for frames that belong to many clips:
// spatial_temporal_sums and spatial_temporal_attention_from_sums. Each has its backward.
//
// Features are [B, T, C, H, W]; those of spatial_temporal_sums, which knows of no clips, [N, C, H, W].
#include "gingham/spatial_temporal_attention.h"

#include "run_call.h"
#include "tensor.h"

namespace gingham::torch_front {
namespace {

constexpr Checks require_attention("spatial_temporal_attention"), require_sums("spatial_temporal_sums"),
    require_from_sums("spatial_temporal_attention_from_sums");

// The arrays of a call: their sizes, and that they are what a forward returned, or a gradient of that.
struct Arrays {
  const Checks& require;
  SpatialTemporalShape shape;
  const Tensor& like;
  int32_t dtype = like.dtype(), sums = sum_dtype(like);

  Tensor empty(std::initializer_list<int64_t> sizes, int32_t of) const { return empty_contiguous(sizes, of, like); }
  Tensor empty_pooled() const { return empty({shape.batch, 2 * shape.channels}, dtype); }
  Tensor empty_scores() const { return empty({shape.batch, shape.frames, shape.parts}, sums); }
  Tensor empty_chosen() const { return empty({shape.batch, shape.parts}, aoti_torch_dtype_int64()); }
  Tensor empty_map() const { return empty({shape.batch, shape.frames, shape.rows, shape.columns}, sums); }
  Tensor empty_sums() const { return empty({shape.batch, shape.frames, shape.parts, shape.channels}, sums); }
  Tensor empty_totals() const { return empty({shape.batch, shape.frames}, sums); }
  Tensor empty_part_totals() const { return empty({shape.batch, shape.parts}, sums); }

  const Tensor& checked(const Tensor& tensor, std::initializer_list<int64_t> sizes, int32_t of, Tensor& copy) const {
    require.same(tensor, sizes.begin(), int64_t(sizes.size()), of, like,
                 "backward must get what the forward returned, and gradients of the same shape, dtype and device");
    return contiguous(tensor, copy);
  }
};

// ---------------------------------------------------------------------------------------------- one call at a time

struct SumsOptions {
  SpatialEnergy energy;
  double eps;
};

// Where [batch, channel, frame, row, column] lie in features [B, T, C, H, W] or [N, C, H, W].
MapView frames_view(const Tensor& features, void* data) {
  if (features.dim() == 4) return view_of(features, data);
  return {data, features.stride(0), features.stride(2), features.stride(1), features.stride(3), features.stride(4)};
}

SpatialTemporalShape checked_shape(const Checks& require, const Tensor& features, int64_t parts) {
  require.floating(features);
  const int64_t dim = features.dim();
  SpatialTemporalShape shape;
  shape.batch = features.size(0);
  shape.frames = dim == 5 ? features.size(1) : 1;
  shape.channels = features.size(dim - 3);
  shape.rows = features.size(dim - 2);
  shape.columns = features.size(dim - 1);
  shape.parts = parts;
  require(shape.frames > 0 && shape.rows > 0 && shape.columns > 0,
          "features must have at least one frame, row and column");
  require(parts >= 1 && parts <= shape.rows, "parts must be 1 to the number of rows");
  return shape;
}

SpatialEnergy checked_energy(const Checks& require, StableIValue value) {
  const int64_t energy = int_argument(value);
  require(energy >= 0 && energy <= 2, "energy must be 0, 1 or 2");
  return SpatialEnergy(energy);
}
double checked_eps(const Checks& require, StableIValue value) {
  const double eps = double_argument(value);
  require(eps > 0, "eps must be positive");
  return eps;
}

template <bool cuda>
void run_sums(const SpatialTemporalShape& shape, SumsOptions options, const Tensor& features, void* sums, void* shares,
              void* map, void* totals) {
  const int64_t channel = features.dim() - 3;
  Tensor copy;
  const Tensor& native = native_map(features, is_channels_last(features, channel), copy, channel);
  SpatialTemporalSums call;
  call.shape = shape;
  call.dtype = dtype_of(features);
  call.energy = options.energy;
  call.eps = options.eps;
  call.features = frames_view(native, const_cast<void*>(native.data()));
  call.sums = sums;
  call.shares = shares;
  call.map = map;
  call.totals = totals;
  run_call<cuda>(call, features);
}

template <bool cuda>
Tensor run_sums_backward(const SpatialTemporalShape& shape, SumsOptions options, const Tensor& features,
                         const Tensor& map, const Tensor& totals, const Tensor& grad_sums, const Tensor& grad_shares,
                         const Tensor* grad_map) {
  const int64_t channel = features.dim() - 3;
  const bool channels_last = is_channels_last(features, channel);
  Tensor copy;
  const Tensor& native = native_map(features, channels_last, copy, channel);
  Tensor grad_features = empty_map(features.sizes(), features, channels_last, channel);
  SpatialTemporalSumsBackward call;
  call.shape = shape;
  call.dtype = dtype_of(features);
  call.energy = options.energy;
  call.eps = options.eps;
  call.features = frames_view(native, const_cast<void*>(native.data()));
  call.map = map.data();
  call.totals = totals.data();
  call.grad_sums = grad_sums.data();
  call.grad_shares = grad_shares.data();
  call.grad_map = grad_map ? grad_map->data() : nullptr;
  call.grad_features = frames_view(grad_features, grad_features.mutable_data());
  run_call<cuda>(call, features);
  return grad_features;
}

template <bool cuda>
void run_pooling(const Arrays& arrays, double eps, const void* sums, const void* shares, Tensor& pooled, Tensor& scores,
                 Tensor& chosen, void* part_totals) {
  SpatialTemporalPooling call;
  call.shape = arrays.shape;
  call.dtype = dtype_of(arrays.like);
  call.eps = eps;
  call.sums = sums;
  call.shares = shares;
  call.pooled = pooled.mutable_data();
  call.scores = scores.mutable_data();
  call.chosen = static_cast<int64_t*>(chosen.mutable_data());
  call.part_totals = part_totals;
  run_call<cuda>(call, arrays.like);
}

// What the backward of pooling reads, checked and contiguous.
struct PoolingArguments {
  Tensor copies[6];
  const Tensor &grad_pooled, &grad_scores, &sums, &scores, &chosen, &part_totals;

  PoolingArguments(const Arrays& arrays, const Tensor& grad_pooled, const Tensor& grad_scores, const Tensor& sums,
                   const Tensor& scores, const Tensor& chosen, const Tensor& part_totals)
      : grad_pooled(
            arrays.checked(grad_pooled, {arrays.shape.batch, 2 * arrays.shape.channels}, arrays.dtype, copies[0])),
        grad_scores(arrays.checked(grad_scores, {arrays.shape.batch, arrays.shape.frames, arrays.shape.parts},
                                   arrays.sums, copies[1])),
        sums(arrays.checked(sums, {arrays.shape.batch, arrays.shape.frames, arrays.shape.parts, arrays.shape.channels},
                            arrays.sums, copies[2])),
        scores(arrays.checked(scores, {arrays.shape.batch, arrays.shape.frames, arrays.shape.parts}, arrays.sums,
                              copies[3])),
        chosen(arrays.checked(chosen, {arrays.shape.batch, arrays.shape.parts}, aoti_torch_dtype_int64(), copies[4])),
        part_totals(arrays.checked(part_totals, {arrays.shape.batch, arrays.shape.parts}, arrays.sums, copies[5])) {}
};

template <bool cuda>
void run_pooling_backward(const Arrays& arrays, double eps, bool detach_attention, const PoolingArguments& arguments,
                          Tensor& grad_sums, Tensor& grad_shares) {
  SpatialTemporalPoolingBackward call;
  call.shape = arrays.shape;
  call.dtype = dtype_of(arrays.like);
  call.eps = eps;
  call.detach_attention = detach_attention;
  call.sums = arguments.sums.data();
  call.scores = arguments.scores.data();
  call.chosen = static_cast<const int64_t*>(arguments.chosen.data());
  call.part_totals = arguments.part_totals.data();
  call.grad_pooled = arguments.grad_pooled.data();
  call.grad_scores = arguments.grad_scores.data();
  call.grad_sums = grad_sums.mutable_data();
  call.grad_shares = grad_shares.mutable_data();
  run_call<cuda>(call, arrays.like);
}

// ---------------------------------------------------------------------------------------------- attention

template <bool cuda>
void attention(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor features = tensor_argument(stack[0]);
  const Checks& require = require_attention;
  require(features.dim() == 5, "features must be [B, T, C, H, W]");
  const Arrays arrays{require, checked_shape(require, features, int_argument(stack[1])), features};
  const SumsOptions options{checked_energy(require, stack[2]), checked_eps(require, stack[3])};
  Tensor pooled = arrays.empty_pooled(), scores = arrays.empty_scores(), chosen = arrays.empty_chosen();
  Tensor map = arrays.empty_map(), sums = arrays.empty_sums(), totals = arrays.empty_totals();
  Tensor part_totals = arrays.empty_part_totals(), shares = arrays.empty_scores();
  run_sums<cuda>(arrays.shape, options, features, sums.mutable_data(), shares.mutable_data(), map.mutable_data(),
                 totals.mutable_data());
  run_pooling<cuda>(arrays, options.eps, sums.data(), shares.data(), pooled, scores, chosen,
                    part_totals.mutable_data());
  stack[0] = pooled.release();
  stack[1] = scores.release();
  stack[2] = chosen.release();
  stack[3] = map.release();
  stack[4] = sums.release();
  stack[5] = totals.release();
  stack[6] = part_totals.release();
}

// The first three results, without what backward would need: an allocation of torch takes as long as a small clip.
template <bool cuda>
void attention_unrecorded(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor features = tensor_argument(stack[0]);
  const Checks& require = require_attention;
  require(features.dim() == 5, "features must be [B, T, C, H, W]");
  const Arrays arrays{require, checked_shape(require, features, int_argument(stack[1])), features};
  const SumsOptions options{checked_energy(require, stack[2]), checked_eps(require, stack[3])};
  const SpatialTemporalShape& shape = arrays.shape;
  const int64_t frames = shape.batch * shape.frames;
  const int64_t counts[] = {frames * shape.parts * shape.channels, frames * shape.parts,
                            frames * shape.rows * shape.columns, frames, shape.batch * shape.parts};
  const int64_t size = dtype_of(features) == DType::float64 ? 8 : 4;
  int64_t offsets[6] = {};
  for (int i = 0; i < 5; ++i) offsets[i + 1] = offsets[i] + (counts[i] * size + 63) / 64 * 64;
  const HostMemory host = host_memory(cuda ? 0 : size_t(offsets[5]));
  Tensor device;
  if (cuda) device = device_memory(size_t(offsets[5]), features);
  char* scratch = static_cast<char*>(cuda ? device.mutable_data() : host.get());
  void *sums = scratch, *shares = scratch + offsets[1], *map = scratch + offsets[2], *totals = scratch + offsets[3];
  Tensor pooled = arrays.empty_pooled(), scores = arrays.empty_scores(), chosen = arrays.empty_chosen();
  run_sums<cuda>(shape, options, features, sums, shares, map, totals);
  run_pooling<cuda>(arrays, options.eps, sums, shares, pooled, scores, chosen, scratch + offsets[4]);
  stack[0] = pooled.release();
  stack[1] = scores.release();
  stack[2] = chosen.release();
}

template <bool cuda>
void attention_backward(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor grad_pooled = tensor_argument(stack[0]), grad_scores = tensor_argument(stack[1]);
  const Tensor grad_map = tensor_argument(stack[2]), features = tensor_argument(stack[3]);
  const Tensor scores = tensor_argument(stack[4]), chosen = tensor_argument(stack[5]), map = tensor_argument(stack[6]);
  const Tensor sums = tensor_argument(stack[7]), totals = tensor_argument(stack[8]);
  const Tensor part_totals = tensor_argument(stack[9]);
  const Checks& require = require_attention;
  require(features.dim() == 5, "features must be [B, T, C, H, W]");
  const Arrays arrays{require, checked_shape(require, features, int_argument(stack[10])), features};
  const SpatialTemporalShape& shape = arrays.shape;
  const SumsOptions options{checked_energy(require, stack[11]), checked_eps(require, stack[12])};
  Tensor copies[3];
  const std::initializer_list<int64_t> map_sizes{shape.batch, shape.frames, shape.rows, shape.columns};
  const Tensor& whole_map = arrays.checked(map, map_sizes, arrays.sums, copies[0]);
  const Tensor& whole_grad_map = arrays.checked(grad_map, map_sizes, arrays.sums, copies[1]);
  const Tensor& whole_totals = arrays.checked(totals, {shape.batch, shape.frames}, arrays.sums, copies[2]);
  const PoolingArguments arguments(arrays, grad_pooled, grad_scores, sums, scores, chosen, part_totals);
  Tensor grad_sums = arrays.empty_sums(), grad_shares = arrays.empty_scores();
  run_pooling_backward<cuda>(arrays, options.eps, bool_argument(stack[13]), arguments, grad_sums, grad_shares);
  stack[0] = run_sums_backward<cuda>(shape, options, features, whole_map, whole_totals, grad_sums, grad_shares,
                                     &whole_grad_map)
                 .release();
}

// ---------------------------------------------------------------------------------------------- its two steps

template <bool cuda>
void sums(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor features = tensor_argument(stack[0]);
  const Checks& require = require_sums;
  require(features.dim() == 4, "features must be [N, C, H, W]");
  const SpatialTemporalShape shape = checked_shape(require, features, int_argument(stack[1]));
  const SumsOptions options{checked_energy(require, stack[2]), checked_eps(require, stack[3])};
  const int32_t dtype = sum_dtype(features);
  Tensor sums = empty_contiguous({shape.batch, shape.parts, shape.channels}, dtype, features);
  Tensor shares = empty_contiguous({shape.batch, shape.parts}, dtype, features);
  Tensor map = empty_contiguous({shape.batch, shape.rows, shape.columns}, dtype, features);
  Tensor totals = empty_contiguous({shape.batch}, dtype, features);
  run_sums<cuda>(shape, options, features, sums.mutable_data(), shares.mutable_data(), map.mutable_data(),
                 totals.mutable_data());
  stack[0] = sums.release();
  stack[1] = shares.release();
  stack[2] = map.release();
  stack[3] = totals.release();
}

template <bool cuda>
void sums_backward(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor grad_sums = tensor_argument(stack[0]), grad_shares = tensor_argument(stack[1]);
  const Tensor features = tensor_argument(stack[2]), map = tensor_argument(stack[3]),
               totals = tensor_argument(stack[4]);
  const Checks& require = require_sums;
  require(features.dim() == 4, "features must be [N, C, H, W]");
  const Arrays arrays{require, checked_shape(require, features, int_argument(stack[5])), features};
  const SpatialTemporalShape& shape = arrays.shape;
  const SumsOptions options{checked_energy(require, stack[6]), checked_eps(require, stack[7])};
  Tensor copies[4];
  stack[0] = run_sums_backward<cuda>(
                 shape, options, features,
                 arrays.checked(map, {shape.batch, shape.rows, shape.columns}, arrays.sums, copies[0]),
                 arrays.checked(totals, {shape.batch}, arrays.sums, copies[1]),
                 arrays.checked(grad_sums, {shape.batch, shape.parts, shape.channels}, arrays.sums, copies[2]),
                 arrays.checked(grad_shares, {shape.batch, shape.parts}, arrays.sums, copies[3]), nullptr)
                 .release();
}

// sums [B, T, K, C]; only the number of positions is known of the features.
Arrays arrays_from_sums(const Tensor& sums, int64_t positions) {
  const Checks& require = require_from_sums;
  require.floating(sums);
  require(sums.dim() == 4, "sums must be [B, T, K, C]");
  require(sums.dtype() == sum_dtype(sums), "sums must be float32 or float64");
  require(sums.size(1) > 0 && sums.size(2) > 0, "sums must have at least one frame and part");
  require(positions > 0, "positions must be at least 1");
  SpatialTemporalShape shape;
  shape.batch = sums.size(0), shape.frames = sums.size(1), shape.parts = sums.size(2), shape.channels = sums.size(3);
  shape.rows = positions, shape.columns = 1;
  return {require, shape, sums};
}

template <bool cuda>
void attention_from_sums(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor sums = tensor_argument(stack[0]), shares = tensor_argument(stack[1]);
  const Arrays arrays = arrays_from_sums(sums, int_argument(stack[2]));
  const int64_t sizes[] = {arrays.shape.batch, arrays.shape.frames, arrays.shape.parts};
  arrays.require.same(shares, sizes, 3, sums.dtype(), sums,
                      "energies must be [B, T, K] and have the dtype and device of sums");
  const double eps = checked_eps(arrays.require, stack[3]);
  Tensor copies[2];
  Tensor pooled = arrays.empty_pooled(), scores = arrays.empty_scores(), chosen = arrays.empty_chosen();
  Tensor part_totals = arrays.empty_part_totals();
  run_pooling<cuda>(arrays, eps, contiguous(sums, copies[0]).data(), contiguous(shares, copies[1]).data(), pooled,
                    scores, chosen, part_totals.mutable_data());
  stack[0] = pooled.release();
  stack[1] = scores.release();
  stack[2] = chosen.release();
  stack[3] = part_totals.release();
}

template <bool cuda>
void attention_from_sums_backward(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor grad_pooled = tensor_argument(stack[0]), grad_scores = tensor_argument(stack[1]);
  const Tensor sums = tensor_argument(stack[2]), shares = tensor_argument(stack[3]);
  const Tensor scores = tensor_argument(stack[4]), chosen = tensor_argument(stack[5]);
  const Tensor part_totals = tensor_argument(stack[6]);
  const Arrays arrays = arrays_from_sums(sums, int_argument(stack[7]));
  const double eps = checked_eps(arrays.require, stack[8]);
  const PoolingArguments arguments(arrays, grad_pooled, grad_scores, sums, scores, chosen, part_totals);
  Tensor grad_sums = arrays.empty_sums(), grad_shares = arrays.empty_scores();
  run_pooling_backward<cuda>(arrays, eps, false, arguments, grad_sums, grad_shares);
  stack[0] = grad_sums.release();
  stack[1] = grad_shares.release();
}

}  // namespace

void define_spatial_temporal_attention(Library& library) {
  library.define_with_backward(
      "spatial_temporal_attention",
      "(Tensor features, int parts, int energy, float eps, bool detach_attention) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      "(Tensor grad_pooled, Tensor grad_scores, Tensor grad_map, Tensor features, Tensor scores, Tensor frames, "
      "Tensor map, Tensor sums, Tensor totals, Tensor part_totals, int parts, int energy, float eps, "
      "bool detach_attention) -> Tensor");
  library.define(
      "_spatial_temporal_attention_unrecorded(Tensor features, int parts, int energy, float eps) -> "
      "(Tensor, Tensor, Tensor)");
  library.define_with_backward(
      "spatial_temporal_sums",
      "(Tensor features, int parts, int energy, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
      "(Tensor grad_sums, Tensor grad_energies, Tensor features, Tensor map, Tensor totals, int parts, int energy, "
      "float eps) -> Tensor");
  library.define_with_backward(
      "spatial_temporal_attention_from_sums",
      "(Tensor sums, Tensor energies, int positions, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
      "(Tensor grad_pooled, Tensor grad_scores, Tensor sums, Tensor energies, Tensor scores, Tensor frames, "
      "Tensor part_totals, int positions, float eps) -> (Tensor, Tensor)");
}

void implement_spatial_temporal_attention(Library& library, bool cuda) {
  library.implement_with_backward("spatial_temporal_attention", cuda ? attention<true> : attention<false>,
                                  cuda ? attention_backward<true> : attention_backward<false>);
  library.implement("_spatial_temporal_attention_unrecorded",
                    cuda ? attention_unrecorded<true> : attention_unrecorded<false>);
  library.implement_with_backward("spatial_temporal_sums", cuda ? sums<true> : sums<false>,
                                  cuda ? sums_backward<true> : sums_backward<false>);
  library.implement_with_backward("spatial_temporal_attention_from_sums",
                                  cuda ? attention_from_sums<true> : attention_from_sums<false>,
                                  cuda ? attention_from_sums_backward<true> : attention_from_sums_backward<false>);
}

}  // namespace gingham::torch_front
