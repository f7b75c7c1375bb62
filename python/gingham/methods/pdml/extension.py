"""PDML's label extension: pixels that the network is sure of become labels, of classes that the image's points name.

The paper's "online extension" is known by name only; this is a rule of its kind, and all its numbers are ours.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gingham.methods.pdml.objective import PointPool


class ExtendedLabels(NamedTuple):
    """Pseudo labels at the resolution of the logits."""

    labels: Tensor  # [B, h, w] int64, `ignore_index` where there is none
    confidence: Tensor  # [B, h, w], the probability of the label's class by the network, 0 where there is no label


@torch.no_grad()
def extend_labels(
    logits: Tensor,
    pool: PointPool,
    size: tuple[int, int] | torch.Size,
    *,
    threshold: float = 0.9,
    largest_share: float = 0.2,
    valid: Tensor | None = None,
    align_corners: bool = True,
    ignore_index: int = 255,
) -> ExtendedLabels:
    """Label the pixels whose most probable class is one that the image's points name, and probable enough.

    A class keeps its surest pixels up to its largest share of the image. A pixel with an annotated point that would get
    a label gets the class of the point; where points of two classes share one, it has no label. One that would get
    none, since the network is not sure there, gets none: the cross-entropy at the points has it in any case.

    Args:
        logits: [B, K, h, w]; no gradient flows through them.
        pool: the points of the batch.
        size: (H, W) of the images, which the points' coordinates are in.
        threshold: least probability, among all K classes.
        largest_share: of an image's valid pixels, above 0, that one class may get; 1 or more to leave it out.
        valid: [B, h, w] bool, False for padding; all where None.
        align_corners: how pixels of the image lie on the grid of the logits.
        ignore_index: label of pixels without one.

    Returns:
        Labels and confidence.

    Raises:
        ValueError: largest_share not above 0.

    Source: not confirmed; see the file's head.

    Example:
        >>> from gingham.methods.pdml.objective import pool_points
        >>> logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]]).reshape(1, 3, 1, 3)
        >>> pool = pool_points(torch.tensor([[[0.0, 0.0, 0.0], [2.0, 0.0, 2.0]]]))
        >>> extend_labels(logits, pool, (1, 3), largest_share=1.0).labels
        tensor([[[  0, 255,   2]]])
    """
    if not largest_share > 0:
        raise ValueError(f"largest_share must be above 0, got {largest_share}")
    batch, classes, rows, columns = logits.shape
    probabilities = logits.float().softmax(dim=1)
    confidence, labels = probabilities.max(dim=1)
    named = torch.zeros(batch, classes, dtype=torch.bool, device=logits.device)
    named[pool.image, pool.label] = True
    kept = named.gather(1, labels.flatten(1)).view_as(labels) & (confidence >= threshold)
    if valid is not None:
        kept &= valid
    if largest_share < 1:
        kept &= _surest(labels, confidence, kept, valid, largest_share, classes)
    labels = torch.where(kept, labels, ignore_index)

    y, x = nearest_cells(pool, size, (rows, columns), align_corners=align_corners)
    given = torch.zeros(batch, rows, columns, classes, dtype=torch.bool, device=logits.device)
    given[pool.image, y, x, pool.label] = True
    number = given.sum(dim=-1)
    labels = torch.where((number == 1) & kept, given.int().argmax(dim=-1), labels)
    none = (labels == ignore_index) | (number > 1)
    of_label = probabilities.gather(1, labels.masked_fill(none, 0)[:, None])[:, 0]  # an annotated class may be unlikely
    return ExtendedLabels(labels.masked_fill(none, ignore_index), of_label.masked_fill(none, 0))


def surest_pixels(extended: ExtendedLabels, most: int, *, ignore_index: int = 255) -> tuple[Tensor, Tensor, Tensor]:
    """The surest pseudo-labelled pixels of each class and image.

    Args:
        extended: pseudo labels.
        most: pixels of a class in an image, 1 or more.
        ignore_index: label of pixels without one.

    Returns:
        Indices of image, row and column, each [M] int64, in the order of the pixels.

    Source: ours; that extended pixels join the metric is not confirmed.

    Example:
        >>> extended = ExtendedLabels(torch.tensor([[[1, 1, 0, 255]]]), torch.tensor([[[0.91, 0.95, 0.93, 0.0]]]))
        >>> [index.tolist() for index in surest_pixels(extended, 1)]
        [[0, 0], [0, 0], [1, 2]]
    """
    image, row, column = (extended.labels != ignore_index).nonzero(as_tuple=True)
    label, confidence = extended.labels[image, row, column], extended.confidence[image, row, column]
    chosen = (_rank_in_group(image * 256 + label, confidence) < most).nonzero().flatten()
    return image[chosen], row[chosen], column[chosen]


def nearest_cells(
    pool: PointPool, size: tuple[int, int] | torch.Size, cells: tuple[int, int], *, align_corners: bool = True
) -> tuple[Tensor, Tensor]:
    """Row and column [M] of the cell of a coarser map that is nearest to each point.

    Args:
        pool: the points, in pixels of the image.
        size: (H, W) of the image.
        cells: (h, w) of the map.
        align_corners: how the image lies on the map.

    Returns:
        Rows 0 to h - 1 and columns 0 to w - 1, each [M] int64.

    Source: the inverse of the resizing of `gingham.nn.segmentation_loss.upsample_logits`.

    Example:
        >>> from gingham.methods.pdml.objective import pool_points
        >>> pool = pool_points(torch.tensor([[[0.0, 0.0, 7.0], [1.0, 3.0, 2.0]]]))
        >>> [index.tolist() for index in nearest_cells(pool, (4, 8), (2, 4))]
        [[0, 1], [3, 1]]
    """
    nearest = []
    for position, extent, count in ((pool.y, size[0], cells[0]), (pool.x, size[1], cells[1])):
        if align_corners:
            position = position * ((count - 1) / max(extent - 1, 1))
        else:
            position = (position + 0.5) * (count / extent) - 0.5
        nearest.append(position.round().long().clamp(0, count - 1))
    return nearest[0], nearest[1]


def _surest(
    labels: Tensor, confidence: Tensor, kept: Tensor, valid: Tensor | None, largest_share: float, classes: int
) -> Tensor:
    """Which kept pixels are among the surest of their class and image, up to the share of the image's pixels."""
    batch, rows, columns = labels.shape
    pixels = torch.full((batch,), rows * columns, device=labels.device) if valid is None else valid.sum(dim=(1, 2))
    most = (largest_share * pixels).floor()
    image, row, column = kept.nonzero(as_tuple=True)
    group = image * classes + labels[image, row, column]
    surest = torch.zeros_like(kept)
    surest[image, row, column] = _rank_in_group(group, confidence[image, row, column]) < most[image]
    return surest


def _rank_in_group(group: Tensor, value: Tensor) -> Tensor:
    """The place of each entry among those of its group, 0 for the largest value."""
    order = value.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    position = torch.arange(len(order), device=order.device)
    ordered = group[order]
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    first = torch.where(begins, position, 0).cummax(dim=0).values
    return torch.empty_like(order).scatter(0, order, position - first)
