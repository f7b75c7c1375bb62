"""Which boxes the refinement branch of DCR learns from, its loss, and how its scores are fused with the detector's.

Paper: Cheng et al., Decoupled Classification Refinement, https://arxiv.org/abs/1810.04002, with the rules of the
official code. Boxes are (x1, y1, x2, y2) with x2 - x1 the width; in the inclusive coordinates of that code the last
pixel is x2 - 1, so that its areas and IoUs ("+1") are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou, nms

from gingham.data.detection import Detections

#: Label of boxes that fill up a batch and cost nothing.
IGNORED = -1

Heuristic = Literal[
    "random",
    "hard",
    "hard+foreground",
    "hard+background",
    "hard+foreground+background",
    "hard_foreground",
    "rcnn",
]


@dataclass(frozen=True)
class SamplingRule:
    """Which of a detector's boxes the branch learns from.

    Beside the objects themselves, boxes are drawn evenly from a pool. *Hard* boxes are in it, whose class the detector
    has wrong with a confident score or on an object, or that are background and have a confident score; *foreground*
    boxes, on an object and rightly classified; and *background* boxes, whose overlap is at least `background_low`.

    With the thresholds of the official code (`released`), every box is in one of the three: the rule then draws evenly
    from all boxes, hard or not. Two options let it choose: with a `background_low` of 0.1, easy background far from any
    object is not drawn, and with `require_foreground_prediction`, a box is not hard for being confidently background.

    Args:
        boxes: drawn from an image, 1 or more.
        heuristic: what is in the pool. "random": every box. "hard", with "+foreground", "+background" or both.
            "hard_foreground": hard boxes, background, and of the foreground those with scores below 0.7. "rcnn": a
            quarter foreground, the rest background, whatever the scores. What the paper compares, and the last two
            rules in particular, is not confirmed.
        confidence: least score of a confident prediction, 0 to 1.
        overlap: least IoU with an object of foreground, above 0 and at most 1.
        background_low: least IoU of the background that is drawn for being background, from 0 to below `overlap`.
        require_foreground_prediction: whether hard boxes have to be predicted as an object.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> SamplingRule.released().background_low
        0.0
    """

    boxes: int = 32
    heuristic: Heuristic = "hard+foreground+background"
    confidence: float = 0.3
    overlap: float = 0.5
    background_low: float = 0.1
    require_foreground_prediction: bool = True

    def __post_init__(self) -> None:
        if self.boxes < 1:
            raise ValueError(f"boxes must be 1 or more, got {self.boxes}")
        if self.heuristic not in get_args(Heuristic):
            raise ValueError(f"heuristic must be one of {', '.join(get_args(Heuristic))}, got {self.heuristic!r}")
        if not 0 <= self.confidence <= 1:
            raise ValueError(f"confidence must be 0 to 1, got {self.confidence}")
        if not 0 < self.overlap <= 1:
            raise ValueError(f"overlap must be above 0 and at most 1, got {self.overlap}")
        if not 0 <= self.background_low < self.overlap:
            raise ValueError(f"background_low must be from 0 to below overlap, got {self.background_low}")

    @classmethod
    def released(cls, boxes: int = 32) -> SamplingRule:
        """The thresholds of the official code, with which the pool is everything."""
        return cls(boxes, background_low=0.0, require_foreground_prediction=False)


class Candidates(NamedTuple):
    """Boxes of one image that may be drawn; its objects come first."""

    boxes: Tensor  # [n, 4]
    labels: Tensor  # [n], class of the object that a box overlaps enough, else 0
    overlaps: Tensor  # [n], IoU with the object it overlaps most; 1 for the objects
    predicted: Tensor  # [n], the detector's class, 0 for background
    scores: Tensor  # [n], the score of that class


class Samples(NamedTuple):
    """Boxes of one image to learn from."""

    boxes: Tensor  # [R, 4]
    labels: Tensor  # [R], 0 for background, `IGNORED` for boxes that only fill up


def candidates(boxes: Tensor, scores: Tensor, objects: Tensor, classes: Tensor, *, overlap: float = 0.5) -> Candidates:
    """The detector's boxes with what is true of them, after the objects of the image.

    Args:
        boxes: [m, 4], what the detector gives after regression.
        scores: [m, C + 1], its probabilities, background first.
        objects: [g, 4].
        classes: [g], 1 to C.
        overlap: IoU from which a box has the class of an object.

    Source: the official code's sampler.

    Example:
        >>> box, score = torch.tensor([[0.0, 0, 10, 20]]), torch.tensor([[0.2, 0.8]])
        >>> candidates(box, score, torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([1])).labels
        tensor([1, 1])
    """
    boxes, scores = boxes.detach(), scores.detach()
    confidence, predicted = scores.max(dim=1) if scores.numel() else (scores.sum(1), scores.sum(1).long())
    if len(objects):
        overlaps, nearest = box_iou(boxes, objects.to(boxes)).max(dim=1)
        labels = torch.where(overlaps >= overlap, classes[nearest], 0)
    else:
        overlaps, labels = boxes.new_zeros(len(boxes)), boxes.new_zeros(len(boxes), dtype=torch.int64)
    sure = scores.new_ones(len(objects))
    return Candidates(
        boxes=torch.cat([objects.to(boxes), boxes]),
        labels=torch.cat([classes, labels]),
        overlaps=torch.cat([sure.to(overlaps), overlaps]),
        predicted=torch.cat([classes, predicted]),
        scores=torch.cat([sure, confidence]),
    )


def sample_boxes(found: Candidates, rule: SamplingRule, generator: torch.Generator | None = None) -> Samples:
    """Draw the boxes of one image that the branch learns from.

    The objects come first (if there are more of them than boxes are asked for, a random choice of them); then boxes
    drawn from the pool of the rule. Where the pool is too small, repeated boxes that are ignored fill up.

    Args:
        found: of the image.
        rule: what is drawn.
        generator: of random numbers on the CPU, by default torch's own.

    Returns:
        As many boxes as the rule says; none if there are no candidates.

    Source: the official code's sampler.
    """
    count, total = rule.boxes, len(found.labels)
    if total == 0:
        return Samples(found.boxes, found.labels)
    if total < count:
        return _filled(found, torch.arange(total), count, generator)
    certain = (found.overlaps == 1).cpu()
    kept = certain.nonzero()[:, 0]
    if len(kept) >= count:
        return _filled(found, _drawn(kept, count, generator), count, generator)
    drawn = [kept]
    for share, pool in _pools(found, rule):
        left = min(share, count) - sum(map(len, drawn))
        drawn.append(_drawn((pool.cpu() & ~certain).nonzero()[:, 0], max(0, left), generator))
    return _filled(found, torch.cat(drawn), count, generator)


def _pools(found: Candidates, rule: SamplingRule) -> list[tuple[int, Tensor]]:
    """Masks of what may be drawn, each with the number of boxes that shall be there afterwards."""
    objects = found.overlaps >= rule.overlap
    if rule.heuristic == "random":
        return [(rule.boxes, torch.ones_like(objects))]
    if rule.heuristic == "rcnn":
        return [(rule.boxes // 4, objects), (rule.boxes, ~objects)]
    wrong, confident = found.predicted != found.labels, found.scores >= rule.confidence
    claims = found.predicted > 0 if rule.require_foreground_prediction else torch.ones_like(wrong)
    hard = (objects & wrong) | (confident & claims & (wrong | ~objects))
    right = objects & ~wrong
    background = ~objects & (found.overlaps >= rule.background_low)
    kinds = {
        "hard": hard,
        "hard+foreground": hard | right,
        "hard+background": hard | background,
        "hard+foreground+background": hard | right | background,
        "hard_foreground": hard | (right & (found.scores < 0.7)) | background,
    }
    return [(rule.boxes, kinds[rule.heuristic])]


def _drawn(indices: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    if len(indices) <= count:
        return indices
    return indices[torch.randperm(len(indices), generator=generator)[:count]]


def _filled(found: Candidates, chosen: Tensor, count: int, generator: torch.Generator | None) -> Samples:
    """The chosen boxes, and random ones that are ignored up to `count`."""
    missing = count - len(chosen)
    fillers = torch.randint(len(found.labels), (missing,), generator=generator)
    device = found.boxes.device
    labels = torch.cat([found.labels[chosen.to(device)], found.labels.new_full((missing,), IGNORED)])
    return Samples(found.boxes[torch.cat([chosen, fillers]).to(device)], labels)


def refinement_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the branch, averaged over the boxes that are not ignored; 0 where all are.

    Args:
        logits: [N, C + 1].
        labels: [N], 0 to C, or `IGNORED`.

    Source: L_dcr of the official code, which back-propagates into ignored rows; they cost nothing here.

    Example:
        >>> refinement_loss(torch.zeros(2, 4), torch.tensor([3, IGNORED]))
        tensor(1.3863)
    """
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def highest_scored(scores: Tensor, top: float) -> Tensor:
    """The indices of the ``floor(top * m)`` boxes whose best object class has the highest score; ties in their order.

    Args:
        scores: [m, C + 1], the detector's, background first.
        top: 0 to 1.

    Example:
        >>> highest_scored(torch.tensor([[0.2, 0.8], [0.9, 0.1], [0.6, 0.4], [0.5, 0.5], [0.0, 1.0]]), 0.5)
        tensor([4, 0])
    """
    count = int(top * len(scores))
    return scores[:, 1:].amax(dim=1).sort(descending=True, stable=True).indices[:count]


