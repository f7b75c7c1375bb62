"""RoI max pooling on arrays (Girshick, Fast R-CNN, https://arxiv.org/abs/1504.08083)."""

from __future__ import annotations

import math
import operator
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

_NAME = "roi_pool"


def roi_pool(
    features: Any,
    boxes: Any,
    output_size: Any,
    spatial_scale: float = 1.0,
    *,
    out: Any = None,
    threads: int | None = None,
) -> Any:
    """The largest pixel in each bin of a grid over each box; zero in bins that lie outside of the map.

    The operator of `gingham.ops.roi_pool` (Fast R-CNN, https://arxiv.org/abs/1504.08083), without gradients.

    Args:
        features: [B, C, H, W], NumPy or CuPy; float32, float64, float16, or bfloat16 of ml_dtypes. Maps whose columns
            or channels are adjacent in memory are read in place, others are copied.
        boxes: [N, 5], rows (image, x1, y1, x2, y2); float64 beside float64 features, otherwise float32.
        output_size: bins (down, across), or one number for both.
        spatial_scale: pixels of the map per unit of the boxes, any finite number.
        out: where the result goes: [N, C, *output_size], dtype of `features`, writeable, sharing no memory with the
            inputs and none between its elements. A new array in the memory order of `features` when None.
        threads: number of CPU threads, of which at most 1024 are used; not for CuPy.

    Returns:
        `out`, [N, C, *output_size]. Of CuPy arrays, NaN where a box names no image or is not finite.

    Raises:
        TypeError: an argument is no array or has a mask, the arrays are of different kinds, or a dtype is not known.
        ValueError: shapes do not agree; a box of a NumPy array names no image or is not finite; `output_size`,
            `spatial_scale`, `out` or `threads` cannot be used.

    Example:
        >>> import numpy as np
        >>> ramp = np.arange(1, 65, dtype=np.float32).reshape(1, 1, 8, 8)
        >>> roi_pool(ramp, np.array([[0, 0, 0, 3, 3]], dtype=np.float32), 2).tolist()
        [[[[10.0, 12.0], [26.0, 28.0]]]]
    """
    arrays = {"features": features, "boxes": boxes} | ({} if out is None else {"out": out})
    module = module_of(_NAME, arrays)
    rows, columns = _as_pair(output_size)
    scale = as_float(_NAME, "spatial_scale", spatial_scale)
    if not math.isfinite(scale):
        raise ValueError(f"{_NAME}: spatial_scale must be finite, got {scale}")
    _check(module, arrays, rows, columns)
    count = thread_count(_NAME, threads, module)
    with on_device_of(module, features):
        return _run(module, features, boxes, (rows, columns), scale, out, count)


def _run(module: Any, features: Any, boxes: Any, size: tuple[int, int], scale: float, out: Any, threads: int) -> Any:
    shape = *features.shape, boxes.shape[0], *size
    channels_last = is_channels_last(features)
    features = native_map(module, features, channels_last)
    boxes = module.ascontiguousarray(boxes)
    # The kernels write planes, or pixels, that lie side by side.
    expected = boxes.shape[0], features.shape[1], *size
    result = out
    if out is None or not fits(out, channels_last) or not _has_adjacent_pixels(out, channels_last):
        result = empty_map(module, expected, features.dtype, channels_last)
    if result.size:
        code = FLOATING[features.dtype.name]
        arguments = shape, code, scale, view_of(module, features), address_of(module, boxes), view_of(module, result)
        if module is np:
            invalid = native().roi_pool(*arguments, threads)
            if invalid >= 0:
                numbers = ", ".join(f"{x:g}" for x in boxes[invalid])
                raise ValueError(
                    f"{_NAME}: boxes[{invalid}] must name an image in [0, {features.shape[0]}) and have finite "
                    f"coordinates, got ({numbers})"
                )
        else:
            run_cuda(module, _NAME, (shape, code), arguments)
    if out is not None and result is not out:
        out[...] = result
    return result if out is None else out


def _has_adjacent_pixels(x: Any, channels_last: bool) -> bool:
    step = x.strides[3] if channels_last else x.itemsize
    return bool(x.strides[3] == step and x.strides[2] == step * x.shape[3])


def _as_pair(size: Any) -> tuple[int, int]:
    try:
        pair = (
            tuple(operator.index(n) for n in size) if isinstance(size, (tuple, list)) else (operator.index(size),) * 2
        )
    except TypeError:
        raise TypeError(f"{_NAME}: output_size must be a whole number or two, got {size!r}") from None
    if len(pair) != 2:
        raise TypeError(f"{_NAME}: output_size must be a whole number or two, got {size!r}")
    if min(pair) < 1:
        raise ValueError(f"{_NAME}: output_size must be positive, got {size!r}")
    if pair[0] * pair[1] >= 2**31:
        raise ValueError(f"{_NAME}: output_size must have fewer than 2^31 bins, got {size!r}")
    return pair


def _check(module: Any, arrays: dict[str, Any], rows: int, columns: int) -> None:
    features, boxes = arrays["features"], arrays["boxes"]
    check_dtype(_NAME, "features", features)
    if features.ndim != 4:
        raise ValueError(f"{_NAME}: features must be [B, C, H, W], got shape {features.shape}")
    if features.shape[2] * features.shape[3] >= 2**31:
        raise ValueError(f"{_NAME}: features must have fewer than 2^31 pixels, got shape {features.shape}")
    check_dtype(_NAME, "boxes", boxes, ("float64",) if features.dtype == np.float64 else ("float32",))
    check_same_device(_NAME, module, "boxes", boxes, "features", features)
    if boxes.ndim != 2 or boxes.shape[1] != 5:
        raise ValueError(f"{_NAME}: boxes must be [N, 5], got shape {boxes.shape}")
    if "out" in arrays:
        check_same_dtype(_NAME, "out", arrays["out"], "features", features)
        check_same_device(_NAME, module, "out", arrays["out"], "features", features)
        check_out(_NAME, module, arrays, (boxes.shape[0], features.shape[1], rows, columns), "")
