// The kernels of cosine_similarity_map, those of amx on emulated tiles.
#include "gingham/cosine_similarity_map.h"

#include "c_interface.h"

namespace gingham::cpu::GINGHAM_ISA {
size_t workspace_size(const CosineSimilarityMapForward&, int);
size_t workspace_size(const CosineSimilarityMapBackward&, int);
void run(const CosineSimilarityMapForward&, int, void*, ParallelFor);
void run(const CosineSimilarityMapBackward&, int, void*, ParallelFor);
}  // namespace gingham::cpu::GINGHAM_ISA

namespace {

template <class Call>
void describe(Call& call, const int64_t* s, int dtype, const Map* maps, void* prototypes) {
  call.shape = {s[0], s[1], s[2], s[3], s[4]};
  call.dtype = gingham::DType(dtype);
  call.features = view_of(maps[0]);
  call.output = view_of(maps[1]);
  call.prototypes = {prototypes, s[2] * s[1], s[1]};
}
template <class Call>
bool run(const Call& call) {
  namespace kernels = gingham::cpu::GINGHAM_ISA;
  return with_scratch(kernels::workspace_size(call, 1),
                      [&](void* scratch) { kernels::run(call, 1, scratch, one_after_the_other); });
}

}  // namespace

extern "C" {

// maps: features, output
bool forward(const int64_t* shape, int dtype, const Map* maps, void* prototypes, void* feature_norms,
             void* prototype_norms) {
  gingham::CosineSimilarityMapForward call;
  describe(call, shape, dtype, maps, prototypes);
  call.feature_norms = feature_norms;
  call.prototype_norms = prototype_norms;
  return run(call);
}

// maps: features, output, grad_output, grad_features
bool backward(const int64_t* shape, int dtype, const Map* maps, void* prototypes, const void* feature_norms,
              const void* prototype_norms, void* grad_prototypes) {
  gingham::CosineSimilarityMapBackward call;
  describe(call, shape, dtype, maps, prototypes);
  call.grad_output = view_of(maps[2]);
  call.grad_features = view_of(maps[3]);
  call.feature_norms = feature_norms;
  call.prototype_norms = prototype_norms;
  call.grad_prototypes = {grad_prototypes, shape[2] * shape[1], shape[1]};
  return run(call);
}

}  // extern "C"
