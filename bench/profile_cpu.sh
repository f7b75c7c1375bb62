#!/usr/bin/env bash
# Where the CPU kernels of an operator spend their time, by step, as a sampling profiler sees it:
#   bench/profile_cpu.sh [criss_cross_attention|roi_pool]...     (both without a name)
# Needs g++ and Linux's perf. The steps are compiled as functions of their own for it (GINGHAM_PROFILE), which costs a
# little; the instruction set is this machine's best.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
tiles=$(grep -qm1 amx_bf16 /proc/cpuinfo && echo -DGINGHAM_TILES || true)

# The arguments of every run of an operator's program.
runs_of() {
  case $1 in
    criss_cross_attention) printf '%s\n' {forward,backward}" "{float32,bfloat16}" "{contiguous,channels_last}" 60" ;;
    roi_pool) printf '%s\n' {forward,keeping,kept,backward}" float32 "{contiguous,channels_last}" "{"300 7","60 56"}" 20" ;;
    *) echo "no program for $1: expected criss_cross_attention or roi_pool" >&2; exit 2 ;;
  esac
}

grep -m1 "model name" /proc/cpuinfo
[ $# -gt 0 ] || set -- criss_cross_attention roi_pool
for operator in "$@"; do
  runs=$(runs_of "$operator")
  g++ -std=gnu++17 -O3 -g1 -march=native -mtune=generic -fno-exceptions -fno-math-errno -fno-trapping-math -ffp-contract=fast \
    -Wno-psabi $tiles -DGINGHAM_PROFILE -DGINGHAM_ISA=profiled -Icsrc/include -Icsrc/cpu -c "csrc/cpu/$operator.cpp" \
    -o "$folder/kernel.o"
  g++ -std=c++17 -O2 -Icsrc/include "bench/profile_cpu_$operator.cpp" "$folder/kernel.o" -o "$folder/profile_cpu"
  while read -r -a run; do
    perf record -q -F 5000 -o "$folder/data" "$folder/profile_cpu" "${run[@]}"
    # Of the kernel's own functions; the rest is the drawing of random maps.
    perf report -i "$folder/data" --stdio -s symbol 2>/dev/null |
      sed -n 's/^ *\([0-9.]*%\) [^(]*(anonymous namespace)::\([a-z_]*\)[<(].*/\1 \2/p' |
      awk '{share[$2] += $1; all += $1} END {for (s in share) if (share[s] > all / 100) print 100 * share[s] / all, s}' |
      sort -rn | awk '{printf "%6.0f %%  %s\n", $1, $2}'
  done <<<"$runs"
done
