"""Mean intersection over union as segmentation papers report it: from one confusion matrix over the whole set."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from gingham.errors import DataError


class SegmentationScores(NamedTuple):
    """Scores in [0, 1], and what they rest on."""

    miou: Tensor  # scalar, mean of iou over classes
    iou: Tensor  # [K], NaN for classes left out of the mean
    pixel_accuracy: Tensor  # scalar, share of correct pixels
    mean_accuracy: Tensor  # scalar, mean over classes of the share of correct pixels
    accuracy: Tensor  # [K], share of each class's pixels that are correct, NaN for classes left out of its mean
    labelled_pixels: Tensor  # scalar, how many pixels counted; no score means anything where there are none


class SegmentationMeter(Metric):
    """One confusion matrix over every pixel of a data set, and the scores that follow from it.

    ``iou = tp / max(1, ground_truth + predicted - tp)`` per class. A class that occurs neither in the labels nor in the
    predictions scores 0 and counts in the mean, which is the Cityscapes protocol as CCNet's code has it; with
    ``skip_absent=True`` it is left out. Counts are integers and are summed over processes before anything is divided,
    so the result does not depend on batches, their order or the number of processes.

    Args:
        num_classes: K.
        ignore_index: label of pixels that do not count.
        skip_absent: leave out classes that occur neither in labels nor in predictions.

    Raises:
        DataError: on `update`, shapes that differ, or a value that is no class.

    Example:
        >>> meter = SegmentationMeter(num_classes=2)
        >>> meter.update(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 1, 0]]))
        >>> meter.compute().iou
        tensor([0.5000, 0.5000])
    """

    full_state_update = False
    confusion: Tensor  # [K, K], counts; rows are labels, columns predictions

    def __init__(self, num_classes: int, *, ignore_index: int = 255, skip_absent: bool = False) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.skip_absent = skip_absent
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, labels: Tensor) -> None:
        """Count the pixels of a batch.

        Args:
            prediction: [B, H, W] integers, the predicted class of every pixel.
            labels: [B, H, W] integers.
        """
        if prediction.shape != labels.shape:
            raise DataError(
                f"prediction and labels must have one shape, got {list(prediction.shape)} and {list(labels.shape)}"
            )
        valid = labels != self.ignore_index
        labels, prediction = labels[valid].long(), prediction[valid].long()
        for name, values in (("labels", labels), ("prediction", prediction)):
            wrong = values[(values < 0) | (values >= self.num_classes)]
            if len(wrong):
                raise DataError(
                    f"{name} contain the value {int(wrong[0])}, which is neither a class (0 to {self.num_classes - 1})"
                    f" nor ignore_index {self.ignore_index}"
                )
        pairs = torch.bincount(labels * self.num_classes + prediction, minlength=self.num_classes**2)
        self.confusion += pairs.reshape(self.num_classes, self.num_classes)

    def compute(self) -> SegmentationScores:
        """The scores of everything counted so far."""
        return scores_of_confusion(self.confusion, skip_absent=self.skip_absent)


def scores_of_confusion(confusion: Tensor, *, skip_absent: bool = True) -> SegmentationScores:
    """The scores of a confusion matrix.

    Args:
        confusion: [K, K], counts; rows are labels, columns predictions.
        skip_absent: leave out classes that occur neither in labels nor in predictions.

    Example:
        >>> scores_of_confusion(torch.tensor([[3, 1], [0, 4]])).iou
        tensor([0.7500, 0.8000])
    """
    counted, confusion = confusion.sum(), confusion.double()
    hits, labelled, predicted = confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)
    union = labelled + predicted - hits
    iou = hits / union.clamp(min=1)
    accuracy = hits / labelled.clamp(min=1)
    if skip_absent:
        iou = iou.masked_fill(union == 0, torch.nan)
        accuracy = accuracy.masked_fill(labelled == 0, torch.nan)
    pixel_accuracy = hits.sum() / confusion.sum().clamp(min=1)
    return SegmentationScores(
        miou=iou.nanmean().float(),
        iou=iou.float(),
        pixel_accuracy=pixel_accuracy.float(),
        mean_accuracy=accuracy.nanmean().float(),
        accuracy=accuracy.float(),
        labelled_pixels=counted,
    )