def fuse(scores: Tensor, refined: Tensor, which: Tensor) -> Tensor:
    """The product of the detector's and the branch's probabilities, class by class; other boxes keep the detector's.

    Boxes that are not refined keep their whole score, as in the official code, and so gain on those that are.

    Args:
        scores: [m, C + 1], the detector's.
        refined: [k, C + 1], the branch's for some of the boxes.
        which: [k], indices of these boxes.

    Source: paper, section 3; no renormalisation, no temperature.

    Example:
        >>> fuse(torch.tensor([[0.5, 0.5], [0.2, 0.8]]), torch.tensor([[0.5, 0.25]]), torch.tensor([1]))
        tensor([[0.5000, 0.5000],
                [0.1000, 0.2000]])
    """
    fused = scores.clone()
    fused[which] = scores[which] * refined.to(scores)
    return fused


def detections(
    boxes: Tensor, scores: Tensor, *, threshold: float = 0.001, overlap: float = 0.5, most: int = 100
) -> Detections:
    """Boxes with a class each: for every class, those above a threshold that no better one of the class overlaps.

    Args:
        boxes: [m, 4], one box for all classes.
        scores: [m, C + 1], background first; after fusion, which therefore decides what suppresses what.
        threshold: scores have to be above it.
        overlap: IoU above which the lower score is removed.
        most: kept over all classes; those that tie with the last are kept, too.

    Source: the official tester.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]])
        >>> scores = torch.tensor([[0.1, 0.9], [0.2, 0.8], [0.7, 0.3]])
        >>> detections(boxes, scores).scores
        tensor([0.9000, 0.3000])
    """
    scores = scores.float()
    kept: list[tuple[Tensor, Tensor]] = []
    for label in range(1, scores.shape[1]):
        above = (scores[:, label] > threshold).nonzero()[:, 0]
        above = above[nms(boxes[above].float(), scores[above, label], overlap)]
        kept.append((above, torch.full_like(above, label)))
    which, labels = torch.cat([index for index, _ in kept]), torch.cat([label for _, label in kept])
    values, order = scores[which, labels].sort(descending=True, stable=True)
    if len(values) > most:
        order = order[values >= values[most - 1]]
    which, labels = which[order], labels[order]
    return Detections(boxes[which], labels, scores[which, labels])
