"""Which CUDA kernels of an operator take how long, on the largest headline case of each.

python bench/profile_cuda.py [OPERATOR ...]            # a table of kernels, from torch's profiler
ncu ... python bench/profile_cuda.py --once [...]      # every kernel once, for the counters of Nsight Compute
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from gingham.bench import OPERATORS
from gingham.bench.definition import OURS, Pass, load_operator
from gingham.bench.measure import Setting, bind, draw, grad_mode

ROUNDS = 5
CASES = {"criss_cross_attention": "8x97x97, 64/512"}  # otherwise the first headline case
GPU_OPERATORS = [name for name in OPERATORS if name != "k_reciprocal_rerank"]  # which runs on the CPU


def prepare(name: str, dtype: torch.dtype, layout: str, direction: Pass) -> Callable[[], object]:
    operator = load_operator(name)
    case = operator.case(CASES[name]) if name in CASES else next(case for case in operator.cases if case.headline)
    device = torch.device("cuda")
    arguments = draw(operator, case, Setting(dtype, layout, 1, direction, device), seed=0)
    run = bind(operator, operator.peer(OURS).build(case, device), direction)

    def call() -> None:
        with grad_mode(direction):
            run(arguments)

    return call


def profile(call: Callable[[], object]) -> list[tuple[str, int, float]]:
    """Kernels (name, launches a call, microseconds a call), the longest first."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(ROUNDS):
            call()
        torch.cuda.synchronize()
    rows = [
        (event.key, event.count // ROUNDS, event.device_time_total / ROUNDS)
        for event in profiler.key_averages()
        if event.device_time_total > 0
    ]
    return sorted(rows, key=lambda row: -row[2])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help=f"some of {GPU_OPERATORS}; all without")
    parser.add_argument("--once", action="store_true", help="run every case once and print nothing")
    parser.add_argument("--dtype", default="bfloat16,float32")
    parser.add_argument("--layout", default="channels_last,contiguous")
    options = parser.parse_args()
    for name in options.operators or GPU_OPERATORS:
        for dtype in options.dtype.split(","):
            for layout in options.layout.split(","):
                call = prepare(name, getattr(torch, dtype), layout, Pass.TRAINING)
                if options.once:
                    call()
                    continue
                rows = profile(call)
                total = sum(row[2] for row in rows)
                print(f"\n{name}, {dtype}, {layout}, forward + backward: {total:.0f} us in kernels")
                for kernel, launches, microseconds in rows:
                    print(f"{microseconds:10.1f} us {launches:4d} x  {kernel[:130]}")
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
