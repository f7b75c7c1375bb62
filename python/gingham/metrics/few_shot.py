"""Mean IoU over novel classes and FB-IoU as few-shot segmentation reports them: counts of all episodes, then shares."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from gingham.errors import DataError


class FewShotScores(NamedTuple):
    """Scores in [0, 1], means over the runs, and the counts that they rest on.

    Where a single class is evaluated, torchmetrics makes scalars of `iou` and `episodes`.
    """

    miou: Tensor  # scalar, mean of iou over classes
    iou: Tensor  # [C], of the object, by class
    fb_iou: Tensor  # scalar, mean IoU of foreground and background, all classes in one
    all_foreground: Tensor  # scalar, the miou of who calls every pixel object
    miou_spread: Tensor  # scalar, standard deviation (of the population) of miou over the runs
    episodes: Tensor  # [C], of all runs
    counts: Tensor  # [R, C, 4], pixels: object hit, object in truth or prediction, background likewise


class FewShotMeter(Metric):
    """Pixels of all episodes counted by run and class; the scores follow from the counts.

    ``iou = hits / max(1, union)`` of the object of each class, over all its episodes: not the mean of the IoUs of
    single episodes. A class without any episode scores 0 and counts in the mean. For FB-IoU all classes are one
    foreground. Counts are integers and are summed over processes before anything is divided, so the result does not
    depend on batches, their order or the number of processes.

    Args:
        classes: class indices that are evaluated, 1 to 255.
        runs: repetitions with episodes of their own.

    Raises:
        ValueError: no class, a class outside 1 to 255 or twice, or runs below 1.
        DataError: on `update`, shapes that differ, a value that is neither 0, 1 nor 255, or another class or run.

    Source: OSLSM, https://arxiv.org/abs/1709.03410, as SG-One's official code has it; FB-IoU after co-FCN.

    Example:
        >>> meter = FewShotMeter(classes=(3, 7))
        >>> meter.update(torch.tensor([[[1, 1, 0]]]), torch.tensor([[[1, 0, 0]]]), torch.tensor([3]))
        >>> meter.compute().iou, meter.compute().fb_iou
        (tensor([0.5000, 0.0000]), tensor(0.5000))
    """

    full_state_update = False
    counts: Tensor  # [R, C, 4]
    objects: Tensor  # [R, C, 2], pixels of the object, and of the whole picture
    episodes: Tensor  # [C]

    def __init__(self, classes: Sequence[int], runs: int = 1) -> None:
        super().__init__()
        self.classes = tuple(classes)
        if not self.classes or not all(1 <= index <= 255 for index in self.classes):
            raise ValueError(f"classes must be one or more class indices from 1 to 255, got {self.classes}")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes must be different, got {self.classes}")
        if runs < 1:
            raise ValueError(f"runs must be at least 1, got {runs}")
        self.runs = runs
        number = len(self.classes)
        self.add_state("counts", torch.zeros(runs, number, 4, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("objects", torch.zeros(runs, number, 2, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("episodes", torch.zeros(number, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, label: Tensor, class_index: Tensor, run: Tensor | None = None) -> None:
        """Count a batch of episodes.

        Args:
            prediction: [B, H, W], 1 or True where the object is seen.
            label: [B, H, W], 0 background, 1 object, 255 not counted. An episode without any counted pixel is none.
            class_index: [B], of each episode.
            run: [B], 0 to below `runs`; by default 0.
        """
        if prediction.shape != label.shape or class_index.shape != label.shape[:1]:
            raise DataError(
                "prediction and label must be [B, H, W] and class_index [B], got "
                f"{list(prediction.shape)}, {list(label.shape)} and {list(class_index.shape)}"
            )
        valid = label != 255
        wrong = label[valid & (label != 0) & (label != 1)]
        if len(wrong):
            raise DataError(f"label contains the value {int(wrong[0])}, expected 0, 1 or 255")
        runs = [0] * len(label) if run is None else run.tolist()
        seen, truth = prediction.bool(), label == 1
        parts = (
            (seen & truth & valid, (seen | truth) & valid, ~seen & ~truth & valid, (~seen | ~truth) & valid),
            (truth & valid, valid),
        )
        counts, objects = (torch.stack([part.flatten(1).sum(dim=1) for part in group], dim=1) for group in parts)
        for index, (name, number) in enumerate(zip(class_index.tolist(), runs, strict=True)):
            if name not in self.classes or not 0 <= number < self.runs:
                raise DataError(f"an episode is of class {name} and run {number}, which are not evaluated here")
            place = self.classes.index(name)
            self.counts[number, place] += counts[index]
            self.objects[number, place] += objects[index]
            self.episodes[place] += (objects[index, 1] > 0).long()

    def compute(self) -> FewShotScores:
        """The scores of everything counted so far."""
        counts, objects = self.counts.double(), self.objects.double()
        by_run = counts[..., 0] / counts[..., 1].clamp(min=1)  # [R, C]
        every = objects[..., 0] / objects[..., 1].clamp(min=1)
        return FewShotScores(
            miou=by_run.mean().float(),
            iou=by_run.mean(dim=0).float(),
            fb_iou=foreground_background_iou(self.counts).float(),
            all_foreground=every.mean().float(),
            miou_spread=by_run.mean(dim=1).std(correction=0).float(),
            episodes=self.episodes.clone(),
            counts=self.counts.clone(),
        )


def foreground_background_iou(counts: Tensor) -> Tensor:
    """FB-IoU from the counts of episodes: of a fold, or, with the counts of several folds concatenated, of all pooled.

    Args:
        counts: [R, C, 4], as in `FewShotScores`; concatenate folds along C.

    Returns:
        Scalar, float64: the mean over the runs.

    Source: SG-One's official script pools the episodes of all four folds; later work takes the mean over folds.

    Example:
        >>> first, second = torch.tensor([[[40, 110, 270, 360]]]), torch.tensor([[[5, 35, 200, 205]]])
        >>> foreground_background_iou(torch.cat([first, second], dim=1))
        tensor(0.5711, dtype=torch.float64)
    """
    hits, union, background_hits, background_union = counts.double().sum(dim=1).unbind(-1)
    return ((hits / union.clamp(min=1) + background_hits / background_union.clamp(min=1)) / 2).mean()
