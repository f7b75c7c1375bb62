#include "dispatch.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>

#include "gingham/criss_cross_attention.h"

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

// One table per operator: the entry points of each instruction set, in the order of Isa.
#define GINGHAM_DECLARE(isa)                                         \
  namespace isa {                                                    \
  size_t forward_workspace(const CrissCrossForward&, int);           \
  size_t backward_workspace(const CrissCrossBackward&, int);         \
  void forward(const CrissCrossForward&, int, void*, ParallelFor);   \
  void backward(const CrissCrossBackward&, int, void*, ParallelFor); \
  }
GINGHAM_FOR_EACH_ISA(GINGHAM_DECLARE)
#undef GINGHAM_DECLARE

namespace {
struct CrissCrossEntry {
  size_t (*forward_workspace)(const CrissCrossForward&, int);
  size_t (*backward_workspace)(const CrissCrossBackward&, int);
  void (*forward)(const CrissCrossForward&, int, void*, ParallelFor);
  void (*backward)(const CrissCrossBackward&, int, void*, ParallelFor);
};
#define GINGHAM_ENTRY(isa) {isa::forward_workspace, isa::backward_workspace, isa::forward, isa::backward},
constexpr CrissCrossEntry kCrissCross[] = {GINGHAM_FOR_EACH_ISA(GINGHAM_ENTRY)};
#undef GINGHAM_ENTRY
const CrissCrossEntry& criss_cross() { return kCrissCross[int(isa())]; }
}  // namespace

size_t workspace_size(const CrissCrossForward& call, int threads) {
  return criss_cross().forward_workspace(call, threads);
}
size_t workspace_size(const CrissCrossBackward& call, int threads) {
  return criss_cross().backward_workspace(call, threads);
}
void criss_cross_attention(const CrissCrossForward& call, int threads, void* workspace, ParallelFor parallel_for) {
  criss_cross().forward(call, threads, workspace, parallel_for);
}
void criss_cross_attention_backward(const CrissCrossBackward& call, int threads, void* workspace,
                                    ParallelFor parallel_for) {
  criss_cross().backward(call, threads, workspace, parallel_for);
}

}  // namespace gingham::cpu
