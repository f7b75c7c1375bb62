"""Spatial-temporal attention on arrays (Fu et al., STA, https://arxiv.org/abs/1811.04129)."""

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
    check_divisor,
    check_dtype,
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

_ENERGIES = {"sq": 0, "l2": 1, "agrl": 2}  # gingham::SpatialEnergy
_SUMS, _FROM_SUMS = "spatial_temporal_sums", "spatial_temporal_attention_from_sums"


def spatial_temporal_attention(
    features: Any,
    parts: int = 4,
    *,
    energy: str = "sq",
    eps: float = 1e-12,
    return_map: bool = False,
    threads: int | None = None,
) -> tuple[Any, ...]:
    """One vector for a clip: of each body part its best frame, and the frames by their scores, part by part.

    The operator of `gingham.ops.spatial_temporal_attention` (STA, https://arxiv.org/abs/1811.04129), without gradients.

    Args:
        features: [B, T, C, H, W], at least one frame, row and column, NumPy or CuPy; float32, float64, float16, or
            bfloat16 of ml_dtypes. Maps whose columns or channels are adjacent in memory are read in place, others are
            copied.
        parts: K, number of bands of rows, 1 to H; band k has the rows from ``k * H // K`` to ``(k + 1) * H // K``.
        energy: "sq", "l2" or "agrl", as in `gingham.ops.spatial_temporal_attention`.
        eps: totals of energy are taken for at least this; positive.
        return_map: whether to return the attention map too.
        threads: number of CPU threads, of which at most 1024 are used; not for CuPy.

    Returns:
        pooled [B, 2C] in the dtype of `features`, the best frames' half first; scores [B, T, K], float32 (float64 for
        float64); frames [B, K], int64; and with `return_map` the map [B, T, H, W], dtype of `scores`.

    Raises:
        TypeError: `features` is no array, has a mask or a dtype that is not known, or an option has the wrong type.
        ValueError: the shape of `features`, `parts`, `energy`, `eps` or `threads` is out of range.

    Example:
        >>> import numpy as np
        >>> pooled, scores, frames = spatial_temporal_attention(np.ones((1, 3, 2, 4, 2), dtype=np.float32), parts=2)
        >>> pooled
        array([[1., 1., 1., 1.]], dtype=float32)
        >>> frames
        array([[0, 0]])
    """
    name = "spatial_temporal_attention"
    module, options, count = _check_features(name, "[B, T, C, H, W]", features, parts, energy, eps, threads)
    if not isinstance(return_map, bool):
        raise TypeError(f"{name}: return_map must be a bool, got {type(return_map).__name__}")
    batch, length, channels, height, width = features.shape
    with on_device_of(module, features):
        sums, shares, attention = _sum_frames(module, features, options, count)
        shape = batch, length, channels, height, width, options[0]
        pooled, scores, frames = _pool(module, shape, features.dtype, options[2], sums, shares, count)
    return (pooled, scores, frames, attention) if return_map else (pooled, scores, frames)


def spatial_temporal_sums(
    features: Any, parts: int = 4, *, energy: str = "sq", eps: float = 1e-12, threads: int | None = None
) -> tuple[Any, Any]:
    """What `spatial_temporal_attention_from_sums` needs of a frame, to be kept for all clips that it is part of.

    The operator of `gingham.ops.spatial_temporal_sums` (STA, https://arxiv.org/abs/1811.04129), without gradients.

    Args:
        features: [N, C, H, W]; otherwise as of `spatial_temporal_attention`.
        parts: as of `spatial_temporal_attention`.
        energy: as of `spatial_temporal_attention`.
        eps: as of `spatial_temporal_attention`.
        threads: as of `spatial_temporal_attention`.

    Returns:
        sums [N, K, C], float32 (float64 for float64), and energies [N, K], same dtype.

    Raises:
        TypeError, ValueError: as `spatial_temporal_attention`.

    Example:
        >>> import numpy as np
        >>> sums, energies = spatial_temporal_sums(np.ones((1, 3, 4, 2), dtype=np.float32), parts=2)
        >>> energies
        array([[0.5, 0.5]], dtype=float32)
    """
    module, options, count = _check_features(_SUMS, "[N, C, H, W]", features, parts, energy, eps, threads)
    with on_device_of(module, features):
        sums, shares, _ = _sum_frames(module, features[:, None], options, count)
    return sums[:, 0], shares[:, 0]


