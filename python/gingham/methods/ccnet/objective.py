"""The losses of CCNet: cross-entropy with an auxiliary term, hard-pixel selection, the category-consistent loss.

Paper: Huang et al., CCNet: Criss-Cross Attention for Semantic Segmentation, https://arxiv.org/abs/1811.11721.
Pure functions on tensors; K classes, labels int64, ignored pixels carry `ignore_index`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gingham.errors import DataError
from gingham.methods.ccnet.network import SegmentationOutput
from gingham.nn.segmentation_loss import (
    HardPixels,
    check_labels,
    cross_entropy,
    hard_pixel_labels,
    shrink_labels,
    upsample_logits,
)


class CategoryConsistentLoss(NamedTuple):
    """The three terms of the category-consistent loss, scalars."""

    variance: Tensor  # features of a class are drawn to their mean
    distance: Tensor  # means of different classes are pushed apart
    regularity: Tensor  # means are kept near the origin


def segmentation_loss(
    output: SegmentationOutput,
    labels: Tensor,
    *,
    soft: Tensor | None = None,
    hard_pixels: HardPixels | None = None,
    auxiliary_weight: float = 0.4,
    ignore_index: int = 255,
    align_corners: bool = True,
) -> Tensor:
    """Cross-entropy of the upsampled logits plus that of the auxiliary head.

    Args:
        output: of the network; its auxiliary logits may be absent.
        labels: [B, H, W].
        soft: None, or probabilities [B, K, H, W] to learn in place of the labels, as self-correction gives them.
        hard_pixels: None, or the selection of pixels that count in the main term (the auxiliary term counts all).
        auxiliary_weight: weight of the auxiliary term.
        ignore_index: label of ignored pixels.
        align_corners: of the upsampling.

    Returns:
        Scalar.

    Raises:
        DataError: a label is neither a class nor `ignore_index`, or the shapes do not fit.

    Source: the official code.

    Example:
        >>> output = SegmentationOutput(torch.zeros(1, 4, 3, 3), None, torch.zeros(1, 8, 3, 3))
        >>> segmentation_loss(output, torch.zeros(1, 9, 9, dtype=torch.int64))
        tensor(1.3863)
    """
    check_labels(output.logits, labels, ignore_index)
    size = labels.shape[-2:]
    logits = upsample_logits(output.logits, size, align_corners=align_corners)
    main_labels = labels
    if hard_pixels is not None:
        main_labels = hard_pixel_labels(logits, labels, hard_pixels, ignore_index=ignore_index)
    loss = cross_entropy(logits, main_labels, soft=soft, ignore_index=ignore_index)
    if output.auxiliary is not None:
        auxiliary = upsample_logits(output.auxiliary, size, align_corners=align_corners)
        loss = loss + auxiliary_weight * cross_entropy(auxiliary, labels, soft=soft, ignore_index=ignore_index)
    return loss


def category_consistent_loss(
    features: Tensor,
    labels: Tensor,
    *,
    variance_margin: float = 0.5,
    distance_margin: float = 1.5,
    ignore_index: int = 255,
    align_corners: bool = True,
) -> CategoryConsistentLoss:
    """Draw the features of a class together and the means of different classes apart.

    The means are taken over all pixels of the mini-batch in this process and carry gradients. The training objective
    is the segmentation loss + variance + distance + 0.001 * regularity.

    Args:
        features: [B, C, h, w].
        labels: [B, H, W], brought to (h, w) by `shrink_labels`; any integers are classes.
        variance_margin: delta_v, distance to the mean below which a pixel costs nothing.
        distance_margin: delta_d; means further apart than twice this cost nothing, and pixels further than this from
            their mean cost linearly.
        ignore_index: label of ignored pixels.
        align_corners: how the features lie on the labels.

    Returns:
        Three scalars; the second is 0 with a single class, all are 0 with none.

    Raises:
        DataError: the shapes do not fit.

    Source: CCNet, journal version, section 3.3. Margins as reported there; that the means are per process and carry
    gradients, and that labels are shrunk by nearest neighbour, is not confirmed.

    Example:
        >>> features = torch.tensor([[0.0, 0.0], [1.0, 0.0]]).T.reshape(1, 2, 1, 2)
        >>> [float(term) for term in category_consistent_loss(features, torch.tensor([[[3, 7]]]))]
        [0.0, 4.0, 0.5]
    """
    if features.dim() != 4 or labels.dim() != 3 or features.shape[0] != labels.shape[0]:
        raise DataError(
            f"features must be [B, C, h, w] and labels [B, H, W], got {list(features.shape)} and {list(labels.shape)}"
        )
    accumulator = torch.float64 if features.dtype == torch.float64 else torch.float32
    pixels = features.to(accumulator).movedim(1, -1).flatten(0, 2)  # [N, C]
    flat_labels = shrink_labels(labels, features.shape[-2:], align_corners=align_corners).flatten()
    valid = flat_labels != ignore_index
    pixels = pixels[valid]
    classes, index, counts = flat_labels[valid].unique(return_inverse=True, return_counts=True)
    number = len(classes)
    if number == 0:
        zero = features.sum() * 0
        return CategoryConsistentLoss(zero, zero, zero)
    counts = counts.to(accumulator)
    means = pixels.new_zeros(number, pixels.shape[1]).index_add(0, index, pixels) / counts[:, None]
    # vector_norm has gradient 0 at distance 0, where sqrt of a sum of squares has NaN
    to_mean = torch.linalg.vector_norm(means[index] - pixels, dim=1)
    spread = variance_penalty(to_mean, variance_margin, distance_margin)
    variance = (spread / counts[index]).sum() / number
    regularity = torch.linalg.vector_norm(means, dim=1).mean()
    if number == 1:
        return CategoryConsistentLoss(variance, means.sum() * 0, regularity)
    first, second = torch.triu_indices(number, number, offset=1, device=means.device)
    between = torch.linalg.vector_norm(means[first] - means[second], dim=1)
    distance = distance_penalty(between, distance_margin).mean()  # over unordered pairs: the mean is the same
    return CategoryConsistentLoss(variance, distance, regularity)


def variance_penalty(distance: Tensor, variance_margin: float = 0.5, distance_margin: float = 1.5) -> Tensor:
    """phi_var: 0 up to delta_v, quadratic up to delta_d, linear beyond.

    Continuous, with a kink at delta_d (slope 2 before, 1 after, with the default margins), as the paper has it.

    Example:
        >>> variance_penalty(torch.tensor([0.25, 1.0, 1.5, 2.5]))
        tensor([0.0000, 0.2500, 1.0000, 2.0000])
    """
    quadratic = (distance - variance_margin).clamp(min=0) ** 2
    linear = distance - distance_margin + (distance_margin - variance_margin) ** 2
    return torch.where(distance > distance_margin, linear, quadratic)


def distance_penalty(distance: Tensor, distance_margin: float = 1.5) -> Tensor:
    """phi_dis: (2 delta_d - d)^2 up to 2 delta_d, 0 beyond.

    Example:
        >>> distance_penalty(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]))
        tensor([9., 4., 1., 0., 0.])
    """
    return (2 * distance_margin - distance).clamp(min=0) ** 2
