"""Cosines of pixels with prototypes against their peers, under pytest-benchmark: `pytest bench`."""

from suite import benchmark_of

from gingham.bench.cosine_similarity_map import OPERATOR

bench_cosine_similarity_map = benchmark_of(OPERATOR)
