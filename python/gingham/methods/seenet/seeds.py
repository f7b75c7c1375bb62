"""Seed labels for a segmentation network, from attention and a saliency map.

Two rules: that of the authors' next method (OAA's public script), which is fully known, and the paper's Algorithm 1,
whose formula is not confirmed. Labels are 0 for background, class + 1 for a class, 255 for pixels that are left open.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_EPSILON = 1e-8
_OPEN = 255


@dataclass(frozen=True)
class SeedRule:
    """When a pixel is labelled by `confident_labels`; all on the scale 0 to 1.

    Args:
        least: scores below it do not count.
        sure: where two classes, background included, are above it, the pixel is left open.
        attended: a pixel with attention above it is no background.
        salient: neither is one of at least this saliency.
        least_share: of an image's pixels that must be labelled as an object; otherwise the image is left open.

    Raises:
        ValueError: a number outside 0 to 1.

    Source: OAA's public script.
    """

    least: float = 0.3
    sure: float = 0.9
    attended: float = 0.8
    salient: float = 32 / 255
    least_share: float = 0.01

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value}")


@torch.no_grad()
def confident_labels(
    attention: Tensor, tags: Tensor, saliency: Tensor | None = None, rule: SeedRule | None = None
) -> Tensor:
    """Label what one class alone is sure of, and leave the rest open.

    Args:
        attention: [B, C, H, W], 0 to 1.
        tags: [B, C], above 0 where an image has the class; others get no pixel.
        saliency: [B, H, W], 0 to 1; None takes the strongest attention in its place.
        rule: the thresholds.

    Returns:
        [B, H, W] int64.

    Raises:
        ValueError: shapes that do not fit.

    Source: OAA's public script; without saliency the rule is ours.

    Example:
        >>> attention = torch.tensor([[[[1.0, 0.6, 0.2, 0.0]]]])
        >>> confident_labels(attention, torch.tensor([[1]]), torch.tensor([[[1.0, 0.9, 0.5, 0.0]]]))
        tensor([[[  1,   1, 255,   0]]])
    """
    rule = rule or SeedRule()
    saliency = _saliency(attention, tags, saliency)
    least = attention.amin((-2, -1), keepdim=True)
    spread = attention.amax((-2, -1), keepdim=True) - least
    objects = (attention - least) / (spread + _EPSILON) * (tags > 0)[..., None, None]
    scores = torch.cat([1 - saliency[:, None], objects], dim=1)
    scores = scores.masked_fill(scores < rule.least, 0)
    labels = scores.argmax(dim=1)
    sure_of_one = (scores > rule.sure).sum(dim=1) <= 1
    may_be_object = (saliency >= rule.salient) | (objects > rule.attended).any(dim=1)
    labels = labels.masked_fill(~sure_of_one | ((labels == 0) & may_be_object), _OPEN)
    share = ((labels > 0) & (labels < _OPEN)).float().mean(dim=(-2, -1), keepdim=True)
    return labels.masked_fill(share < rule.least_share, _OPEN)


def harmonic_mean(attention: Tensor, saliency: Tensor, weight: float = 1.0) -> Tensor:
    """The weighted harmonic mean of attention and saliency, 0 where either is 0.

    Args:
        attention: any shape, 0 or more.
        saliency: of a shape that goes with it.
        weight: of the attention, above 0; that of the saliency is 1.

    Raises:
        ValueError: a weight not above 0.

    Example:
        >>> harmonic_mean(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.5, 1.0, 1.0]))
        tensor([0.5000, 0.6667, 0.0000])
    """
    require_weight(weight)
    product = attention * saliency
    return torch.where(product > 0, (weight + 1) * product / (weight * saliency + attention), 0)


def require_weight(weight: float) -> float:
    """Return the weight of an attention, or raise a ValueError where it is not above 0, or not finite."""
    if not 0 < weight < math.inf:
        raise ValueError(f"weight must be above 0, got {weight}")
    return weight


@torch.no_grad()
def harmonic_labels(attention: Tensor, tags: Tensor, saliency: Tensor | None = None, weight: float = 1.0) -> Tensor:
    """Label every pixel: background by what is not salient, a class by the harmonic mean of attention and saliency.

    Args:
        attention: [B, C, H, W], 0 to 1.
        tags: [B, C], above 0 where an image has the class; others get no pixel.
        saliency: [B, H, W], 0 to 1; None takes the strongest attention in its place.
        weight: of the attention.

    Returns:
        [B, H, W] int64, no pixel left open.

    Raises:
        ValueError: shapes that do not fit, or a weight not above 0.

    Source: the paper's Algorithm 1; its existence and its inputs are confirmed, the formula is not.

    Example:
        >>> attention = torch.tensor([[[[1.0, 0.5, 0.1, 0.0]]]])
        >>> harmonic_labels(attention, torch.tensor([[1]]), torch.tensor([[[0.9, 0.6, 0.5, 0.0]]]))
        tensor([[[1, 1, 0, 0]]])
    """
    saliency = _saliency(attention, tags, saliency)[:, None]
    objects = harmonic_mean(attention, saliency, weight) * (tags > 0)[..., None, None]
    return torch.cat([1 - saliency, objects], dim=1).argmax(dim=1)


def _saliency(attention: Tensor, tags: Tensor, saliency: Tensor | None) -> Tensor:
    if attention.dim() != 4 or tags.shape != attention.shape[:2]:
        raise ValueError(
            f"tags must be [B, C] for attention [B, C, H, W], got {list(tags.shape)} and {list(attention.shape)}"
        )
    if saliency is None:
        return (attention * (tags > 0)[..., None, None]).amax(dim=1)
    if saliency.shape != (attention.shape[0], *attention.shape[2:]):
        raise ValueError(
            f"saliency must be [B, H, W] for attention [B, C, H, W], got {list(saliency.shape)} and "
            f"{list(attention.shape)}"
        )
    return saliency
