// gingham._native: the operators on raw buffers for gingham.array, and build information. Knows no torch.
#include "arrays.h"
#include "dispatch.h"

PYBIND11_MODULE(_native, m) {
  m.doc() = "Gingham's kernels on raw buffers; use gingham.array";
  m.attr("version") = GINGHAM_VERSION;
  m.attr("git_commit") = GINGHAM_GIT_COMMIT;
  m.attr("compiler") = GINGHAM_COMPILER;
  m.attr("cuda_architectures") = GINGHAM_CUDA_ARCHITECTURES;
  m.def("instruction_set", [] { return gingham::cpu::isa_name(gingham::cpu::isa()); });
  m.def("available_instruction_sets", &gingham::cpu::available_isas);
  gingham::python::bind_cosine_similarity_map(m);
  gingham::python::bind_criss_cross_attention(m);
  gingham::python::bind_k_reciprocal_rerank(m);
  gingham::python::bind_masked_average_pool(m);
  gingham::python::bind_masked_similarity(m);
  gingham::python::bind_spatial_temporal_attention(m);
  gingham::python::bind_roi_pool(m);
}
