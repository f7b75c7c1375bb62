"""Criss-cross attention against its peers, under pytest-benchmark: `pytest bench`."""

from suite import benchmark_of

from gingham.bench.criss_cross_attention import OPERATOR

bench_criss_cross_attention = benchmark_of(OPERATOR)
