"""The similarity of a query with masked supports on arrays (Zhang et al., SG-One, https://arxiv.org/abs/1810.09091)."""

from __future__ import annotations

import math
from typing import Any, Literal

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
    is_channels_last,
    module_of,
    native_map,
    on_device_of,
    run_cuda,
    sums_dtype,
    thread_count,
    view_of,
)
from gingham.array.masked_average_pool import MASKS, check_resize

_NAME = "masked_similarity"


def masked_similarity(
    query: Any,
    support: Any,
    mask: Any,
    *,
    resize: Literal["features", "mask"] = "features",
    valid_sizes: Any = None,
    eps: float = 1e-8,
    torch_compat: bool = False,
    out: Any = None,
    threads: int | None = None,
) -> Any:
    """The cosine of every pixel of a query with the mean of K masked averages of supports, in one call.

    The operator of `gingham.ops.masked_similarity` (SG-One, https://arxiv.org/abs/1810.09091), without gradients.

    Args:
        query: [B, C, h, w] with at least one channel, NumPy or CuPy; float32, float64, float16, or bfloat16 of
            ml_dtypes. Maps whose columns or channels are adjacent in memory are read in place, others are copied.
        support: [B, K, C, h', w'] with at least one shot, the dtype of `query`.
        mask: [B, K, 1, H, W] of any of these dtypes, bool or uint8; larger or smaller than the supports.
        resize: "features": the supports count as interpolated to the size of their masks. "mask": the masks are
            interpolated to the size of the supports.
        valid_sizes: int64 [B, K, 4]: the rows and the columns of each support, then those of its mask, that count, from
            the upper left. CuPy arrays are not searched for sizes out of range, which count as the nearest in it.
        eps: norms up to this one, finite and not negative, have cosine 0.
        torch_compat: such norms count as `eps` instead.
        out: where the result goes: [B, 1, h, w] in the dtype of `query`, writeable, sharing no memory with the inputs
            and none between its elements. A new array when None.
        threads: number of CPU threads, of which at most 1024 are used; not for CuPy.

    Returns:
        `out`, [B, 1, h, w].

    Raises:
        TypeError: an argument is no array or has a mask, the arrays are of different kinds, a dtype is not known, or an
            option is not of its type.
        ValueError: shapes do not agree, or `resize`, `valid_sizes`, `eps`, `out` or `threads` cannot be used.

    Example:
        >>> import numpy as np
        >>> query = np.array([[3, 0], [4, 1]], dtype=np.float32).reshape(1, 2, 1, 2)
        >>> masked_similarity(query, query[:, None], np.array([[[[[True, False]]]]])).squeeze()
        array([1. , 0.8], dtype=float32)
    """
    arrays = {"query": query, "support": support, "mask": mask}
    arrays |= {name: x for name, x in (("valid_sizes", valid_sizes), ("out", out)) if x is not None}
    module = module_of(_NAME, arrays)
    check_resize(_NAME, resize)
    smallest = as_float(_NAME, "eps", eps)
    if not 0 <= smallest < math.inf:
        raise ValueError(f"{_NAME}: eps must be finite and not negative, got {eps}")
    if not isinstance(torch_compat, bool):
        raise TypeError(f"{_NAME}: torch_compat must be a bool, got {type(torch_compat).__name__}")
    _check(module, arrays)
    if torch_compat:
        check_divisor(_NAME, smallest, query.dtype)
    count = thread_count(_NAME, threads, module)
    with on_device_of(module, query):
        return _run(module, arrays, (resize == "mask", smallest, torch_compat), count)


def _run(module: Any, arrays: dict[str, Any], options: tuple[bool, float, bool], threads: int) -> Any:
    query, mask = arrays["query"], arrays["mask"]
    # [B, C, K, h', w'], as frames
    support, masks = (arrays[name].swapaxes(1, 2) for name in ("support", "mask"))
    batch, channels, *size = query.shape
    shots, *support_size = support.shape[2:]
    maps = (
        native_map(module, query, is_channels_last(query)),
        native_map(module, support, is_channels_last(support)),
        native_map(module, masks, False),
    )
    sums = sums_dtype(query.dtype)
    similarity = module.empty((batch, 1, *size), dtype=query.dtype)
    kept = [
        module.empty(shape, dtype=sums)
        for shape in ((batch, shots, math.prod(support_size)), (batch, shots), (batch, channels), (batch, *size))
    ]
    sizes = arrays.get("valid_sizes")
    sizes = None if sizes is None else module.ascontiguousarray(sizes)
    shape = batch, shots, channels, *size, *support_size, *mask.shape[3:]
    code = FLOATING[query.dtype.name]
    views = [view_of(module, x) for x in maps]
    arguments = (
        shape,
        code,
        MASKS[mask.dtype.name],
        options,
        views,
        0 if sizes is None else address_of(module, sizes),
        [address_of(module, x) for x in (similarity, *kept)],
    )
    if module is np:
        native().masked_similarity(*arguments, threads)
    else:
        run_cuda(module, _NAME, (shape, code, views), arguments)
    if "out" not in arrays:
        return similarity
    arrays["out"][...] = similarity
    return arrays["out"]


def _check(module: Any, arrays: dict[str, Any]) -> None:
    query, support, mask = arrays["query"], arrays["support"], arrays["mask"]
    for name, x in arrays.items():
        known = {"mask": tuple(MASKS), "valid_sizes": ("int64",)}.get(name, tuple(FLOATING))
        check_dtype(_NAME, name, x, known)
        if name in ("support", "out"):
            check_same_dtype(_NAME, name, x, "query", query)
        check_same_device(_NAME, module, name, x, "query", query)
    if query.ndim != 4:
        raise ValueError(f"{_NAME}: query must be [B, C, h, w], got shape {query.shape}")
    if query.shape[1] == 0:
        raise ValueError(f"{_NAME}: query must have at least one channel, got shape {query.shape}")
    batch, channels = query.shape[:2]
    if support.ndim != 5 or (support.shape[0], support.shape[2]) != (batch, channels) or support.shape[1] == 0:
        raise ValueError(
            f"{_NAME}: support must be [{batch}, K, {channels}, h', w'] with K > 0 to match query, got shape "
            f"{support.shape}"
        )
    shots = support.shape[1]
    if mask.ndim != 5 or mask.shape[:3] != (batch, shots, 1):
        raise ValueError(f"{_NAME}: mask must be [{batch}, {shots}, 1, H, W] to match support, got shape {mask.shape}")
    if "valid_sizes" in arrays:
        sizes = arrays["valid_sizes"]
        if sizes.shape != (batch, shots, 4):
            raise ValueError(
                f"{_NAME}: valid_sizes must be [{batch}, {shots}, 4] to match support, got shape {sizes.shape}"
            )
        most = (*support.shape[3:], *mask.shape[3:])
        if module is np and bool(((sizes < 0) | (sizes > np.array(most))).any()):
            raise ValueError(
                f"{_NAME}: valid_sizes must be in [0, {list(most[:2])}] for the support and [0, {list(most[2:])}] for "
                f"the mask, got {sizes.tolist()}"
            )
    if "out" in arrays:
        check_out(_NAME, module, arrays, (batch, 1, *query.shape[2:]), "")
