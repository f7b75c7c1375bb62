"""Masked average pooling (Zhang et al., SG-One, https://arxiv.org/abs/1810.09091)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gingham import reference
from gingham.ops._register import (
    FLOATING,
    Registered,
    check_like,
    check_tensor,
    describe,
    empty_map,
    is_channels_last,
)

MASKS = (*FLOATING, torch.bool, torch.uint8)


def masked_average_pool(features: Tensor, mask: Tensor, *, resize: Literal["features", "mask"] = "features") -> Tensor:
    """The mean of a feature map under a mask of any size.

    Source: Zhang et al., SG-One, IEEE Transactions on Cybernetics 2020, https://arxiv.org/abs/1810.09091 ("masked
    average pooling").

    ``sum(weights * features) / sum(mask)``, where the weights, at the resolution of the features, are what the adjoint
    of bilinear interpolation makes of the mask: the mean of the features as if interpolated to the size of the mask,
    which are never stored.

    Args:
        features: [B, C, h, w]; float32, float64, float16 or bfloat16, on CPU or CUDA, with any strides (maps whose
            columns or channels are adjacent in memory are read in place).
        mask: [B, 1, H, W], larger or smaller than the features, on their device; of any of these dtypes, whatever
            theirs, bool or uint8. Soft masks weigh.
        resize: "features": the features count as interpolated to the size of the mask, as in SG-One. "mask": the mask
            is interpolated to the size of the features instead, another result. Both bilinear with
            ``align_corners=False``.

    Returns:
        [B, C] in the dtype of `features`; zeros, which pass no gradient, where the mask sums to zero. Sums are held in
        float32 (float64 for float64). A mask of floating dtype may require grad.

    Note:
        Features before the first and after the last position with a weight (in row-major order) are not read; in
        memory whose channels are adjacent, none without a weight are. What is not finite there may or may not show.

    Raises:
        TypeError: an argument is no tensor, or a dtype is not supported.
        ValueError: shapes or devices do not agree, or `resize` is neither of the two.

    Example:
        >>> import torch
        >>> features = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).reshape(1, 1, 2, 2)
        >>> masked_average_pool(features, torch.tensor([[False, True], [False, True]]).reshape(1, 1, 2, 2))
        tensor([[2.]])
    """
    try:
        # The type first: what a comparison with an array gives is no truth value.
        if isinstance(resize, str) and resize == "features":
            resize_mask = False
        elif isinstance(resize, str) and resize == "mask":
            resize_mask = True
        else:
            raise ValueError(f"masked_average_pool: resize must be 'features' or 'mask', got {resize!r}")
        if torch.compiler.is_compiling():
            _check(features, mask)
        result: Tensor = _call(features, mask, resize_mask)
        return result
    except (RuntimeError, TypeError, AttributeError):
        _check(features, mask)  # says what is wrong with the arguments, if that is the reason
        raise


def _check(features: Tensor, mask: Tensor) -> None:
    check_tensor("masked_average_pool", "features", features)
    check_tensor("masked_average_pool", "mask", mask, MASKS)
    if features.dim() != 4:
        raise ValueError(f"masked_average_pool: features must be [B, C, h, w], got {describe(features)}")
    check_like("masked_average_pool", "mask", mask, "features", features, dtype=False)
    if mask.dim() != 4 or mask.size(0) != features.size(0) or mask.size(1) != 1:
        raise ValueError(
            f"masked_average_pool: mask must be [{features.size(0)}, 1, H, W] to match features "
            f"{list(features.shape)}, got {describe(mask)}"
        )


# ------------------------------------------------------------------------------------------------ registration


def _as_they_are(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Autocast: sums are held in float32 anyway, and features and mask need not have one dtype."""
    return tensors


def _fake_forward(features: Tensor, mask: Tensor, resize_mask: bool = False) -> Any:
    _check(features, mask)
    batch, channels, height, width = features.shape
    sums = torch.float64 if features.dtype == torch.float64 else torch.float32
    return (
        features.new_empty(batch, channels),
        features.new_empty(batch, height, width, dtype=sums),
        features.new_empty(batch, dtype=sums),
    )


def _fake_backward(
    grad_pooled: Tensor,
    features: Tensor,
    mask: Tensor,
    weights: Tensor,
    total: Tensor,
    resize_mask: bool,
    wanted: int,
) -> Any:
    return (
        empty_map(features.shape, features, is_channels_last(features)) if wanted & 1 else features.new_empty(0),
        mask.new_empty(mask.shape) if wanted & 2 else mask.new_empty(0),
    )


def _definition(features: Tensor, mask: Tensor, resize_mask: bool) -> Tensor:
    return reference.masked_average_pool(features, mask, resize="mask" if resize_mask else "features")


_call = Registered(
    "masked_average_pool",
    tensors=2,
    differentiable=(0, 1),
    definition=_definition,
    fake=_fake_forward,
    fake_backward=_fake_backward,
    outputs=3,
    kept=(1, 2),
    autocast=_as_they_are,
    optional_gradients=True,
).call
