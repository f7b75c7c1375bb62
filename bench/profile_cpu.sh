#!/usr/bin/env bash
# Where the CPU kernels of criss-cross attention spend their time, by step, as a sampling profiler sees it:
#   bench/profile_cpu.sh
# Needs g++ and Linux's perf. The steps are compiled as functions of their own for it (GINGHAM_PROFILE), which costs a
# little; the instruction set is this machine's best.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
tiles=$(grep -qm1 amx_bf16 /proc/cpuinfo && echo -DGINGHAM_TILES || true)
g++ -std=gnu++17 -O3 -g1 -march=native -mtune=generic -fno-exceptions -fno-math-errno -fno-trapping-math -ffp-contract=fast \
  -Wno-psabi $tiles -DGINGHAM_PROFILE -DGINGHAM_ISA=profiled -Icsrc/include -Icsrc/cpu -c csrc/cpu/criss_cross_attention.cpp \
  -o "$folder/kernel.o"
g++ -std=c++17 -O2 -Icsrc/include bench/profile_cpu.cpp "$folder/kernel.o" -o "$folder/profile_cpu"
grep -m1 "model name" /proc/cpuinfo
for direction in forward backward; do
  for dtype in float32 bfloat16; do
    for layout in contiguous channels_last; do
      perf record -q -F 5000 -o "$folder/data" "$folder/profile_cpu" $direction $dtype $layout 60
      # Of the kernel's own functions; the rest is the drawing of random maps.
      perf report -i "$folder/data" --stdio -s symbol 2>/dev/null |
        sed -n 's/^ *\([0-9.]*%\) .*(anonymous namespace)::\([a-z_]*\)[<(].*/\1 \2/p' | grep -v Map |
        awk '{share[$2] += $1; all += $1} END {for (s in share) if (share[s] > all / 100) print 100 * share[s] / all, s}' |
        sort -rn | awk '{printf "%6.0f %%  %s\n", $1, $2}'
    done
  done
done
