"""k-reciprocal re-ranking on arrays (Zhong et al., CVPR 2017, https://arxiv.org/abs/1701.08398)."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np

from gingham._library import native
from gingham.array._arrays import (
    FLOATING,
    address_of,
    as_float,
    check_dtype,
    check_out,
    check_same_dtype,
    module_of,
    thread_count,
)

_NAME = "k_reciprocal_rerank"


def k_reciprocal_rerank(
    query_features: Any,
    gallery_features: Any,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    *,
    out: Any = None,
    threads: int | None = None,
) -> Any:
    """Distances of queries to gallery items that take into account which items are among each other's nearest.

    The operator of `gingham.ops.k_reciprocal_rerank` (Zhong et al., CVPR 2017, https://arxiv.org/abs/1701.08398).

    Args:
        query_features: [Nq, D], NumPy; float32, float64, float16, or bfloat16 of ml_dtypes, finite. Rows whose features
            are adjacent in memory are read in place, others are copied. Arrays of CuPy are refused.
        gallery_features: [Ng, D], dtype of `query_features`.
        k1: neighbours in the reciprocal neighbourhood, at least 1. From Nq + Ng - 1 on, all items are neighbours.
        k2: items whose descriptions are averaged, the item itself among them, at least 1; 1 averages nothing.
        lambda_value: share of the original distance, in [0, 1].
        out: where the result goes: [Nq, Ng] of its dtype, writeable, sharing no memory with the features and none
            between its elements. A new array when None.
        threads: number of CPU threads, of which at most 1024 are used.

    Returns:
        `out`, [Nq, Ng]: float64 for float64 features, otherwise float32.

    Raises:
        TypeError: an argument is no array of NumPy or has a mask, a dtype is not known, or an option is no number.
        ValueError: shapes do not agree, a feature is NaN or infinite, or an option, `out` or `threads` cannot be used.

    Example:
        >>> import numpy as np
        >>> features = np.random.default_rng(0).standard_normal((50, 8))
        >>> k_reciprocal_rerank(features[:10], features[10:]).shape
        (10, 40)
    """
    arrays = {"query_features": query_features, "gallery_features": gallery_features}
    if out is not None:
        arrays["out"] = out
    if module_of(_NAME, arrays) is not np:
        raise TypeError(f"{_NAME}: query_features must be a NumPy array, got one of CuPy (its get() gives one)")
    dtype = _check(arrays)
    first, second = _count("k1", k1), _count("k2", k2)
    share = as_float(_NAME, "lambda_value", lambda_value)
    if not 0 <= share <= 1:
        raise ValueError(f"{_NAME}: lambda_value must be in [0, 1], got {lambda_value}")
    count = thread_count(_NAME, threads)

    rows = [_with_adjacent_features(x) for x in (query_features, gallery_features)]
    shape = len(query_features), len(gallery_features)
    result = np.empty(shape, dtype) if out is None or not out.flags.c_contiguous else out
    not_finite = native().k_reciprocal_rerank(
        (*shape, query_features.shape[1]),
        FLOATING[query_features.dtype.name],
        first,
        second,
        share,
        *((address_of(np, x), x.strides[0]) for x in rows),
        address_of(np, result),
        count,
    )
    if not_finite:
        name = ("query_features", "gallery_features")[not_finite - 1]
        raise ValueError(f"{_NAME}: {name} must be finite, got NaN or infinity")
    if out is not None and result is not out:
        out[...] = result
    return result if out is None else out


def _with_adjacent_features(x: Any) -> Any:
    adjacent = x.shape[1] == 1 or x.strides[1] == x.itemsize
    return x if adjacent and x.strides[0] % x.itemsize == 0 else np.ascontiguousarray(x)


def _count(name: str, value: Any) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{_NAME}: {name} must be a whole number, got {type(value).__name__}")
    count = int(value)
    if not 1 <= count < 2**63:
        raise ValueError(f"{_NAME}: {name} must be at least 1 and fit 64 bits, got {count}")
    return count


def _check(arrays: dict[str, Any]) -> Any:
    """Checks the arrays; returns the dtype of the result."""
    query, gallery = arrays["query_features"], arrays["gallery_features"]
    for name, x in (("query_features", query), ("gallery_features", gallery)):
        check_dtype(_NAME, name, x)
        check_same_dtype(_NAME, name, x, "query_features", query)
        if x.ndim != 2 or x.shape[1] == 0:
            shape = "[Nq, D]" if name == "query_features" else "[Ng, D]"
            raise ValueError(f"{_NAME}: {name} must be {shape} with D >= 1, got shape {x.shape}")
    if gallery.shape[1] != query.shape[1]:
        raise ValueError(
            f"{_NAME}: gallery_features must be [Ng, {query.shape[1]}] to match query_features {query.shape}, "
            f"got shape {gallery.shape}"
        )
    dtype = np.dtype(np.float64 if query.dtype == np.float64 else np.float32)
    if "out" in arrays:
        check_dtype(_NAME, "out", arrays["out"], (dtype.name,))
        check_out(_NAME, np, arrays, (len(query), len(gallery)), "")
    return dtype
