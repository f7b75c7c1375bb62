"""What every segmentation loss is made of: upsampled logits, cross-entropy without ignored pixels, hard pixels.

Pure functions on tensors; K classes, labels int64, ignored pixels carry `ignore_index`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gingham.errors import DataError


@dataclass(frozen=True)
class HardPixels:
    """Which pixels count as hard (online hard example mining, OHEM).

    Args:
        threshold: pixels whose true class has at most this probability are hard, in [0, 1].
        min_kept: the threshold rises until about this many pixels of the mini-batch of one process are kept.
        shrink: the threshold is found on maps shrunk by this factor, 1 or more.

    Raises:
        ValueError: a number outside its range.

    Source: CCNet's official code, with the values of its README (not the defaults of its train.py).
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


def upsample_logits(logits: Tensor, size: tuple[int, int] | torch.Size, *, align_corners: bool = True) -> Tensor:
    """Resize logits bilinearly to the size of the labels.

    Args:
        logits: [B, K, h, w].
        size: (H, W).
        align_corners: as in `torch.nn.functional.interpolate`.

    Returns:
        [B, K, H, W].

    Example:
        >>> upsample_logits(torch.tensor([[[[0.0, 1.0]]]]), (1, 3))
        tensor([[[[0.0000, 0.5000, 1.0000]]]])
    """
    if logits.shape[-2:] == tuple(size):
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=align_corners)


def widened(maps: Tensor) -> Tensor:
    """Maps of 16 bits in float32, where sums over the pixels of a batch do not overflow; others as they are.

    Args:
        maps: floating, of any shape.

    Returns:
        Of the same shape, float32 or float64.

    Example:
        >>> widened(torch.ones(2, dtype=torch.float16)).dtype, widened(torch.ones(2, dtype=torch.float64)).dtype
        (torch.float32, torch.float64)
    """
    return maps.float() if maps.dtype in (torch.float16, torch.bfloat16) else maps


def shrink_labels(labels: Tensor, size: tuple[int, int] | torch.Size, *, align_corners: bool = True) -> Tensor:
    """Labels at a smaller size, each that of the pixel nearest to where a cell of the smaller map lies.

    This is the grid that `upsample_logits` maps the features to; with aligned corners, 769 rows shrink to 97 by taking
    every eighth. Of two pixels equally near, the later one is taken.

    Args:
        labels: [B, H, W].
        size: (h, w).
        align_corners: how the smaller map lies on the labels.

    Returns:
        [B, h, w], values of `labels`.

    Example:
        >>> shrink_labels(torch.arange(9).reshape(1, 1, 9), (1, 3))
        tensor([[[0, 4, 8]]])
    """
    rows = _nearest_indices(labels.shape[-2], size[0], align_corners, labels.device)
    columns = _nearest_indices(labels.shape[-1], size[1], align_corners, labels.device)
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

    Source: CCNet's official code, its loss with OHEM. The shrinking has the grid of ``scipy.ndimage.zoom``, without the
    zeros that the official call leaves in the last row or column of some sizes.

    Example:
        >>> logits = torch.tensor([[[[5.0, 0.0]], [[0.0, 0.0]]]])
        >>> hard_pixel_labels(logits, torch.zeros(1, 1, 2, dtype=torch.int64), HardPixels(min_kept=0))
        tensor([[[255,   0]]])
    """
    check_labels(logits, labels, ignore_index, same_size=True)
    selection = selection or HardPixels()
    probabilities = logits.detach().float().softmax(dim=1)
    threshold = _hard_threshold(probabilities, labels, selection, ignore_index)
    valid = labels != ignore_index
    true_class = labels.masked_fill(~valid, 0).unsqueeze(1)
    easy = probabilities.gather(1, true_class).squeeze(1) > threshold
    return labels.masked_fill(easy, ignore_index)


def cross_entropy(logits: Tensor, labels: Tensor, *, soft: Tensor | None = None, ignore_index: int = 255) -> Tensor:
    """Mean cross-entropy over the pixels that are not ignored, 0 (with a gradient of 0) where there are none.

    Args:
        logits: [B, K, H, W].
        labels: [B, H, W].
        soft: [B, K, H, W], probabilities to learn in place of `labels`, which then only say what is ignored. The result
            is the mean divergence KL(soft || softmax(logits)): its gradient is that of the cross-entropy.
        ignore_index: label of ignored pixels.

    Returns:
        Scalar, float64 for float64 logits and else float32.

    Raises:
        DataError: a label that counts is no class, or the shapes or the type do not fit.

    Example:
        >>> cross_entropy(torch.zeros(1, 4, 2, 2), torch.full((1, 2, 2), 255))
        tensor(0.)
        >>> unsure, first = torch.full((1, 4, 1, 1), 0.25), torch.zeros(1, 1, 1, dtype=torch.int64)
        >>> cross_entropy(torch.zeros(1, 4, 1, 1), first, soft=unsure)
        tensor(0.)
    """
    if soft is None:
        check_labels(logits, labels, ignore_index, same_size=True)
    elif soft.shape != logits.shape or labels.shape != logits[:, 0].shape:
        raise DataError(
            f"logits and soft must be [B, K, H, W] alike and labels [B, H, W], got {list(logits.shape)}, "
            f"{list(soft.shape)} and {list(labels.shape)}"
        )
    logits, valid = widened(logits), labels != ignore_index
    if soft is None:
        total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    else:
        divergence = F.kl_div(logits.log_softmax(dim=1), soft, reduction="none").sum(dim=1)
        total = divergence.masked_fill(~valid, 0).sum()
    return total / valid.sum().clamp(min=1)


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


def _nearest_indices(extent: int, size: int, align_corners: bool, device: torch.device) -> Tensor:
    """Nearest source index of each of `size` positions spread over `extent`, halves up."""
    position = torch.arange(size, device=device)
    if not align_corners:
        return (2 * position + 1) * extent // (2 * size)  # the floor of a cell's centre is the pixel that it lies in
    if size == 1:
        return position
    return (2 * position * (extent - 1) + (size - 1)) // (2 * (size - 1))


def check_labels(logits: Tensor, labels: Tensor, ignore_index: int = 255, *, same_size: bool = False) -> None:
    """Raise where labels do not fit logits.

    Args:
        logits: [B, K, h, w].
        labels: [B, H, W].
        ignore_index: label of ignored pixels.
        same_size: whether h, w must be H, W.

    Raises:
        DataError: a label is neither a class nor `ignore_index`, or the shapes or the type do not fit.
    """
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
