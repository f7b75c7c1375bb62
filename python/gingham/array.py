"""The operators on NumPy and CuPy arrays. Imports no torch.

NumPy arrays are computed on `threads` CPU threads (all cores unless the environment variable ``GINGHAM_NUM_THREADS``
or the argument says otherwise), CuPy arrays on their own device, on the stream that is CuPy's current one there.
"""

from __future__ import annotations

import numbers
import operator
import os
import sys
from typing import Any

import numpy as np

from gingham._library import native

_DTYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}  # gingham::DType
_MOST_WORK = 10_000  # for numpy.shares_memory, which decides for slices of one array at once
_MOST_THREADS = 1024  # of those that can have work, each gets memory and a thread of the system


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
    module = _module_of(arrays)
    _check(module, arrays)
    factor = _as_float(scale)
    if module is np:
        return _run(module, query, key, value, factor, out, _thread_count(threads))
    if threads is not None:
        raise ValueError(f"criss_cross_attention: threads must be None for CuPy arrays, got {threads!r}")
    with module.cuda.Device(value.device.id):
        return _run(module, query, key, value, factor, out, 0)


def _run(module: Any, query: Any, key: Any, value: Any, scale: float, out: Any, threads: int) -> Any:
    shape = _call_shape(query.shape, value.shape)
    channels_last = _is_channels_last(value)
    maps = [_native(module, x, channels_last) for x in (query, key, value)]
    result = _empty_map(module, value, channels_last) if out is None or not _fits(out, channels_last) else out
    if result.size:
        lse = module.empty((value.shape[0], *value.shape[2:]), dtype=np.float64)
        code = _DTYPES[value.dtype.name]
        views = [_view(module, x) for x in (*maps, result)]
        if module is np:
            native().criss_cross_attention(shape, code, scale, *views, lse.ctypes.data, threads)
        else:
            _run_cuda(module, shape, code, scale, views, lse)
    if out is not None and result is not out:
        out[...] = result
    return result if out is None else out


def _run_cuda(module: Any, shape: tuple[int, ...], code: int, scale: float, views: list[Any], lse: Any) -> None:
    library = native()
    if not hasattr(library, "criss_cross_attention_cuda"):
        raise RuntimeError(
            "criss_cross_attention: got CuPy arrays, but this gingham was built without CUDA; "
            "rebuild it with GINGHAM_WITH_CUDA=ON and nvcc on PATH"
        )
    size = library.criss_cross_attention_cuda_workspace(shape, code)
    workspace = module.empty(size, dtype=np.uint8)
    stream = module.cuda.get_current_stream().ptr
    library.criss_cross_attention_cuda(shape, code, scale, *views, lse.data.ptr, workspace.data.ptr, stream)


def _module_of(arrays: dict[str, Any]) -> Any:
    """numpy or cupy; cupy is not imported for anyone who has not imported it."""
    cupy = sys.modules.get("cupy")
    kinds = []
    for name, x in arrays.items():
        if isinstance(x, np.ma.MaskedArray):
            raise TypeError(
                f"criss_cross_attention: {name} must be an array without a mask, got MaskedArray "
                "(its filled() gives one)"
            )
        if isinstance(x, np.ndarray):
            kinds.append(np)
        elif cupy is not None and isinstance(x, cupy.ndarray):
            kinds.append(cupy)
        else:
            raise TypeError(f"criss_cross_attention: {name} must be a NumPy or CuPy array, got {type(x).__name__}")
    if any(kind is not kinds[0] for kind in kinds):
        found = ", ".join(f"{name} {type(x).__module__.split('.')[0]}" for name, x in arrays.items())
        raise TypeError(f"criss_cross_attention: the arrays must be all NumPy or all CuPy, got {found}")
    return kinds[0]


