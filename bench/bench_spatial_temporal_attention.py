"""Spatial-temporal attention against its peers, under pytest-benchmark: `pytest bench`."""

from suite import benchmark_of

from gingham.bench.spatial_temporal_attention import OPERATOR

bench_spatial_temporal_attention = benchmark_of(OPERATOR)
