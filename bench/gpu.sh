#!/usr/bin/env bash
# All that a GPU machine is needed for, in one command of less than nine minutes: build for its card, test, sanitize,
# measure. Logs and figures land in FOLDER (default bench/results/<name of the card>):
#   bench/gpu.sh [FOLDER [STEP ...]]     steps: tests memcheck racecheck profile bench; all of them by default
# It runs in the Python environment as it is (PYTHON, default python3): a CUDA build of torch, pytest, pytest-benchmark,
# pytest-xdist, expecttest, hypothesis and ml_dtypes; CuPy if its tests are to run; compute-sanitizer on PATH for its
# steps. To build it also needs nvcc, pybind11, scikit-build-core, cmake and ninja; GINGHAM_WHEEL=FILE.whl is installed
# instead of building.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1
card=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1) || { echo "no GPU: nvidia-smi fails" >&2; exit 1; }
architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
folder=${1:-bench/results/$(echo "$card" | tr 'A-Z ' 'a-z-')}
[ $# -eq 0 ] || shift
steps=" ${*:-tests memcheck racecheck profile bench} "
mkdir -p "$folder"
folder=$(realpath "$folder")
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
operators=$(cd csrc/cuda && ls ./*.cu | sed -e 's#^./##' -e 's#.cu$##')

# step NAME SECONDS COMMAND...: its output to NAME.log, its end on the screen; the others go on when it fails. The limits
# of steps that follow each other add up to 520 s.
step() {
  local name=$1 limit=$2 begun=$SECONDS result
  shift 2
  timeout "$limit" "$@" >"$folder/$name.log" 2>&1
  result=$?
  tail -n "${LINES_SHOWN:-6}" "$folder/$name.log"
  echo "== $name: exit $result after $((SECONDS - begun)) s" | tee -a "$folder/steps.log"
  return $result
}
wanted() { [[ $steps == *" $1 "* ]]; }

{
  echo "$card, compute capability $architecture"
  git log -1 --format='commit %h' 2>/dev/null
  nvcc --version | tail -2 | head -1
  "$PYTHON" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__)'
} | tee "$folder/steps.log"

if [ -n "${GINGHAM_WHEEL:-}" ]; then
  step install 60 "$PYTHON" -m pip install --no-deps --no-index --target "$site" "$GINGHAM_WHEEL" || exit 1
else
  GINGHAM_WITH_CUDA=ON CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=$architecture-real" \
    step install 180 "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index --target "$site" . || exit 1
fi

# Correctness all at once: nothing here is timed.
export OMP_NUM_THREADS=2
if wanted tests; then
  LINES_SHOWN=40 step tests 170 "$PYTHON" -m pytest -q -n 8 -p no:cacheprovider -m cuda tests/test_array.py \
    $(printf 'tests/test_%s.py ' $operators) &
fi
for tool in memcheck racecheck; do
  if wanted $tool && command -v compute-sanitizer >/dev/null; then
    # So that every tensor's end is an allocation's end.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step $tool 170 compute-sanitizer --tool $tool --error-exitcode 9 \
      --kernel-name kns=gingham "$PYTHON" bench/cuda_small_shapes.py &
  fi
done
wait
unset OMP_NUM_THREADS

if wanted profile; then LINES_SHOWN=200 step profile 40 "$PYTHON" bench/profile_cuda.py; fi
if wanted bench; then
  LINES_SHOWN=120 step bench 130 "$PYTHON" -m gingham.bench --device cuda --seconds 90 --json "$folder/bench.json" $operators
fi
failures=$(grep '^== ' "$folder/steps.log" | grep -c -v 'exit 0 ')
echo "$failures steps failed; everything is in $folder" | tee -a "$folder/steps.log"
exit $((failures > 0))