def _check(module: Any, arrays: dict[str, Any]) -> None:
    query, value = arrays["query"], arrays["value"]
    for name, x in arrays.items():
        if x.dtype.name not in _DTYPES or not x.dtype.isnative:
            raise TypeError(
                f"criss_cross_attention: {name} must be float32, float64, float16 or bfloat16 in the machine's byte "
                f"order, got {x.dtype}"
            )
        if x.dtype != query.dtype:
            raise TypeError(
                f"criss_cross_attention: {name} must have the dtype of query, got {x.dtype} and query {query.dtype}"
            )
        if module is not np and x.device.id != query.device.id:
            raise ValueError(
                f"criss_cross_attention: {name} must be on the device of query, got {x.device} and query {query.device}"
            )
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
        out = arrays["out"]
        if out.shape != value.shape:
            raise ValueError(f"criss_cross_attention: out must have the shape of value {value.shape}, got {out.shape}")
        if isinstance(out, np.ndarray) and not out.flags.writeable:
            raise ValueError("criss_cross_attention: out must be writeable, got a read-only array")
        if _may_overlap_itself(out):
            raise ValueError(
                "criss_cross_attention: out must not overlap itself, got strides "
                f"{out.strides} bytes for shape {out.shape}"
            )
        for name in ("query", "key", "value"):
            if _may_share_memory(module, out, arrays[name]):
                raise ValueError(f"criss_cross_attention: out must share no memory with the inputs, got that of {name}")


def _may_share_memory(module: Any, x: Any, y: Any) -> bool:
    if module is not np:
        return bool(module.may_share_memory(x, y))  # cupy compares bounds only
    try:
        return np.shares_memory(x, y, max_work=_MOST_WORK)  # type: ignore[arg-type]  # its stub knows two values only
    except np.exceptions.TooHardError:
        return True


def _may_overlap_itself(x: Any) -> bool:
    """Whether an axis steps into what the axes of smaller steps span: always so where elements share memory."""
    span = x.itemsize
    for step, extent in sorted((abs(stride), extent) for stride, extent in zip(x.strides, x.shape, strict=True)):
        if extent > 1 and step < span:
            return x.size > 0
        span += (extent - 1) * step
    return False


def _as_float(scale: Any) -> float:
    if not isinstance(scale, numbers.Real):
        raise TypeError(f"criss_cross_attention: scale must be a number, got {type(scale).__name__}")
    try:
        return float(scale)
    except OverflowError:
        raise ValueError("criss_cross_attention: scale must be in the range of float64, got a number beyond") from None


def _thread_count(threads: int | None) -> int:
    if threads is None:
        text = os.environ.get("GINGHAM_NUM_THREADS", "")
        if not text:
            return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"GINGHAM_NUM_THREADS must be a positive whole number, got {text!r}")
        return min(int(text), _MOST_THREADS)
    try:
        count = 0 if isinstance(threads, bool) else operator.index(threads)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"criss_cross_attention: threads must be a positive whole number, got {threads!r}")
    return min(count, _MOST_THREADS)


def _call_shape(query: tuple[int, ...], value: tuple[int, ...]) -> tuple[int, ...]:
    frames = query[2] if len(query) == 5 else 1
    return query[0], query[1], value[1], frames, query[-2], query[-1]


def _is_channels_last(x: Any) -> bool:
    return x.strides[1] == x.itemsize and x.strides[-1] != x.itemsize


def _fits(x: Any, channels_last: bool) -> bool:
    axis = 1 if channels_last else -1
    adjacent = x.strides[axis] == x.itemsize or x.shape[axis] <= 1
    return adjacent and all(stride % x.itemsize == 0 for stride in x.strides)


def _native(module: Any, x: Any, channels_last: bool) -> Any:
    if _fits(x, channels_last):
        return x
    copy = _empty_map(module, x, channels_last)
    copy[...] = x
    return copy


def _empty_map(module: Any, like: Any, channels_last: bool) -> Any:
    if not channels_last:
        return module.empty(like.shape, dtype=like.dtype)
    rest = module.empty((like.shape[0], *like.shape[2:], like.shape[1]), dtype=like.dtype)
    return module.moveaxis(rest, -1, 1)


def _view(module: Any, x: Any) -> tuple[int, tuple[int, ...]]:
    """Address and byte strides of [batch, channel, frame, row, column]."""
    strides = x.strides if x.ndim == 5 else (*x.strides[:2], 0, *x.strides[2:])
    return (x.ctypes.data if module is np else x.data.ptr), strides
