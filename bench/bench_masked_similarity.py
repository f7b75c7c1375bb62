"""Masked similarity against its peers, under pytest-benchmark: `pytest bench`."""

from suite import benchmark_of

from gingham.bench.masked_similarity import OPERATOR

bench_masked_similarity = benchmark_of(OPERATOR)
