#include "dispatch.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>

#include "gingham/cosine_similarity_map.h"
#include "gingham/criss_cross_attention.h"
#include "gingham/k_reciprocal_rerank.h"
#include "gingham/masked_average_pool.h"
#include "gingham/masked_similarity.h"
#include "gingham/roi_pool.h"
#include "gingham/spatial_temporal_attention.h"

namespace gingham::cpu {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};

// The kernel gives a process room for its tiles' contents only when asked.
bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

bool is_supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::baseline:
      return true;
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx512;
    case Isa::avx512_bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
    case Isa::amx:
      return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-tile") &&
             __builtin_cpu_supports("amx-bf16") && may_use_tiles();
  }
#endif
  return isa == Isa::baseline;
}

Isa choose() {
  Isa best = Isa::baseline;
  for (int i = 0; i < int(std::size(kNames)); ++i) {
    if (is_supported(Isa(i))) best = Isa(i);
  }
  const char* wanted = std::getenv("GINGHAM_CPU");
  if (!wanted || !*wanted) return best;
  std::string known;
  for (int i = 0; i < int(std::size(kNames)); ++i) {
    if (std::string(wanted) == kNames[i]) {
      if (is_supported(Isa(i))) return Isa(i);
      throw std::runtime_error("GINGHAM_CPU=" + std::string(wanted) + ": this machine does not have it; it has " +
                               kNames[int(best)] + " and below");
    }
    known += (i ? ", " : "") + std::string(kNames[i]);
  }
  throw std::runtime_error("GINGHAM_CPU=" + std::string(wanted) + ": unknown instruction set; expected one of " +
                           known);
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}
const char* isa_name(Isa isa) { return kNames[int(isa)]; }
std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < int(std::size(kNames)); ++i) {
    if (is_supported(Isa(i))) names.emplace_back(kNames[i]);
  }
  return names;
}

// What avx512_bf16 and amx add is for bfloat16 alone, and their copies of the kernels know no other type.
static Isa isa_for(DType dtype) { return isa() > Isa::avx512 && dtype != DType::bfloat16 ? Isa::avx512 : isa(); }

// cpu::workspace_size and cpu::run of a call: those of the instruction set in use.
#define GINGHAM_DECLARE(set, Call)                                  \
  namespace set {                                                   \
  size_t workspace_size(const Call&, int threads);                  \
  void run(const Call&, int threads, void* workspace, ParallelFor); \
  }
#define GINGHAM_WORKSPACE_SIZE(set, Call) set::workspace_size,
#define GINGHAM_RUN(set, Call) set::run,
#define GINGHAM_DISPATCH(Call)                                                                                   \
  GINGHAM_FOR_EACH_ISA(GINGHAM_DECLARE, Call)                                                                    \
  size_t workspace_size(const Call& call, int threads) {                                                         \
    static constexpr size_t (*kEach[])(const Call&, int) = {GINGHAM_FOR_EACH_ISA(GINGHAM_WORKSPACE_SIZE, Call)}; \
    return kEach[int(isa_for(call.dtype))](call, threads);                                                       \
  }                                                                                                              \
  void run(const Call& call, int threads, void* workspace, ParallelFor parallel_for) {                           \
    static constexpr void (*kEach[])(const Call&, int, void*,                                                    \
                                     ParallelFor) = {GINGHAM_FOR_EACH_ISA(GINGHAM_RUN, Call)};                   \
    kEach[int(isa_for(call.dtype))](call, threads, workspace, parallel_for);                                     \
  }

GINGHAM_DISPATCH(CosineSimilarityMapForward)
GINGHAM_DISPATCH(CosineSimilarityMapBackward)
GINGHAM_DISPATCH(CrissCrossForward)
GINGHAM_DISPATCH(CrissCrossBackward)
GINGHAM_DISPATCH(KReciprocalRerankForward)
GINGHAM_DISPATCH(MaskedAveragePoolForward)
GINGHAM_DISPATCH(MaskedAveragePoolBackward)
GINGHAM_DISPATCH(MaskedSimilarityForward)
GINGHAM_DISPATCH(MaskedSimilarityBackward)
GINGHAM_DISPATCH(SpatialTemporalSums)
GINGHAM_DISPATCH(SpatialTemporalSumsBackward)
GINGHAM_DISPATCH(SpatialTemporalPooling)
GINGHAM_DISPATCH(SpatialTemporalPoolingBackward)
GINGHAM_DISPATCH(RoiPoolForward)
GINGHAM_DISPATCH(RoiPoolBackward)

}  // namespace gingham::cpu
