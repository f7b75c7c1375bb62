"""Cosines of pixels with prototypes on arrays (Zhang et al., SG-One, https://arxiv.org/abs/1810.09091)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gingham._library import native
from gingham.array._arrays import (
    FLOATING,
    address_of,
    as_float,
    check_divisor,
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
    sums_dtype,
    thread_count,
    view_of,
)

_NAME = "cosine_similarity_map"


def cosine_similarity_map(
    features: Any,
    prototypes: Any,
    *,
    eps: float = 1e-8,
    torch_compat: bool = False,
    out: Any = None,
    threads: int | None = None,
) -> Any:
    """The cosine of every pixel of a feature map with each of a set of vectors.

    The operator of `gingham.ops.cosine_similarity_map` (SG-One, https://arxiv.org/abs/1810.09091), without gradients.

    Args:
        features: [B, C, H, W] with at least one channel, NumPy or CuPy; float32, float64, float16, or bfloat16 of
            ml_dtypes. Maps whose columns or channels are adjacent in memory are read in place, others are copied.
        prototypes: [B, P, C], batch, channels and dtype of `features`.
        eps: norms up to this one, finite and not negative, have cosine 0.
        torch_compat: such norms count as `eps` instead, as in `torch.nn.functional.cosine_similarity`.
        out: where the result goes: [B, P, H, W], the dtype of `features`, writeable, sharing no memory with the inputs
            and none between its elements. A new array in the memory order of `features` when None.
        threads: number of CPU threads, of which at most 1024 are used; not for CuPy.

    Returns:
        `out`, [B, P, H, W].

    Raises:
        TypeError: an argument is no array or has a mask, the arrays are of different kinds, a dtype is not known, or an
            option is not of its type.
        ValueError: shapes do not agree, or `eps`, `out` or `threads` cannot be used.

    Example:
        >>> import numpy as np
        >>> features = np.array([[3.0, 0.0], [4.0, 0.0]]).reshape(1, 2, 1, 2)
        >>> cosine_similarity_map(features, np.array([[[1.0, 0.0], [0.0, 2.0]]])).reshape(2, 2)
        array([[0.6, 0. ],
               [0.8, 0. ]])
    """
    arrays = {"features": features, "prototypes": prototypes} | ({} if out is None else {"out": out})
    module = module_of(_NAME, arrays)
    threshold = as_float(_NAME, "eps", eps)
    _check(module, arrays, threshold, torch_compat)
    count = thread_count(_NAME, threads, module)
    with on_device_of(module, features):
        return _run(module, features, prototypes, threshold, torch_compat, out, count)


def _run(module: Any, features: Any, prototypes: Any, eps: float, torch_compat: bool, out: Any, threads: int) -> Any:
    batch, channels, height, width = features.shape
    shape = batch, channels, prototypes.shape[1], height, width
    channels_last = is_channels_last(features)
    size = batch, prototypes.shape[1], height, width
    result = (
        empty_map(module, size, features.dtype, channels_last) if out is None or not fits(out, channels_last) else out
    )
    if result.size:
        map_ = native_map(module, features, channels_last)
        adjacent = prototypes.strides[2] == prototypes.itemsize or channels == 1
        whole = all(stride % prototypes.itemsize == 0 for stride in prototypes.strides)
        vectors = prototypes if adjacent and whole else module.ascontiguousarray(prototypes)
        sums = sums_dtype(features.dtype)
        norms = [module.empty(extents, dtype=sums) for extents in ((batch, height, width), (batch, shape[2]))]
        code = FLOATING[features.dtype.name]
        arguments = (
            shape,
            code,
            eps,
            torch_compat,
            view_of(module, map_),
            (address_of(module, vectors), vectors.strides[:2]),
            view_of(module, result),
            *(address_of(module, x) for x in norms),
        )
        if module is np:
            native().cosine_similarity_map(*arguments, threads)
        else:
            run_cuda(module, _NAME, (shape, code), arguments)
    if out is not None and result is not out:
        out[...] = result
    return result if out is None else out


def _check(module: Any, arrays: dict[str, Any], eps: float, torch_compat: Any) -> None:
    features, prototypes = arrays["features"], arrays["prototypes"]
    if not 0 <= eps < math.inf:
        raise ValueError(f"{_NAME}: eps must be finite and not negative, got {eps}")
    if not isinstance(torch_compat, bool):
        raise TypeError(f"{_NAME}: torch_compat must be a bool, got {type(torch_compat).__name__}")
    if torch_compat:
        check_divisor(_NAME, eps, features.dtype)
    for name, x in arrays.items():
        check_dtype(_NAME, name, x)
        check_same_dtype(_NAME, name, x, "features", features)
        check_same_device(_NAME, module, name, x, "features", features)
    if features.ndim != 4:
        raise ValueError(f"{_NAME}: features must be [B, C, H, W], got shape {features.shape}")
    batch, channels, height, width = features.shape
    if channels == 0:
        raise ValueError(f"{_NAME}: features must have at least one channel, got shape {features.shape}")
    if prototypes.ndim != 3 or prototypes.shape[0] != batch or prototypes.shape[2] != channels:
        raise ValueError(
            f"{_NAME}: prototypes must be [{batch}, P, {channels}] to match features, got shape {prototypes.shape}"
        )
    if "out" in arrays:
        check_out(_NAME, module, arrays, (batch, prototypes.shape[1], height, width), "")
