"""Masked average pooling on arrays (Zhang et al., SG-One, https://arxiv.org/abs/1810.09091)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from gingham._library import native
from gingham.array._arrays import (
    FLOATING,
    address_of,
    check_dtype,
    check_out,
    check_same_device,
    check_same_dtype,
    is_channels_last,
    module_of,
    native_map,
    on_device_of,
    run_cuda,
    thread_count,
    view_of,
)

_NAME = "masked_average_pool"
MASKS = {**FLOATING, "bool": 4, "uint8": 4}  # gingham::MaskType


def masked_average_pool(
    features: Any,
    mask: Any,
    *,
    resize: Literal["features", "mask"] = "features",
    out: Any = None,
    threads: int | None = None,
) -> Any:
    """The mean of a feature map under a mask of any size.

    The operator of `gingham.ops.masked_average_pool` (SG-One, https://arxiv.org/abs/1810.09091), without gradients.

    Args:
        features: [B, C, h, w], NumPy or CuPy; float32, float64, float16, or bfloat16 of ml_dtypes. Maps whose columns
            or channels are adjacent in memory are read in place, others are copied.
        mask: [B, 1, H, W] of any of these dtypes, bool or uint8; larger or smaller than the features.
        resize: "features": the features count as interpolated to the size of the mask. "mask": the mask is interpolated
            to the size of the features. Both bilinear with ``align_corners=False``.
        out: where the result goes: [B, C] in the dtype of `features`, writeable, sharing no memory with the inputs and
            none between its elements. A new array when None.
        threads: number of CPU threads, of which at most 1024 are used; not for CuPy.

    Returns:
        `out`, [B, C]; zeros where the mask sums to zero.

    Raises:
        TypeError: an argument is no array or has a mask, the arrays are of different kinds, or a dtype is not known.
        ValueError: shapes do not agree, or `resize`, `out` or `threads` cannot be used.

    Example:
        >>> import numpy as np
        >>> features = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
        >>> masked_average_pool(features, np.array([[[[False, True], [False, True]]]]))
        array([[2.]], dtype=float32)
    """
    arrays = {"features": features, "mask": mask} | ({} if out is None else {"out": out})
    module = module_of(_NAME, arrays)
    check_resize(_NAME, resize)
    _check(module, arrays)
    count = thread_count(_NAME, threads, module)
    with on_device_of(module, features):
        return _run(module, features, mask, resize == "mask", out, count)


def _run(module: Any, features: Any, mask: Any, resize_mask: bool, out: Any, threads: int) -> Any:
    batch, channels, *size = features.shape
    maps = native_map(module, features, is_channels_last(features)), native_map(module, mask, False)
    sums = np.float64 if features.dtype == np.float64 else np.float32
    pooled = module.empty((batch, channels), dtype=features.dtype)
    weights, total = module.empty((batch, *size), dtype=sums), module.empty((batch,), dtype=sums)
    shape = batch, channels, *size, *mask.shape[2:]
    code = FLOATING[features.dtype.name]
    views = [view_of(module, x) for x in maps]
    results = [address_of(module, x) for x in (pooled, weights, total)]
    arguments = shape, code, MASKS[mask.dtype.name], resize_mask, *views, *results
    if module is np:
        native().masked_average_pool(*arguments, threads)
    else:
        run_cuda(module, _NAME, (shape, code, views[0]), arguments)
    if out is None:
        return pooled
    out[...] = pooled
    return out


def check_resize(operator_name: str, resize: str) -> None:
    """Raises ValueError unless `resize` is one of the two."""
    if not isinstance(resize, str) or resize not in ("features", "mask"):
        raise ValueError(f"{operator_name}: resize must be 'features' or 'mask', got {resize!r}")


def _check(module: Any, arrays: dict[str, Any]) -> None:
    features, mask = arrays["features"], arrays["mask"]
    check_dtype(_NAME, "features", features)
    check_dtype(_NAME, "mask", mask, tuple(MASKS))
    check_same_device(_NAME, module, "mask", mask, "features", features)
    if features.ndim != 4:
        raise ValueError(f"{_NAME}: features must be [B, C, h, w], got shape {features.shape}")
    if mask.ndim != 4 or mask.shape[:2] != (features.shape[0], 1):
        raise ValueError(
            f"{_NAME}: mask must be [{features.shape[0]}, 1, H, W] to match features, got shape {mask.shape}"
        )
    if "out" in arrays:
        check_dtype(_NAME, "out", arrays["out"])
        check_same_dtype(_NAME, "out", arrays["out"], "features", features)
        check_same_device(_NAME, module, "out", arrays["out"], "features", features)
        check_out(_NAME, module, arrays, features.shape[:2], "")
