"""SeeNet's erasing: the zones of an image by the attention of its tagged classes, and the unit that acts by zone.

Paper: Hou et al., Self-Erasing Network for Integral Object Attention, https://arxiv.org/abs/1810.09821. Masks carry no
gradient; features do.
"""

from typing import Literal

import torch
from torch import Tensor

_EPSILON = 1e-8


@torch.no_grad()
def tag_attention(maps: Tensor, tags: Tensor, *, norm: Literal["range", "max"] = "range") -> Tensor:
    """How strongly each place is attended to by any of the image's tagged classes.

    Each tagged class's map is clipped at 0 and scaled to 0 to 1; the largest of them counts. A map without a positive
    value, and with "range" one of a single value, is 0 everywhere; so is the result for an image without tags.

    Args:
        maps: [B, C, h, w], class maps, any scale.
        tags: [B, C], above 0 where the image has the class.
        norm: scale by the "range" of the clipped map, as the official code does, or by its "max".

    Returns:
        [B, h, w] float32 in 0 to 1.

    Raises:
        ValueError: shapes that do not fit, or an unknown norm.

    Source: the official layer; that the paper divides by the maximum is not confirmed.

    Example:
        >>> maps = torch.tensor([[[[10.0, 5.0], [0.0, -3.0]], [[9.0, 9.0], [9.0, 0.0]]]])
        >>> tag_attention(maps, torch.tensor([[1, 0]]))
        tensor([[[1.0000, 0.5000],
                 [0.0000, 0.0000]]])
    """
    if maps.dim() != 4 or tags.shape != maps.shape[:2]:
        raise ValueError(f"tags must be [B, C] for maps [B, C, h, w], got {list(tags.shape)} and {list(maps.shape)}")
    if norm not in ("range", "max"):
        raise ValueError(f"norm must be 'range' or 'max', got {norm!r}")
    clipped = maps.float().clamp(min=0)
    least, most = clipped.amin((-2, -1), keepdim=True), clipped.amax((-2, -1), keepdim=True)
    if norm == "max":
        least = torch.zeros_like(least)
    scaled = (clipped - least) / (most - least + _EPSILON)
    return (scaled * (tags > 0)[..., None, None]).amax(dim=1)


@torch.no_grad()
def zone_mask(attention: Tensor, high: float, low: float, *, background: Literal[-1, 0, 1] = -1) -> Tensor:
    """The three zones of images: attended (0, erased), background (by default -1, reversed), and potential (1, kept).

    Args:
        attention: [B, h, w] in 0 to 1.
        high: places above it are attended; from 1 on there are none.
        low: places below it are background; up to 0 there are none.
        background: value of the background zone; 0 erases it, 1 keeps it.

    Returns:
        [B, h, w] int8.

    Raises:
        ValueError: low above high, or another background value.

    Source: section 3.2 of the paper; strict comparisons as in the official layer.

    Example:
        >>> zone_mask(torch.tensor([[[1.0, 0.5, 0.01]]]), 0.7, 0.05)
        tensor([[[ 0,  1, -1]]], dtype=torch.int8)
    """
    require_zones(high, low)
    if background not in (-1, 0, 1):
        raise ValueError(f"background must be -1, 0 or 1, got {background}")
    kept = torch.ones_like(attention, dtype=torch.int8)
    return kept.masked_fill(attention > high, 0).masked_fill(attention < low, background)


def require_zones(high: float, low: float) -> None:
    """Raise a ValueError unless `low` is at most `high`, which every pair of thresholds has to fulfil."""
    if not low <= high:
        raise ValueError(f"thresholds must be (high, low) with low at most high, got ({high}, {low})")


@torch.no_grad()
def background_mask(attention: Tensor, threshold: float) -> Tensor:
    """1 where attention is below the threshold, 0 elsewhere: what the branch that may find nothing gets to see.

    Args:
        attention: [B, h, w] in 0 to 1.
        threshold: above 0 for a background at all.

    Returns:
        [B, h, w] int8.

    Source: section 3.2 of the paper, second strategy; its threshold is not confirmed.

    Example:
        >>> background_mask(torch.tensor([[[1.0, 0.5, 0.01]]]), 0.375)
        tensor([[[0, 0, 1]]], dtype=torch.int8)
    """
    return (attention < threshold).to(torch.int8)


def conditional_relu(features: Tensor, mask: Tensor, *, leaky_backward: bool = False) -> Tensor:
    """Rectified features times a mask over places: erased where it is 0, reversed in sign where it is -1 (C-ReLU).

    The gradient is that of ``relu(features) * mask``, once and twice, for any batch size.

    Args:
        features: [B, C, h, w] floating.
        mask: [B, h, w], values -1, 0 and 1; it gets no gradient.
        leaky_backward: pass the gradient on at erased places, in all channels but the first, as the official layer
            does, whose forward is 0 there.

    Returns:
        Like `features`.

    Raises:
        ValueError: shapes that do not fit.

    Source: section 3.1 of the paper, and the official layer for `leaky_backward`.

    Example:
        >>> features = torch.tensor([1.0, 2.0, 3.0, -4.0]).reshape(1, 1, 2, 2)
        >>> conditional_relu(features, torch.tensor([[[0, 1], [-1, -1]]]))
        tensor([[[[ 0.,  2.],
                  [-3., -0.]]]])
    """
    if features.dim() != 4 or mask.shape != (features.shape[0], *features.shape[2:]):
        raise ValueError(
            f"mask must be [B, h, w] for features [B, C, h, w], got {list(mask.shape)} and {list(features.shape)}"
        )
    rectified = features.relu()
    sign = mask[:, None].to(features.dtype)
    output = rectified * sign
    if leaky_backward:
        erased = sign == 0
        output = output + torch.cat(
            [torch.zeros_like(rectified[:, :1]), (rectified - rectified.detach())[:, 1:] * erased], dim=1
        )
    return output
