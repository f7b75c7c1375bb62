"""RoI max pooling against its peers, under pytest-benchmark: `pytest bench`."""

from suite import benchmark_of

from gingham.bench.roi_pool import OPERATOR

bench_roi_pool = benchmark_of(OPERATOR)
