// Runs the CPU kernel of criss-cross attention again and again for a profiler: bench/profile_cpu.sh.
//   profile_cpu_criss_cross_attention forward|backward float32|bfloat16 contiguous|channels_last REPEATS
// One image of 97 x 97, 64 key and 512 value channels, one thread; a few sets of maps in turn, more than caches hold.
#include "gingham/criss_cross_attention.h"
#include "profile_cpu.h"

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gingham::cpu::profiled {
size_t workspace_size(const CrissCrossForward&, int);
size_t workspace_size(const CrissCrossBackward&, int);
void run(const CrissCrossForward&, int, void*, ParallelFor);
void run(const CrissCrossBackward&, int, void*, ParallelFor);
}  // namespace gingham::cpu::profiled

using namespace profile;

namespace {

constexpr int64_t kSide = 97, kKeys = 64, kValues = 512, kSets = 3;
}  // namespace

int main(int count, char** arguments) {
  if (count != 5) return std::fprintf(stderr, "see the head of bench/profile_cpu_criss_cross_attention.cpp\n"), 2;
  const bool backward = std::string(arguments[1]) == "backward";
  const DType dtype = std::string(arguments[2]) == "bfloat16" ? DType::bfloat16 : DType::float32;
  const bool last = std::string(arguments[3]) == "channels_last";
#if defined(__x86_64__)
  syscall(SYS_arch_prctl, 0x1023, 18);  // room for the contents of AMX tiles, where there are any
#endif

  std::vector<CrissCrossBackward> calls;
  std::vector<Map> maps;
  maps.reserve(kSets * 8);
  std::vector<double> lse(kSide * kSide);
  const auto map = [&](int64_t channels) {
    maps.emplace_back(1, channels, kSide, kSide, dtype, last, uint32_t(maps.size() + 1));
    return maps.back().view;
  };
  for (int64_t set = 0; set < kSets; ++set) {
    CrissCrossBackward call;
    call.shape = {1, kKeys, kValues, 1, kSide, kSide};
    call.dtype = dtype;
    call.query = map(kKeys), call.key = map(kKeys), call.value = map(kValues);
    call.output = map(kValues), call.grad_output = map(kValues);
    call.grad_query = map(kKeys), call.grad_key = map(kKeys), call.grad_value = map(kValues);
    call.lse = lse.data();
    calls.push_back(call);
  }
  const auto forward_of = [&](const CrissCrossBackward& b) {
    return CrissCrossForward{b.shape, b.dtype, b.scale, false, b.query, b.key, b.value, b.output, lse.data()};
  };
  const size_t size =
      std::max(cpu::profiled::workspace_size(forward_of(calls[0]), 1), cpu::profiled::workspace_size(calls[0], 1));
  void* workspace = allocate(size);

  cpu::profiled::run(forward_of(calls[0]), 1, workspace, one_after_the_other);  // gives backward its lse
  const double milliseconds = time_calls(std::atoi(arguments[4]), [&](int i) {
    const CrissCrossBackward& call = calls[size_t(i % kSets)];
    if (backward) cpu::profiled::run(call, 1, workspace, one_after_the_other);
    if (!backward) cpu::profiled::run(forward_of(call), 1, workspace, one_after_the_other);
  });
  std::printf("%s, %s, %s: %.1f ms, scratch %.0f kB\n", arguments[1], arguments[2], arguments[3], milliseconds,
              double(size) / 1e3);
}
