"""Criss-cross attention on arrays (Huang et al., CCNet, https://arxiv.org/abs/1811.11721)."""

from __future__ import annotations

from typing import Any

import numpy as np

from gingham._library import native
from gingham.array._arrays import (
    FLOATING,
    address_of,
    as_float,
    check_dtype,
    check_out,
    check_same_device,
    check_same_dtype,
    empty_map,
    fits,
    is_channels_last,
    module_of,
    native_map,
    on_device_of,
    run_cuda,
    thread_count,
    view_of,
)

_NAME = "criss_cross_attention"


def criss_cross_attention(
    query: Any, key: Any, value: Any, *, scale: float = 1.0, out: Any = None, threads: int | None = None
) -> Any:
    """Attention of every position to those that differ from it in at most one coordinate, itself counted once.

    The operator of `gingham.ops.criss_cross_attention` (CCNet, https://arxiv.org/abs/1811.11721), without gradients.

    Args:
        query: [B, Ck, H, W] or [B, Ck, T, H, W], NumPy or CuPy; float32, float64, float16, or bfloat16 of ml_dtypes.
            Maps whose columns or channels are adjacent in memory are read in place, others are copied.
        key: shape and dtype of `query`.
        value: [B, Cv, *S], batch, spatial sizes and dtype of `query`.
        scale: factor on the logits, any real number.
        out: where the result goes: shape and dtype of `value`, writeable, sharing no memory with the inputs and none
            between its elements. A new array in the memory order of `value` when None.
        threads: number of CPU threads, of which at most 1024 are used; not for CuPy.

    Returns:
        `out`, [B, Cv, *S].

    Raises:
        TypeError: an argument is no array or has a mask, the arrays are of different kinds, or a dtype is not known.
        ValueError: shapes do not agree, or `scale`, `out` or `threads` cannot be used.

    Example:
        >>> import numpy as np
        >>> ones = np.ones((1, 4, 5, 6), dtype=np.float32)
        >>> criss_cross_attention(ones, ones, ones).shape
        (1, 4, 5, 6)
    """
    arrays = {"query": query, "key": key, "value": value} | ({} if out is None else {"out": out})
    module = module_of(_NAME, arrays)
    _check(module, arrays)
    factor = as_float(_NAME, "scale", scale)
    count = thread_count(_NAME, threads, module)
    with on_device_of(module, value):
        return _run(module, query, key, value, factor, out, count)


def _run(module: Any, query: Any, key: Any, value: Any, scale: float, out: Any, threads: int) -> Any:
    frames = query.shape[2] if query.ndim == 5 else 1
    shape = query.shape[0], query.shape[1], value.shape[1], frames, query.shape[-2], query.shape[-1]
    channels_last = is_channels_last(value)
    maps = [native_map(module, x, channels_last) for x in (query, key, value)]
    result = (
        empty_map(module, value.shape, value.dtype, channels_last)
        if out is None or not fits(out, channels_last)
        else out
    )
    if result.size:
        lse = module.empty((value.shape[0], *value.shape[2:]), dtype=np.float64)
        code = FLOATING[value.dtype.name]
        views = [view_of(module, x) for x in (*maps, result)]
        arguments = shape, code, scale, *views, address_of(module, lse)
        if module is np:
            native().criss_cross_attention(*arguments, threads)
        else:
            run_cuda(module, _NAME, (shape, code, *views), arguments)
    if out is not None and result is not out:
        out[...] = result
    return result if out is None else out


def _check(module: Any, arrays: dict[str, Any]) -> None:
    query, value = arrays["query"], arrays["value"]
    for name, x in arrays.items():
        check_dtype(_NAME, name, x)
        check_same_dtype(_NAME, name, x, "query", query)
        check_same_device(_NAME, module, name, x, "query", query)
    if query.ndim not in (4, 5):
        raise ValueError(
            f"criss_cross_attention: query must be [B, Ck, H, W] or [B, Ck, T, H, W], got shape {query.shape}"
        )
    if query.shape[1] == 0:
        raise ValueError(f"criss_cross_attention: query must have at least one channel, got shape {query.shape}")
    if arrays["key"].shape != query.shape:
        raise ValueError(
            f"criss_cross_attention: key must have the shape of query {query.shape}, got {arrays['key'].shape}"
        )
    if value.ndim != query.ndim or (value.shape[0], *value.shape[2:]) != (query.shape[0], *query.shape[2:]):
        wanted = ", ".join(str(s) for s in (query.shape[0], "Cv", *query.shape[2:]))
        raise ValueError(f"criss_cross_attention: value must be [{wanted}] to match query, got shape {value.shape}")
    if "out" in arrays:
        check_out(_NAME, module, arrays, value.shape, "value")
