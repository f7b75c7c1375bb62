#include "gingham/spatial_temporal_attention.h"

#include "arrays.h"
#include "run_call.h"

namespace gingham::python {
namespace {

using Shape = std::array<int64_t, 6>;  // batch, frames, channels, rows, columns, parts

SpatialTemporalSums sums_call(const Shape& s, int dtype, int energy, double eps, const Map& features, uintptr_t sums,
                              uintptr_t shares, uintptr_t map, uintptr_t totals) {
  SpatialTemporalSums call;
  call.shape = {s[0], s[1], s[2], s[3], s[4], s[5]};
  call.dtype = DType(dtype);
  call.energy = SpatialEnergy(energy);
  call.eps = eps;
  call.features = view_of(features, call.dtype);
  call.sums = pointer<void>(sums);
  call.shares = pointer<void>(shares);
  call.map = pointer<void>(map);
  call.totals = pointer<void>(totals);
  return call;
}
void sums(Shape shape, int dtype, int energy, double eps, Map features, uintptr_t sums, uintptr_t shares, uintptr_t map,
          uintptr_t totals, int threads) {
  run_call(sums_call(shape, dtype, energy, eps, features, sums, shares, map, totals), threads);
}

SpatialTemporalPooling pooling_call(const Shape& s, int dtype, double eps, uintptr_t sums, uintptr_t shares,
                                    uintptr_t pooled, uintptr_t scores, uintptr_t chosen, uintptr_t part_totals) {
  SpatialTemporalPooling call;
  call.shape = {s[0], s[1], s[2], s[3], s[4], s[5]};
  call.dtype = DType(dtype);
  call.eps = eps;
  call.sums = pointer<void>(sums);
  call.shares = pointer<void>(shares);
  call.pooled = pointer<void>(pooled);
  call.scores = pointer<void>(scores);
  call.chosen = pointer<int64_t>(chosen);
  call.part_totals = pointer<void>(part_totals);
  return call;
}
void pooling(Shape shape, int dtype, double eps, uintptr_t sums, uintptr_t shares, uintptr_t pooled, uintptr_t scores,
             uintptr_t chosen, uintptr_t part_totals, int threads) {
  run_call(pooling_call(shape, dtype, eps, sums, shares, pooled, scores, chosen, part_totals), threads);
}

#if defined(GINGHAM_CUDA)
size_t cuda_sums_workspace(Shape shape, int dtype, Map features) {
  return cuda::workspace_size(sums_call(shape, dtype, 0, 1.0, features, 0, 0, 0, 0));
}
void cuda_sums(Shape shape, int dtype, int energy, double eps, Map features, uintptr_t sums, uintptr_t shares,
               uintptr_t map, uintptr_t totals, uintptr_t workspace, uintptr_t stream) {
  run_call_on_stream(sums_call(shape, dtype, energy, eps, features, sums, shares, map, totals), workspace, stream);
}
size_t cuda_pooling_workspace(Shape shape, int dtype) {
  return cuda::workspace_size(pooling_call(shape, dtype, 1.0, 0, 0, 0, 0, 0, 0));
}
void cuda_pooling(Shape shape, int dtype, double eps, uintptr_t sums, uintptr_t shares, uintptr_t pooled,
                  uintptr_t scores, uintptr_t chosen, uintptr_t part_totals, uintptr_t workspace, uintptr_t stream) {
  run_call_on_stream(pooling_call(shape, dtype, eps, sums, shares, pooled, scores, chosen, part_totals), workspace,
                     stream);
}
#endif

}  // namespace

void bind_spatial_temporal_attention(py::module_& m) {
  m.def("spatial_temporal_sums", &sums);
  m.def("spatial_temporal_attention_from_sums", &pooling);
#if defined(GINGHAM_CUDA)
  m.def("spatial_temporal_sums_cuda_workspace", &cuda_sums_workspace);
  m.def("spatial_temporal_sums_cuda", &cuda_sums);
  m.def("spatial_temporal_attention_from_sums_cuda_workspace", &cuda_pooling_workspace);
  m.def("spatial_temporal_attention_from_sums_cuda", &cuda_pooling);
#endif
}

}  // namespace gingham::python
