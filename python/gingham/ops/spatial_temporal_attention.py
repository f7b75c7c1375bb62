"""Spatial-temporal attention (Fu et al., STA, https://arxiv.org/abs/1811.04129) as torch functions.

`spatial_temporal_attention` takes whole clips. Where a frame belongs to many clips, as those of a long tracklet may,
`spatial_temporal_sums` reads its features once, and `spatial_temporal_attention_from_sums` makes clips of the frames.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gingham import reference
from gingham.ops._register import (
    LEAST_DIVISOR,
    Registered,
    as_float,
    check_eps,
    check_like,
    check_tensor,
    check_whole_number,
    describe,
    empty_map,
    is_channels_last,
    promote,
    sums_dtype,
)

_NAME, _SUMS, _FROM_SUMS = (
    "spatial_temporal_attention",
    "spatial_temporal_sums",
    "spatial_temporal_attention_from_sums",
)
_ENERGIES = {"sq": 0, "l2": 1, "agrl": 2}  # gingham::SpatialEnergy
_NAMES = tuple(_ENERGIES)


def spatial_temporal_attention(
    features: Tensor,
    parts: int = 4,
    *,
    energy: str = "sq",
    eps: float = 1e-12,
    detach_attention: bool = False,
    return_map: bool = False,
) -> tuple[Tensor, ...]:
    """One vector for a clip: of each body part its best frame, and the frames by their scores, part by part.

    Source: Fu et al., STA, AAAI 2019, https://arxiv.org/abs/1811.04129, section 3.

    A frame's attention map is the energy of its features, position by position, as a share of the frame's. A part is a
    band of rows; its score in a frame is what the map gives it there, relative to the other frames, so that a part's
    scores sum to 1. Two maps are made of the clip: one takes each band from the frame where it scores highest, the
    other is the sum of all frames, band by band, by their scores. The result is the mean of both, over all positions.

    The features are read once, and once more in backward; the two maps are never formed.

    Args:
        features: [B, T, C, H, W], clips of T frames, at least one, of at least one row and column; float32, float64,
            float16 or bfloat16, on CPU or CUDA, with any strides (maps whose columns or channels are adjacent in memory
            are read in place).
        parts: K, number of bands, 1 to H. Band k has the rows from ``k * H // K`` to ``(k + 1) * H // K``, so that
            bands share no row; where K does not divide H, their heights differ.
        energy: "sq", the squared norm over channels, as the paper's formula says: the map sums to 1. "l2", the norm:
            the map sums to 1. "agrl", the norm: the map has an L2 norm of 1, and a band gets its mean, as in the code
            of AGRL, which is by another author.
        eps: totals of energy, of a frame or of a part, are taken for at least this; positive, and no less than the
            smallest normal number of float32 (of float64 for float64). A frame, or a part, whose total is not above
            gets no score where there is no energy, and passes no gradient to its map.
        detach_attention: whether gradients of `pooled` shall not pass through the scores.
        return_map: whether to return the attention map too.

    Returns:
        pooled: [B, 2C] in the dtype of `features`, the best frames' half first.
        scores: [B, T, K], float32 (float64 for float64).
        frames: [B, K], int64: the frame in which each part scores highest, the first of equal ones.
        map: [B, T, H, W], dtype of `scores`; only with `return_map`.

    Note:
        With "sq" and "l2" a frame's shares sum to 1. So with one part all scores are 1 / T, and what an occluded part
        of a frame loses the frame's other parts gain.

    Raises:
        TypeError: `features` is no tensor of a supported floating type, or an option has the wrong type.
        ValueError: the shape of `features`, `parts`, `energy` or `eps` is out of range.

    Example:
        >>> import torch
        >>> pooled, scores, frames = spatial_temporal_attention(torch.rand(2, 4, 64, 16, 8))
        >>> pooled.shape, scores.shape, frames.shape
        (torch.Size([2, 128]), torch.Size([2, 4, 4]), torch.Size([2, 4]))
        >>> scores.sum(dim=1).allclose(torch.ones(2, 4))
        True
    """
    try:
        if (
            type(parts) is not int
            or type(eps) is not float
            or eps < LEAST_DIVISOR
            or type(detach_attention) is not bool
            or type(return_map) is not bool
        ):
            _check_attention(features, parts, energy, eps, detach_attention, return_map)
            eps = as_float(_NAME, "eps", eps)
        results: tuple[Tensor, ...]
        if torch.compiler.is_compiling():
            _check_attention(features, parts, energy, eps, detach_attention, return_map)
        elif not (
            return_map
            or torch._C._are_functorch_transforms_active()
            or (torch.is_grad_enabled() and features.requires_grad)
            or forward_ad._current_level >= 0
        ):
            results = _unrecorded(features, parts, _ENERGIES[energy], eps)
            return results
        results = _attention.call(features, parts, _ENERGIES[energy], eps, detach_attention)
        return results if return_map else results[:3]
    except (RuntimeError, TypeError, AttributeError, KeyError):
        _check_attention(
            features, parts, energy, eps, detach_attention, return_map
        )  # says what is wrong, if that is the reason
        raise


def spatial_temporal_sums(
    features: Tensor, parts: int = 4, *, energy: str = "sq", eps: float = 1e-12
) -> tuple[Tensor, Tensor]:
    """What `spatial_temporal_attention_from_sums` needs of a frame, to be kept for all clips that it is part of.

    Source: Fu et al., STA, AAAI 2019, https://arxiv.org/abs/1811.04129, section 3.

    Args:
        features: [N, C, H, W], N frames; otherwise as of `spatial_temporal_attention`.
        parts: as of `spatial_temporal_attention`.
        energy: as of `spatial_temporal_attention`.
        eps: as of `spatial_temporal_attention`.

    Returns:
        sums: [N, K, C], the sums of the features over each band, float32 (float64 for float64).
        energies: [N, K], same dtype: what each band gets of its frame's attention map (with "agrl" its mean).

    Raises:
        TypeError: `features` is no tensor of a supported floating type, or an option has the wrong type.
        ValueError: the shape of `features`, `parts`, `energy` or `eps` is out of range.

    Example:
        >>> import torch
        >>> frames = torch.rand(9, 64, 16, 8)
        >>> sums, energies = spatial_temporal_sums(frames)
        >>> clip = [0, 3, 8]
        >>> pooled, *_ = spatial_temporal_attention_from_sums(sums[None, clip], energies[None, clip], positions=16 * 8)
        >>> torch.equal(pooled, spatial_temporal_attention(frames[None, clip])[0])
        True
    """
    try:
        if type(parts) is not int or type(eps) is not float or eps < LEAST_DIVISOR:
            _check_sums(features, parts, energy, eps)
            eps = as_float(_SUMS, "eps", eps)
        if torch.compiler.is_compiling():
            _check_sums(features, parts, energy, eps)
        sums, energies = _sums.call(features, parts, _ENERGIES[energy], eps)
        return sums, energies
    except (RuntimeError, TypeError, AttributeError, KeyError):
        _check_sums(features, parts, energy, eps)
        raise


def spatial_temporal_attention_from_sums(
    sums: Tensor, energies: Tensor, positions: int, *, eps: float = 1e-12
) -> tuple[Tensor, Tensor, Tensor]:
    """`spatial_temporal_attention` of clips, from what `spatial_temporal_sums` says of their frames.

    The results are those of `spatial_temporal_attention` to the last bit (of 16-bit features: before `pooled` is
    rounded to their dtype).

    Source: Fu et al., STA, AAAI 2019, https://arxiv.org/abs/1811.04129, section 3.

    Args:
        sums: [B, T, K, C], float32 or float64, with T and K of at least 1.
        energies: [B, T, K], dtype and device of `sums`.
        positions: H * W of the features, at least 1.
        eps: a part's total over the frames is taken for at least this; positive.

    Returns:
        pooled: [B, 2C] in the dtype of `sums`, the best frames' half first.
        scores: [B, T, K], same dtype.
        frames: [B, K], int64: the frame in which each part scores highest, the first of equal ones.

    Raises:
        TypeError: an argument is no tensor of a supported type, or an option has the wrong type.
        ValueError: the shapes or devices do not agree, or `positions` or `eps` is out of range.

    Example:
        >>> import torch
        >>> sums, energies = spatial_temporal_sums(torch.ones(6, 3, 4, 2), parts=2)
        >>> pooled, scores, _ = spatial_temporal_attention_from_sums(
        ...     sums.unflatten(0, (2, 3)), energies.unflatten(0, (2, 3)), positions=4 * 2
        ... )
        >>> pooled[0], scores[0]
        (tensor([1., 1., 1., 1., 1., 1.]), tensor([[0.3333, 0.3333],
                [0.3333, 0.3333],
                [0.3333, 0.3333]]))
    """
    try:
        if type(positions) is not int or type(eps) is not float or eps < LEAST_DIVISOR:
            _check_from_sums(sums, energies, positions, eps)
            eps = as_float(_FROM_SUMS, "eps", eps)
        is_compiling = torch.compiler.is_compiling()
        if is_compiling or torch._C._is_any_autocast_enabled():
            sums, energies = promote((sums, energies))
        if is_compiling:
            _check_from_sums(sums, energies, positions, eps)
        pooled, scores, frames = _from_sums.call(sums, energies, positions, eps)
        return pooled, scores, frames
    except (RuntimeError, TypeError, AttributeError):
        _check_from_sums(sums, energies, positions, eps)
        raise


# ------------------------------------------------------------------------------------------------ checks


def _check_frames(operator: str, layout: str, features: Tensor, parts: Any, energy: Any, eps: Any) -> None:
    check_tensor(operator, "features", features)
    if features.dim() != layout.count(",") + 1:
        raise ValueError(f"{operator}: features must be {layout}, got {describe(features)}")
    axes = [axis for axis in range(1, features.dim()) if axis != features.dim() - 3]
    if any(features.size(axis) == 0 for axis in axes):
        raise ValueError(f"{operator}: features must have at least one frame, row and column, got {describe(features)}")
    check_whole_number(operator, "parts", parts)
    if not 1 <= parts <= features.size(-2):
        raise ValueError(f"{operator}: parts must be 1 to the {features.size(-2)} rows of features, got {parts}")
    if not isinstance(energy, str):
        raise TypeError(f"{operator}: energy must be a string, got {describe(energy)}")
    if energy not in _ENERGIES:
        raise ValueError(f'{operator}: energy must be "sq", "l2" or "agrl", got {energy!r}')
    check_eps(operator, eps, positive=True, divides=sums_dtype(features))


def _check_attention(
    features: Tensor, parts: Any, energy: Any, eps: Any, detach_attention: Any, return_map: Any = False
) -> None:
    name = _NAME
    _check_frames(name, "[B, T, C, H, W]", features, parts, energy, eps)
    for option, value in (("detach_attention", detach_attention), ("return_map", return_map)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: {option} must be a bool, got {describe(value)}")


def _check_sums(features: Tensor, parts: Any, energy: Any, eps: Any) -> None:
    _check_frames(_SUMS, "[N, C, H, W]", features, parts, energy, eps)


def _check_from_sums(sums: Tensor, energies: Tensor, positions: Any, eps: Any) -> None:
    name = _FROM_SUMS
    for argument, x in (("sums", sums), ("energies", energies)):
        check_tensor(name, argument, x, (torch.float32, torch.float64))
    check_like(name, "energies", energies, "sums", sums)
    if sums.dim() != 4 or sums.size(1) == 0 or sums.size(2) == 0:
        raise ValueError(f"{name}: sums must be [B, T, K, C] with at least one frame and part, got {describe(sums)}")
    if energies.shape != sums.shape[:3]:
        raise ValueError(f"{name}: energies must be {list(sums.shape[:3])} to match sums, got {describe(energies)}")
    check_whole_number(name, "positions", positions)
    if not 1 <= positions < 2**63:
        raise ValueError(f"{name}: positions must be at least 1 and fit 64 bits, got {positions}")
    check_eps(name, eps, positive=True, divides=sums.dtype)


# ------------------------------------------------------------------------------------------------ registration


def _energy_name(operator: str, energy: int) -> str:
    if not 0 <= energy < len(_NAMES):
        raise ValueError(f"{operator}: energy must be 0, 1 or 2, got {energy}")
    return _NAMES[energy]


def _fake_gradient(features: Tensor) -> Tensor:
    channel = features.dim() - 3
    return empty_map(features.shape, features, is_channels_last(features, channel), channel)


def _fake_attention(features: Tensor, parts: int, energy: int, eps: float, detach_attention: bool) -> Any:
    _check_attention(features, parts, _energy_name(_NAME, energy), eps, detach_attention)
    batch, length, channels, height, width = features.shape
    dtype = sums_dtype(features)
    return (
        features.new_empty(batch, 2 * channels),
        features.new_empty(batch, length, parts, dtype=dtype),
        features.new_empty(batch, parts, dtype=torch.int64),
        features.new_empty(batch, length, height, width, dtype=dtype),
        features.new_empty(batch, length, parts, channels, dtype=dtype),
        features.new_empty(batch, length, dtype=dtype),
        features.new_empty(batch, parts, dtype=dtype),
    )


def _fake_unrecorded(features: Tensor, parts: int, energy: int, eps: float) -> Any:
    return _fake_attention(features, parts, energy, eps, False)[:3]


def _fake_attention_backward(
    grad_pooled: Tensor, grad_scores: Tensor, grad_map: Tensor, features: Tensor, *others: Any
) -> Tensor:
    return _fake_gradient(features)


def _define_attention(features: Tensor, parts: int, energy: int, eps: float, detach_attention: bool) -> Any:
    pooled, scores, _, attention = reference.spatial_temporal_attention(
        features, parts, energy=_NAMES[energy], eps=eps, detach_attention=detach_attention, return_map=True
    )
    return pooled, scores, attention


def _fake_sums(features: Tensor, parts: int, energy: int, eps: float) -> Any:
    _check_sums(features, parts, _energy_name(_SUMS, energy), eps)
    batch, channels, height, width = features.shape
    dtype = sums_dtype(features)
    return (
        features.new_empty(batch, parts, channels, dtype=dtype),
        features.new_empty(batch, parts, dtype=dtype),
        features.new_empty(batch, height, width, dtype=dtype),
        features.new_empty(batch, dtype=dtype),
    )


def _fake_sums_backward(grad_sums: Tensor, grad_energies: Tensor, features: Tensor, *others: Any) -> Tensor:
    return _fake_gradient(features)


def _define_sums(features: Tensor, parts: int, energy: int, eps: float) -> Any:
    return reference.spatial_temporal_sums(features, parts, energy=_NAMES[energy], eps=eps)


def _fake_from_sums(sums: Tensor, energies: Tensor, positions: int, eps: float) -> Any:
    _check_from_sums(sums, energies, positions, eps)
    batch, length, parts, channels = sums.shape
    return (
        sums.new_empty(batch, 2 * channels),
        sums.new_empty(batch, length, parts),
        sums.new_empty(batch, parts, dtype=torch.int64),
        sums.new_empty(batch, parts),
    )


def _fake_from_sums_backward(
    grad_pooled: Tensor, grad_scores: Tensor, sums: Tensor, energies: Tensor, *others: Any
) -> Any:
    return sums.new_empty(sums.shape), energies.new_empty(energies.shape)


def _define_from_sums(sums: Tensor, energies: Tensor, positions: int, eps: float) -> Any:
    return reference.spatial_temporal_attention_from_sums(sums, energies, positions, eps=eps)[:2]


_attention = Registered(
    _NAME,
    tensors=1,
    differentiable=(0,),
    definition=_define_attention,
    fake=_fake_attention,
    fake_backward=_fake_attention_backward,
    outputs=7,
    returned=4,
    without_gradient=(2,),
    kept=(1, 2, 3, 4, 5, 6),
    autocast=promote,
)
torch.library.register_fake("gingham::_spatial_temporal_attention_unrecorded", _fake_unrecorded)
_unrecorded = torch.ops.gingham._spatial_temporal_attention_unrecorded.default._op
_sums = Registered(
    _SUMS,
    tensors=1,
    differentiable=(0,),
    definition=_define_sums,
    fake=_fake_sums,
    fake_backward=_fake_sums_backward,
    outputs=4,
    returned=2,
    kept=(2, 3),
    autocast=promote,
)
_from_sums = Registered(
    _FROM_SUMS,
    tensors=2,
    differentiable=(0, 1),
    definition=_define_from_sums,
    fake=_fake_from_sums,
    fake_backward=_fake_from_sums_backward,
    outputs=4,
    returned=3,
    without_gradient=(2,),
    kept=(1, 2, 3),
    autocast=promote,
)
