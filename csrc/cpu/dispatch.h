// Run-time choice of the instruction set. Each operator's source is compiled once per entry of GINGHAM_FOR_EACH_ISA,
// with GINGHAM_ISA naming the namespace that its entry points live in.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gingham/core.h"

namespace gingham::cpu {

enum class Isa : int { baseline, avx2, avx512, avx512_bf16, amx };

// The best instruction set that this machine has, or the one that the environment variable GINGHAM_CPU names.
// Throws std::runtime_error when GINGHAM_CPU names an unknown or an unsupported one.
GINGHAM_API Isa isa();
GINGHAM_API const char* isa_name(Isa isa);
GINGHAM_API std::vector<std::string> available_isas();

}  // namespace gingham::cpu

#if defined(__x86_64__)
#define GINGHAM_FOR_EACH_ISA(X, Call) X(baseline, Call) X(avx2, Call) X(avx512, Call) X(avx512_bf16, Call) X(amx, Call)
#else
#define GINGHAM_FOR_EACH_ISA(X, Call) X(baseline, Call)
#endif
