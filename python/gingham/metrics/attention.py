"""How well attention maps cover objects, over all thresholds at once, and how much of them is background."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from gingham.errors import DataError
from gingham.metrics.segmentation import SegmentationScores, scores_of_confusion


class AttentionScores(NamedTuple):
    """Scores in [0, 1], for attention taken as an object from each of T thresholds on, and without any threshold."""

    thresholds: Tensor  # [T], rising
    miou: Tensor  # [T], mean IoU over classes and background
    object_iou: Tensor  # [T], mean IoU over classes
    precision: Tensor  # [T], share of the pixels at or above the threshold that lie on an object of their class
    recall: Tensor  # [T], share of the objects' pixels that are given their class
    leakage: Tensor  # scalar, share of all attention that lies on the background, attention rounded down to 1 / T
    confusion: Tensor  # [T, C + 1, C + 1], pixels; rows are labels, columns predictions
    labelled_pixels: Tensor  # scalar, how many pixels counted

    def best(self) -> int:
        """Which threshold has the highest mean IoU; the lowest of several."""
        return int(self.miou.argmax())

    def at(self, threshold: float) -> SegmentationScores:
        """The scores of segmentation by the nearest of the thresholds."""
        return scores_of_confusion(self.confusion[int((self.thresholds - threshold).abs().argmin())])


class AttentionMeter(Metric):
    """Attention maps as a segmentation: each pixel has the class of its strongest map, where that reaches a threshold.

    Counts are integers and are summed over processes before anything is divided, so the result does not depend on
    batches, their order or the number of processes.

    Args:
        num_classes: C, without background.
        steps: T; thresholds are 1 / T, 2 / T, ... 1.
        ignore_index: label of pixels that do not count.

    Raises:
        ValueError: num_classes or steps below 1.
        DataError: on `update`, shapes that do not fit, or a label that is no class.

    Example:
        >>> meter = AttentionMeter(num_classes=1, steps=10)
        >>> meter.update(torch.tensor([[[[0.95, 0.35, 0.25, 0.0]]]]), torch.tensor([[[1, 1, 0, 0]]]))
        >>> scores = meter.compute()
        >>> scores.thresholds[scores.best()], scores.miou.max(), scores.leakage
        (tensor(0.3000), tensor(1.), tensor(0.1429))
    """

    full_state_update = False
    counts: Tensor  # [C + 1, C + 1, T + 1]; labels, strongest classes, and how many thresholds are reached

    def __init__(self, num_classes: int, *, steps: int = 200, ignore_index: int = 255) -> None:
        super().__init__()
        for name, value in {"num_classes": num_classes, "steps": steps}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_classes, self.steps, self.ignore_index = num_classes, steps, ignore_index
        shape = (num_classes + 1, num_classes + 1, steps + 1)
        self.add_state("counts", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, attention: Tensor, labels: Tensor) -> None:
        """Count the pixels of a batch.

        Args:
            attention: [B, C, H, W], 0 to 1.
            labels: [B, H, W] integers, 0 the background, c + 1 the class of map c.
        """
        expected = (labels.shape[0], self.num_classes, *labels.shape[1:])
        if attention.shape != expected:
            raise DataError(
                f"attention must be [B, {self.num_classes}, H, W] for labels [B, H, W], got {list(attention.shape)} "
                f"and {list(labels.shape)}"
            )
        valid = labels != self.ignore_index
        labels = labels[valid].long()
        wrong = labels[(labels < 0) | (labels > self.num_classes)]
        if len(wrong):
            raise DataError(
                f"labels contain the value {int(wrong[0])}, which is neither a class (0 to {self.num_classes}) nor "
                f"ignore_index {self.ignore_index}"
            )
        strongest, kind = attention.float().max(dim=1)
        # A hair above, lest 0.3 fall below three tenths.
        reached = (strongest[valid] * self.steps + 1e-4).floor().long().clamp(0, self.steps)
        place = (labels * (self.num_classes + 1) + kind[valid] + 1) * (self.steps + 1) + reached
        self.counts += torch.bincount(place, minlength=self.counts.numel()).view_as(self.counts)

    def compute(self) -> AttentionScores:
        """The scores of everything counted so far."""
        total = self.counts.sum(dim=2)
        above = self.counts.flip(2).cumsum(2).flip(2)[..., 1:].movedim(2, 0)  # [T, C + 1, C + 1]
        confusion = above.clone()
        confusion[..., 0] += (total - above).sum(dim=2)
        hits = confusion.diagonal(dim1=1, dim2=2)
        union = confusion.sum(1) + confusion.sum(2) - hits
        iou = (hits.double() / union.clamp(min=1)).masked_fill(union == 0, torch.nan)
        objects = hits[:, 1:].sum(1).double()
        attended = confusion[:, :, 1:].sum((0, 2)).double()  # by label: pixels times the thresholds that they reach
        thresholds = torch.arange(1, self.steps + 1, device=total.device) / self.steps
        return AttentionScores(
            thresholds=thresholds,
            miou=iou.nanmean(1).nan_to_num().float(),
            object_iou=iou[:, 1:].nanmean(1).nan_to_num().float(),
            precision=(objects / confusion[:, :, 1:].sum((1, 2)).clamp(min=1)).float(),
            recall=(objects / confusion[:, 1:].sum((1, 2)).clamp(min=1)).float(),
            leakage=(attended[0] / attended.sum().clamp(min=1)).float(),
            confusion=confusion,
            labelled_pixels=total.sum(),
        )
