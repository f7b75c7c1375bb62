"""What the benchmark files share: the settings of an operator's cases, and timing one of them beside its peers."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gingham.bench.definition import OURS, CannotRun, Case, Level, Operator, Pass
from gingham.bench.machine import clock
from gingham.bench.measure import TOLERANCE, Expectations, Setting, bind, deviation, draw, grad_mode

CPU = torch.device("cpu")


def benchmark_of(operator: Operator) -> Callable[..., None]:
    """A benchmark over the operator's cases, passes, dtypes, memory formats and thread counts."""
    cases = [
        pytest.param(case, direction, id=f"{case.label}-{direction.value}")
        for case in operator.cases
        if case.level <= Level.DEFAULT
        for direction in case.passes
        if direction is not Pass.RECORDED
    ]

    @pytest.mark.parametrize("threads", sorted({1, torch.get_num_threads()}), ids="threads={}".format)
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(("case", "direction"), cases)
    def bench(benchmark: Any, case: Case, direction: Pass, dtype: torch.dtype, layout: str, threads: int) -> None:
        _time_beside_peers(benchmark, operator, case, Setting(dtype, layout, threads, direction, CPU))

    return bench


def _time_beside_peers(benchmark: Any, operator: Operator, case: Case, setting: Setting) -> None:
    """Times Gingham's operator; every round also times each peer, in the same process.

    The peers' medians and ratios stand in the result's extra_info. Each is compared with the float64 reference before
    the first round, except those that compute another operator; one that cannot run is named there.
    """
    direction, dtype = setting.direction, setting.dtype
    expectations = Expectations(operator, seed=torch.seed() % 2**31)
    before = torch.get_num_threads()
    torch.set_num_threads(setting.threads)
    try:
        with grad_mode(direction):
            sets = [draw(operator, case, setting, expectations.seed + i) for i in range(3)]
            runs = {}
            for peer in operator.peers:
                if peer.operations is not None:
                    continue  # costs that grow with the square of the number of pixels are left to `gingham bench`
                try:
                    run = bind(operator, peer.build(case, CPU), direction)
                    result = run(sets[0])
                except CannotRun as reason:
                    benchmark.extra_info[peer.name] = str(reason)
                    continue
                if peer.same_result:
                    expected = expectations.get(case, setting)
                    assert deviation(result, expected, operator.undecided) <= TOLERANCE[dtype], peer.name
                runs[peer.name] = run
            ours = runs.pop(OURS)
            supply = itertools.cycle(sets)
            seconds: dict[str, list[float]] = {name: [] for name in runs}

            def time_peers() -> tuple[tuple[Any, ...], dict[str, Any]]:
                for name, run in runs.items():
                    arguments = next(supply)
                    seconds[name].append(clock(lambda run=run, arguments=arguments: run(arguments), CPU))
                return (next(supply),), {}

            benchmark.group = ", ".join(
                (operator.name, case.label, direction.value, str(dtype), setting.layout, f"{setting.threads} threads")
            )
            benchmark.pedantic(ours, setup=time_peers, rounds=7)
    finally:
        torch.set_num_threads(before)
    for name, samples in seconds.items():
        benchmark.extra_info[f"{name}, seconds"] = statistics.median(samples)
        benchmark.extra_info[f"{name}, ratio"] = statistics.median(samples) / benchmark.stats.stats.median
