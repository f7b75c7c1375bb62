"""Average precision as the PASCAL VOC development kit counts it (Everingham et al., IJCV 2010)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou


def voc_average_precision(
    truth: Tensor, detections: Tensor, num_classes: int, *, eleven_points: bool = False, iou: float = 0.5
) -> Tensor:
    """The average precision of each class.

    A detection is right if its IoU with the object of its class that it overlaps most is above `iou` and no detection
    with a higher score has taken that object. Where that object is difficult, the detection does not count. Of equal
    scores, those of the image with the lower id come first, whatever the order of the rows: processes bring theirs one
    after the other.

    Args:
        truth: float64 [m, 8], rows (image id, label, x, y, width, height, area, difficult).
        detections: float64 [n, 7], rows (image id, x, y, width, height, score, label).
        num_classes: C; labels are 1 to C.
        eleven_points: the mean of the best precision at recalls of 0, 0.1, ... 1, as up to 2009, in place of the area
            under the curve.
        iou: 0 to 1.

    Returns:
        [C], NaN for classes without objects that count.

    Source: the development kit's VOCevaldet. Width and height are those of continuous coordinates, which in the kit's
    inclusive ones are x2 - x1 + 1 and y2 - y1 + 1.

    Example:
        >>> truth = torch.tensor([[0.0, 1, 0, 0, 10, 10, 100, 0]])
        >>> voc_average_precision(truth, torch.tensor([[0.0, 0, 0, 10, 6, 0.9, 1], [0, 20, 20, 5, 5, 0.8, 1]]), 1)
        tensor([1.])
    """
    detections = detections[detections[:, 0].argsort(stable=True)]
    result = torch.full((num_classes,), torch.nan)
    for label in range(1, num_classes + 1):
        objects = truth[truth[:, 1] == label]
        found = detections[detections[:, 6] == label]
        count = int((objects[:, 7] == 0).sum())
        if count:
            hit, counted = _judge(objects, found[found[:, 5].argsort(descending=True, stable=True)], iou)
            result[label - 1] = _average_precision(hit[counted], count, eleven_points)
    return result


def _judge(objects: Tensor, found: Tensor, iou: float) -> tuple[Tensor, Tensor]:
    """For detections of one class, best first: which are right, and which count; bool [n] each."""
    hit, counted = torch.zeros(len(found), dtype=torch.bool), torch.ones(len(found), dtype=torch.bool)
    for image in found[:, 0].unique():
        there = (objects[:, 0] == image).nonzero()[:, 0]
        if not len(there):
            continue
        rows = (found[:, 0] == image).nonzero()[:, 0]
        overlap, nearest = box_iou(_edges(found[rows, 1:5]), _edges(objects[there, 2:6])).max(dim=1)
        taken = set()
        for row, value, which in zip(rows.tolist(), overlap.tolist(), nearest.tolist(), strict=True):
            if value <= iou:
                continue
            if objects[there[which], 7]:
                counted[row] = False
            elif which not in taken:
                taken.add(which)
                hit[row] = True
    return hit, counted


def _edges(boxes: Tensor) -> Tensor:
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)


def _average_precision(hit: Tensor, objects: int, eleven_points: bool) -> float:
    right = hit.double().cumsum(0)
    recall, precision = right / objects, right / torch.arange(1, len(hit) + 1)
    if eleven_points:
        thresholds = torch.arange(11).double() / 10
        best = [
            precision[recall >= threshold].max().item() if (recall >= threshold).any() else 0.0
            for threshold in thresholds
        ]
        return sum(best) / 11
    # Each precision is raised to the best at a higher recall.
    envelope = precision.flip(0).cummax(0).values.flip(0)
    steps = torch.diff(recall, prepend=recall.new_zeros(1))
    return float((steps * envelope).sum())
