// Registers every operator when libgingham_torch.so is loaded. One line per operator in each part.
#include "tensor.h"

namespace gingham::torch_front {
namespace {

const bool kRegistered = [] {
  Library definitions = Library::definitions(__FILE_NAME__, __LINE__);
  define_cosine_similarity_map(definitions);
  define_criss_cross_attention(definitions);
  define_k_reciprocal_rerank(definitions);
  define_masked_average_pool(definitions);
  define_masked_similarity(definitions);
  define_spatial_temporal_attention(definitions);
  define_roi_pool(definitions);

  Library cpu = Library::kernels("CPU", __FILE_NAME__, __LINE__);
  implement_cosine_similarity_map(cpu, false);
  implement_criss_cross_attention(cpu, false);
  implement_k_reciprocal_rerank(cpu);
  implement_masked_average_pool(cpu, false);
  implement_masked_similarity(cpu, false);
  implement_spatial_temporal_attention(cpu, false);
  implement_roi_pool(cpu, false);

#if defined(GINGHAM_CUDA)
  Library cuda = Library::kernels("CUDA", __FILE_NAME__, __LINE__);
  implement_cosine_similarity_map(cuda, true);
  implement_criss_cross_attention(cuda, true);
  implement_masked_average_pool(cuda, true);
  implement_masked_similarity(cuda, true);
  implement_spatial_temporal_attention(cuda, true);
  implement_roi_pool(cuda, true);
#endif
  return true;
}();

}  // namespace
}  // namespace gingham::torch_front
