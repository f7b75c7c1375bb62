"""Boundary IoU (Cheng et al., CVPR 2021, https://arxiv.org/abs/2103.16562): how well outlines agree."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from gingham.errors import DataError


class BoundaryScores(NamedTuple):
    """Scores in [0, 1]."""

    mean: Tensor  # scalar, over the classes that occur
    iou: Tensor  # [K], NaN for classes that occur neither in labels nor in predictions


class BoundaryMeter(Metric):
    """IoU of the inner boundaries of each class, over a whole data set.

    The inner boundary of a class are its pixels that lie within `width` of a pixel of another class or of the picture's
    edge, as the source has it: what an erosion by a square of side 2 width + 1 removes. Intersections and unions of the
    boundaries of labels and predictions are summed over the data set, then divided: the source averages over the
    instances of a picture instead. Ignored pixels count neither as boundary nor as another class.

    Args:
        num_classes: K.
        width: of the boundary, 1 pixel or more; the source takes 2 % of the picture's diagonal.
        ignore_index: label of pixels that do not count.

    Raises:
        ValueError: num_classes or width below 1.
        DataError: on `update`, shapes that differ.

    Example:
        >>> meter = BoundaryMeter(num_classes=2, width=1)
        >>> labels = torch.zeros(1, 8, 8, dtype=torch.int64)
        >>> labels[:, 2:7, 2:7] = 1
        >>> meter.update(labels.roll(1, 2), labels)
        >>> round(meter.compute().iou[1].item(), 4)
        0.3333
    """

    full_state_update = False
    intersection: Tensor  # [K], pixels
    union: Tensor  # [K], pixels

    def __init__(self, num_classes: int, *, width: int = 1, ignore_index: int = 255) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if width < 1:
            raise ValueError(f"width must be at least 1 pixel, got {width}")
        self.num_classes = num_classes
        self.width = width
        self.ignore_index = ignore_index
        self.add_state("intersection", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("union", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, labels: Tensor) -> None:
        """Count the boundaries of a batch.

        Args:
            prediction: [B, H, W] integers, the predicted class of every pixel.
            labels: [B, H, W] integers.
        """
        if prediction.shape != labels.shape:
            raise DataError(
                f"prediction and labels must have one shape, got {list(prediction.shape)} and {list(labels.shape)}"
            )
        valid = labels != self.ignore_index
        for index in range(self.num_classes):
            drawn, predicted = (
                _inner_boundary(mask, valid, self.width) for mask in (labels == index, prediction == index)
            )
            self.intersection[index] += (drawn & predicted).sum()
            self.union[index] += (drawn | predicted).sum()

    def compute(self) -> BoundaryScores:
        """The scores of everything counted so far."""
        iou = (self.intersection.double() / self.union.clamp(min=1)).masked_fill(self.union == 0, torch.nan).float()
        return BoundaryScores(iou.nanmean(), iou)


def _inner_boundary(mask: Tensor, valid: Tensor, width: int) -> Tensor:
    """The valid pixels of a mask [B, H, W] that an erosion by `width` removes."""
    outside = F.pad((~mask & valid).float(), (width,) * 4, value=1.0)
    near = F.max_pool2d(outside[:, None], 2 * width + 1, stride=1)[:, 0] > 0
    return mask & valid & near
