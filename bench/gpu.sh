#!/usr/bin/env bash
# All that a GPU machine is needed for, in one command of less than nine minutes: build for its card, test, sanitize,
# measure. Logs and figures land in FOLDER (default bench/results/<name of the card>):
#   bench/gpu.sh [FOLDER]
# It builds in the Python environment as it is (PYTHON, default python3): a CUDA build of torch, pybind11,
# scikit-build-core, cmake, ninja, pytest, pytest-benchmark, hypothesis and ml_dtypes; CuPy if its tests are to run.
# Beside it nvcc and, for the second half, compute-sanitizer on PATH.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1
card=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1) || { echo "no GPU: nvidia-smi fails" >&2; exit 1; }
architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
folder=${1:-bench/results/$(echo "$card" | tr 'A-Z ' 'a-z-')}
mkdir -p "$folder"
folder=$(realpath "$folder")
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONPATH=$site
failures=0
operators=$(cd csrc/include/gingham && ls ./*.h | sed -e 's#^./#tests/test_#' -e 's#.h$#.py#' | grep -v test_core)

# step NAME SECONDS COMMAND...: its output to NAME.log, its end on the screen; the others go on when it fails. The limits
# add up to 530 s.
step() {
  local name=$1 limit=$2 begun=$SECONDS result
  shift 2
  timeout "$limit" "$@" >"$folder/$name.log" 2>&1
  result=$?
  tail -n "${LINES_SHOWN:-6}" "$folder/$name.log"
  echo "== $name: exit $result after $((SECONDS - begun)) s" | tee -a "$folder/steps.log"
  [ $result -eq 0 ] || failures=$((failures + 1))
  return $result
}

{
  echo "$card, compute capability $architecture"
  git log -1 --format='commit %h' 2>/dev/null
  nvcc --version | tail -2 | head -1
  "$PYTHON" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__)'
} | tee "$folder/steps.log"

GINGHAM_WITH_CUDA=ON CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=$architecture-real" \
  step build 180 "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index --target "$site" . || exit 1
step tests 120 "$PYTHON" -m pytest -q -p no:cacheprovider $operators tests/test_array.py -m cuda
if command -v compute-sanitizer >/dev/null; then
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # so that every tensor's end is an allocation's end
  for tool in memcheck racecheck; do
    step $tool 50 compute-sanitizer --tool $tool --error-exitcode 9 --kernel-regex kns=gingham \
      "$PYTHON" bench/cuda_small_shapes.py
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
fi
LINES_SHOWN=80 step bench 130 "$PYTHON" -m gingham.bench --device cuda --seconds 90 --json "$folder/bench.json"
echo "$failures steps failed; everything is in $folder" | tee -a "$folder/steps.log"
exit $((failures > 0))