def spatial_temporal_attention_from_sums(
    sums: Any, energies: Any, positions: int, *, eps: float = 1e-12, threads: int | None = None
) -> tuple[Any, Any, Any]:
    """`spatial_temporal_attention` of clips, from what `spatial_temporal_sums` says of their frames.

    The operator of `gingham.ops.spatial_temporal_attention_from_sums` (STA, https://arxiv.org/abs/1811.04129), without
    gradients.

    Args:
        sums: [B, T, K, C], float32 or float64, with T and K of at least 1.
        energies: [B, T, K], dtype of `sums`.
        positions: H * W of the features, at least 1.
        eps: as of `spatial_temporal_attention`.
        threads: as of `spatial_temporal_attention`.

    Returns:
        pooled [B, 2C] and scores [B, T, K] in the dtype of `sums`, and frames [B, K], int64.

    Raises:
        TypeError: an argument is no array, the arrays are of different kinds, or a dtype is not supported.
        ValueError: shapes do not agree, or `positions`, `eps` or `threads` is out of range.

    Example:
        >>> import numpy as np
        >>> sums, energies = spatial_temporal_sums(np.ones((3, 1, 4, 2), dtype=np.float32), parts=2)
        >>> spatial_temporal_attention_from_sums(sums[None], energies[None], positions=4 * 2)[0]
        array([[1., 1.]], dtype=float32)
    """
    arrays = {"sums": sums, "energies": energies}
    module = module_of(_FROM_SUMS, arrays)
    for name, x in arrays.items():
        check_dtype(_FROM_SUMS, name, x, ("float32", "float64"))
        check_same_dtype(_FROM_SUMS, name, x, "sums", sums)
        check_same_device(_FROM_SUMS, module, name, x, "sums", sums)
    if sums.ndim != 4 or 0 in sums.shape[1:3]:
        raise ValueError(
            f"{_FROM_SUMS}: sums must be [B, T, K, C] with at least one frame and part, got shape {sums.shape}"
        )
    if energies.shape != sums.shape[:3]:
        raise ValueError(f"{_FROM_SUMS}: energies must be {sums.shape[:3]} to match sums, got {energies.shape}")
    n = _whole_number(_FROM_SUMS, "positions", positions)
    if not 1 <= n < 2**63:
        raise ValueError(f"{_FROM_SUMS}: positions must be at least 1 and fit 64 bits, got {positions}")
    least = _checked_eps(_FROM_SUMS, eps, sums.dtype)
    count = thread_count(_FROM_SUMS, threads, module)
    batch, length, parts, channels = sums.shape
    with on_device_of(module, sums):
        sums, energies = module.ascontiguousarray(sums), module.ascontiguousarray(energies)
        return _pool(module, (batch, length, channels, n, 1, parts), sums.dtype, least, sums, energies, count)


# ------------------------------------------------------------------------------------------------ checks


def _whole_number(name: str, argument: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: {argument} must be a whole number, got {type(value).__name__}") from None


def _checked_eps(name: str, eps: Any, dtype: Any) -> float:
    value = as_float(name, "eps", eps)
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: eps must be finite and positive, got {eps}")
    check_divisor(name, value, dtype)
    return value


def _check_features(
    name: str, layout: str, features: Any, parts: Any, energy: Any, eps: Any, threads: int | None
) -> tuple[Any, tuple[int, int, float], int]:
    """numpy or cupy; parts, the code of the energy, eps; and the number of threads."""
    module = module_of(name, {"features": features})
    check_dtype(name, "features", features)
    if features.ndim != layout.count(",") + 1:
        raise ValueError(f"{name}: features must be {layout}, got shape {features.shape}")
    if 0 in (features.shape[1] if features.ndim == 5 else 1, *features.shape[-2:]):
        raise ValueError(f"{name}: features must have at least one frame, row and column, got shape {features.shape}")
    count = _whole_number(name, "parts", parts)
    if not 1 <= count <= features.shape[-2]:
        raise ValueError(f"{name}: parts must be 1 to the {features.shape[-2]} rows of features, got {parts}")
    if not isinstance(energy, str):
        raise TypeError(f"{name}: energy must be a string, got {type(energy).__name__}")
    if energy not in _ENERGIES:
        raise ValueError(f'{name}: energy must be "sq", "l2" or "agrl", got {energy!r}')
    options = count, _ENERGIES[energy], _checked_eps(name, eps, features.dtype)
    return module, options, thread_count(name, threads, module)


# ------------------------------------------------------------------------------------------------ calls


def _sum_frames(module: Any, features: Any, options: tuple[int, int, float], threads: int) -> tuple[Any, Any, Any]:
    """Sums [B, T, K, C], shares [B, T, K] and the map [B, T, H, W] of features [B, T, C, H, W]."""
    batch, length, channels, height, width = features.shape
    parts, energy, eps = options
    dtype = sums_dtype(features.dtype)
    sums = module.empty((batch, length, parts, channels), dtype=dtype)
    shares = module.empty((batch, length, parts), dtype=dtype)
    attention = module.empty((batch, length, height, width), dtype=dtype)
    totals = module.empty((batch, length), dtype=dtype)
    if batch:
        readable = native_map(module, features, is_channels_last(features, 2), 2)  # to live as long as the call
        address, strides = view_of(module, readable)
        view = address, (strides[0], strides[2], strides[1], *strides[3:])  # [batch, channel, frame, row, column]
        shape = batch, length, channels, height, width, parts
        code = FLOATING[features.dtype.name]
        results = (address_of(module, x) for x in (sums, shares, attention, totals))
        arguments = shape, code, energy, eps, view, *results
        if module is np:
            native().spatial_temporal_sums(*arguments, threads)
        else:
            run_cuda(module, _SUMS, (shape, code, view), arguments)
    return sums, shares, attention


def _pool(
    module: Any, shape: tuple[int, ...], dtype: Any, eps: float, sums: Any, shares: Any, threads: int
) -> tuple[Any, Any, Any]:
    batch, length, channels, _, _, parts = shape
    pooled = module.empty((batch, 2 * channels), dtype=dtype)
    scores = module.empty((batch, length, parts), dtype=sums.dtype)
    frames = module.empty((batch, parts), dtype=np.int64)
    part_totals = module.empty((batch, parts), dtype=sums.dtype)
    if batch:
        code = FLOATING[dtype.name]
        addresses = (address_of(module, x) for x in (sums, shares, pooled, scores, frames, part_totals))
        arguments = shape, code, eps, *addresses
        if module is np:
            native().spatial_temporal_attention_from_sums(*arguments, threads)
        else:
            run_cuda(module, _FROM_SUMS, (shape, code), arguments)
    return pooled, scores, frames
