"""The losses of CCNet: cross-entropy with an auxiliary term, hard-pixel selection, the category-consistent loss.

Paper: Huang et al., CCNet: Criss-Cross Attention for Semantic Segmentation, https://arxiv.org/abs/1811.11721.
Pure functions on tensors; K classes, labels int64, ignored pixels carry `ignore_index`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gingham.errors import DataError
from gingham.methods.ccnet.network import SegmentationOutput


@dataclass(frozen=True)
class HardPixels:
    """Which pixels count as hard (online hard example mining, OHEM).

    Args:
        threshold: pixels whose true class has at most this probability are hard, in [0, 1].
        min_kept: the threshold rises until about this many pixels of the mini-batch of one process are kept.
        shrink: the threshold is found on maps shrunk by this factor, 1 or more.

    Raises:
        ValueError: a number outside its range.

    Source: the official code, with the values of its README (not the defaults of its train.py).
    """

    threshold: float = 0.7
    min_kept: int = 100_000
    shrink: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be between 0 and 1, got {self.threshold}")
        if self.min_kept < 0:
            raise ValueError(f"min_kept must not be negative, got {self.min_kept}")
        if self.shrink < 1:
            raise ValueError(f"shrink must be 1 or more, got {self.shrink}")


class CategoryConsistentLoss(NamedTuple):
    """The three terms of the category-consistent loss, scalars."""

    variance: Tensor  # features of a class are drawn to their mean
    distance: Tensor  # means of different classes are pushed apart
    regularity: Tensor  # means are kept near the origin


def upsample_logits(logits: Tensor, size: tuple[int, int] | torch.Size, *, align_corners: bool = True) -> Tensor:
    """Resize logits bilinearly to the size of the labels.

    Args:
        logits: [B, K, h, w].
        size: (H, W).
        align_corners: as in `torch.nn.functional.interpolate`; True in the official code.

    Returns:
        [B, K, H, W].

    Example:
        >>> upsample_logits(torch.tensor([[[[0.0, 1.0]]]]), (1, 3))
        tensor([[[[0.0000, 0.5000, 1.0000]]]])
    """
    if logits.shape[-2:] == tuple(size):
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=align_corners)


def shrink_labels(labels: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Labels at a smaller size, by the nearest pixel of the grid whose corners are aligned.

    This is the grid that `upsample_logits` maps the features to, so 769 rows shrink to 97 by taking every eighth.

    Args:
        labels: [B, H, W].
        size: (h, w).

    Returns:
        [B, h, w], values of `labels`.

    Example:
        >>> shrink_labels(torch.arange(9).reshape(1, 1, 9), (1, 3))
        tensor([[[0, 4, 8]]])
    """
    rows = _nearest_indices(labels.shape[-2], size[0], labels.device)
    columns = _nearest_indices(labels.shape[-1], size[1], labels.device)
    return labels[..., rows[:, None], columns]


def hard_pixel_labels(
    logits: Tensor, labels: Tensor, selection: HardPixels | None = None, *, ignore_index: int = 255
) -> Tensor:
    """Labels in which every easy pixel is ignored (online hard example mining).

    A pixel is hard when the probability of its true class is at most a threshold: 1 (keep all) if the shrunk map has
    no more valid pixels than are to be kept, else the k-th smallest probability of the shrunk map, but at least
    ``selection.threshold``, with k = min_kept // shrink**2.

    Args:
        logits: [B, K, H, W], at the size of the labels.
        labels: [B, H, W].
        selection: threshold, number to keep and shrinking; the values of the official README by default.
        ignore_index: label of ignored pixels, and of those that are easy in the result.

    Returns:
        [B, H, W].

    Raises:
        DataError: a label is neither a class nor `ignore_index`, or the shapes do not fit.

    Source: the official code (CCNet, loss with OHEM). The shrinking has the grid of ``scipy.ndimage.zoom``, without the
    zeros that the official call leaves in the last row or column of some sizes.

    Example:
        >>> logits = torch.tensor([[[[5.0, 0.0]], [[0.0, 0.0]]]])
        >>> hard_pixel_labels(logits, torch.zeros(1, 1, 2, dtype=torch.int64), HardPixels(min_kept=0))
        tensor([[[255,   0]]])
    """
    _check_labels(logits, labels, ignore_index, same_size=True)
    selection = selection or HardPixels()
    probabilities = logits.detach().float().softmax(dim=1)
    threshold = _hard_threshold(probabilities, labels, selection, ignore_index)
    valid = labels != ignore_index
    true_class = labels.masked_fill(~valid, 0).unsqueeze(1)
    easy = probabilities.gather(1, true_class).squeeze(1) > threshold
    return labels.masked_fill(easy, ignore_index)


def cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Mean cross-entropy over the pixels that are not ignored, 0 (with a gradient of 0) where there are none.

    Args:
        logits: [B, K, H, W].
        labels: [B, H, W].
        ignore_index: label of ignored pixels.

    Returns:
        Scalar.

    Example:
        >>> cross_entropy(torch.zeros(1, 4, 2, 2), torch.full((1, 2, 2), 255))
        tensor(0.)
    """
    total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)


def segmentation_loss(
    output: SegmentationOutput,
    labels: Tensor,
    *,
    hard_pixels: HardPixels | None = None,
    auxiliary_weight: float = 0.4,
    ignore_index: int = 255,
    align_corners: bool = True,
) -> Tensor:
    """Cross-entropy of the upsampled logits plus that of the auxiliary head.

    Args:
        output: of the network; its auxiliary logits may be absent.
        labels: [B, H, W].
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
    _check_labels(output.logits, labels, ignore_index)
    size = labels.shape[-2:]
    logits = upsample_logits(output.logits, size, align_corners=align_corners)
    main_labels = labels
    if hard_pixels is not None:
        main_labels = hard_pixel_labels(logits, labels, hard_pixels, ignore_index=ignore_index)
    loss = cross_entropy(logits, main_labels, ignore_index=ignore_index)
    if output.auxiliary is not None:
        auxiliary = upsample_logits(output.auxiliary, size, align_corners=align_corners)
        loss = loss + auxiliary_weight * cross_entropy(auxiliary, labels, ignore_index=ignore_index)
    return loss


def category_consistent_loss(
    features: Tensor,
    labels: Tensor,
    *,
    variance_margin: float = 0.5,
    distance_margin: float = 1.5,
    ignore_index: int = 255,
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
    flat_labels = shrink_labels(labels, features.shape[-2:]).flatten()
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


def _hard_threshold(probabilities: Tensor, labels: Tensor, selection: HardPixels, ignore_index: int) -> float | Tensor:
    # Python's round, not floor: the size that scipy.ndimage.zoom gives
    size = tuple(max(1, round(extent / selection.shrink)) for extent in labels.shape[-2:])
    small_labels = shrink_labels(labels, (size[0], size[1]))
    small = F.interpolate(probabilities, size=size, mode="bilinear", align_corners=True)
    valid = small_labels != ignore_index
    of_true_class = small.gather(1, small_labels.masked_fill(~valid, 0).unsqueeze(1)).squeeze(1)[valid]
    kept = selection.min_kept // selection.shrink**2
    if kept >= len(of_true_class):
        return 1.0
    if kept == 0:
        return selection.threshold
    return of_true_class.kthvalue(kept).values.clamp(min=selection.threshold)


def _nearest_indices(extent: int, size: int, device: torch.device) -> Tensor:
    """Nearest source index of each of `size` positions spread over `extent` with aligned corners, halves up."""
    position = torch.arange(size, device=device)
    if size == 1:
        return position
    return (2 * position * (extent - 1) + (size - 1)) // (2 * (size - 1))


def _check_labels(logits: Tensor, labels: Tensor, ignore_index: int, *, same_size: bool = False) -> None:
    if logits.dim() != 4 or labels.dim() != 3 or logits.shape[0] != labels.shape[0]:
        raise DataError(
            f"logits must be [B, K, h, w] and labels [B, H, W], got {list(logits.shape)} and {list(labels.shape)}"
        )
    if same_size and logits.shape[-2:] != labels.shape[-2:]:
        raise DataError(f"logits are {list(logits.shape[-2:])} and labels {list(labels.shape[-2:])}: sizes differ")
    if labels.dtype != torch.int64:
        raise DataError(f"labels must be int64, got {labels.dtype}")
    classes = logits.shape[1]
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != ignore_index)]
    if len(wrong):
        raise DataError(
            f"labels contain the value {int(wrong[0])}, which is neither a class (0 to {classes - 1}) "
            f"nor ignore_index {ignore_index}"
        )
