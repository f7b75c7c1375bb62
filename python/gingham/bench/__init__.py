"""Gingham's operators against what you would use instead, on your machine.

`gingham bench` and `python -m gingham.bench` call `main`; `bench/` in the repository runs the same cases under pytest.

Adding an operator means one file here, named after it, that holds an `OPERATOR` (see `gingham.bench.definition`), and
its name in `OPERATORS`.
"""

from __future__ import annotations

from collections.abc import Sequence

OPERATORS = (
    "cosine_similarity_map",
    "criss_cross_attention",
    "k_reciprocal_rerank",
    "masked_average_pool",
    "masked_similarity",
    "roi_pool",
    "spatial_temporal_attention",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark command and return its exit code.

    Args:
        arguments: the words of the command line after `gingham bench`; None takes them from `sys.argv`.

    Example:
        >>> from gingham.bench import main
        >>> main(["--list"])
        cosine_similarity_map
        criss_cross_attention
        k_reciprocal_rerank
        masked_average_pool
        masked_similarity
        roi_pool
        spatial_temporal_attention
        0
    """
    from gingham.bench.command import run

    return run(arguments)


__all__ = ["OPERATORS", "main"]
