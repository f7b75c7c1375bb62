"""k-reciprocal re-ranking against its peers, under pytest-benchmark: `pytest bench`."""

from suite import benchmark_of

from gingham.bench.k_reciprocal_rerank import OPERATOR

bench_k_reciprocal_rerank = benchmark_of(OPERATOR)
