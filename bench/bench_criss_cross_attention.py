"""Criss-cross attention against its peers, under pytest-benchmark.

`pytest bench` times Gingham's operator; every round also times each peer, in the same process, and the peers' medians
and ratios stand in the result's extra_info. Each is compared with the float64 reference before the first round.
"""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import pytest
import torch

from gingham.bench.criss_cross_attention import OPERATOR
from gingham.bench.definition import OURS, Case, Level, Pass
from gingham.bench.machine import clock
from gingham.bench.measure import TOLERANCE, Expectations, Setting, bind, deviation, draw, grad_mode

CPU = torch.device("cpu")
CASES = [case for case in OPERATOR.cases if case.level <= Level.DEFAULT]
# Those whose cost grows with the square of the number of pixels are left to `gingham bench`.
PEERS = [peer for peer in OPERATOR.peers if peer.operations is None]


@pytest.mark.parametrize("threads", sorted({1, torch.get_num_threads()}), ids="threads={}".format)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("direction", [Pass.FORWARD, Pass.TRAINING], ids=lambda direction: direction.value)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def bench_criss_cross_attention(
    benchmark: Any, case: Case, direction: Pass, dtype: torch.dtype, layout: str, threads: int
) -> None:
    setting = Setting(dtype, layout, threads, direction, CPU)
    expectations = Expectations(OPERATOR, seed=torch.seed() % 2**31)
    torch.set_num_threads(threads)
    with grad_mode(direction):
        sets = [draw(OPERATOR, case, setting, expectations.seed + i) for i in range(3)]
        runs = {peer.name: bind(OPERATOR, peer.build(case, CPU), direction) for peer in PEERS}
        for name, run in runs.items():
            assert deviation(run(sets[0]), expectations.get(case, setting)) <= TOLERANCE[dtype], name
        ours = runs.pop(OURS)
        supply = itertools.cycle(sets)
        seconds: dict[str, list[float]] = {name: [] for name in runs}

        def time_peers() -> tuple[tuple[Any, ...], dict[str, Any]]:
            for name, run in runs.items():
                arguments = next(supply)
                seconds[name].append(clock(lambda run=run, arguments=arguments: run(arguments), CPU))
            return (next(supply),), {}

        benchmark.group = f"{case.label}, {direction.value}, {dtype}, {layout}, {threads} threads"
        benchmark.pedantic(ours, setup=time_peers, rounds=7)
    for name, samples in seconds.items():
        benchmark.extra_info[f"{name}, seconds"] = statistics.median(samples)
        benchmark.extra_info[f"{name}, ratio"] = statistics.median(samples) / benchmark.stats.stats.median
