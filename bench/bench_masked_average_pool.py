"""Masked average pool against its peers, under pytest-benchmark: `pytest bench`."""

from suite import benchmark_of

from gingham.bench.masked_average_pool import OPERATOR

bench_masked_average_pool = benchmark_of(OPERATOR)
