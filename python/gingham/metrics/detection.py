"""Average precision of detections as COCO counts it, and how many false positives a recall costs."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from gingham.errors import DataError


class DetectionScores(NamedTuple):
    """Scores of a data set, and the detections that they are of."""

    ap: Tensor  # scalar, mean over IoU 0.5, 0.55, ... 0.95 and over classes
    ap50: Tensor  # scalar
    ap75: Tensor  # scalar
    ap_small: Tensor  # scalar, of objects below 32 x 32 pixels; NaN where there are none
    ap_medium: Tensor  # scalar, below 96 x 96
    ap_large: Tensor  # scalar
    class_ap: Tensor  # [C], NaN for classes without objects
    class_ap50: Tensor  # [C]
    false_positives: Tensor  # scalar, per image at the fixed recall; infinite where it is not reached
    objects: Tensor  # scalar, how many there are to be found; no score means anything where there are none
    truth: Tensor  # [m, 8] float64, rows (image id, label, x, y, width, height, area, ignored)
    detections: Tensor  # [n, 7] float64, rows (image id, x, y, width, height, score, label)


class DetectionMeter(Metric):
    """Collects detections and objects, and scores them with pycocotools.

    The numbers are those of pycocotools on the result file that
    `gingham.data.coco_detection.write_coco_results` makes of the detections. They do not depend on batches, the order
    of the images or the number of processes.

    Args:
        num_classes: C, 1 or more; labels are 1 to C.
        recall: at which false positives are counted, above 0 and at most 1: all classes share one threshold of the
            score, the highest at which this share of the objects is found with IoU 0.5 or more. Ignored objects count
            in neither direction, as COCO has it.

    Raises:
        ValueError: an argument outside its range.
        DataError: on `compute`, a label that is none.

    Example:
        >>> meter = DetectionMeter(num_classes=1, recall=0.5)
        >>> truth = torch.tensor([[1.0, 0, 0, 10, 10, 100, 0]])
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
        >>> meter.update([7], [truth], [boxes], [torch.tensor([1, 1])], [torch.tensor([0.6, 0.9])])
        >>> scores = meter.compute()
        >>> scores.ap50, scores.false_positives
        (tensor(0.5000), tensor(1.))
    """

    full_state_update = False
    images: list[Tensor]  # [k] each, ids
    truth: list[Tensor]  # [m, 8] each
    detections: list[Tensor]  # [n, 7] each

    def __init__(self, num_classes: int, *, recall: float = 0.7) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if not 0 < recall <= 1:
            raise ValueError(f"recall must be above 0 and at most 1, got {recall}")
        self.num_classes = num_classes
        self.recall = recall
        for name in ("images", "truth", "detections"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self,
        images: Sequence[int],
        truth: Sequence[Tensor],
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        scores: Sequence[Tensor],
    ) -> None:
        """Collect a batch.

        Args:
            images: the id of each image, unique in the data set.
            truth: of each image, float64 [m, 7], see `gingham.data.DetectionItem`.
            boxes: of each image, [n, 4], (x1, y1, x2, y2) in its pixels.
            labels: of each image, [n], 1 to C.
            scores: of each image, [n].
        """
        device = self.device
        # Whatever a process has seen, its states are tensors of these shapes, which is what gathering needs.
        self.images.append(torch.tensor(list(images), dtype=torch.int64, device=device))
        true_rows, found_rows = [torch.zeros(0, 8, dtype=torch.float64)], [torch.zeros(0, 7, dtype=torch.float64)]
        for image, true, box, label, score in zip(images, truth, boxes, labels, scores, strict=True):
            corner, size = box[:, :2].double(), box[:, 2:].double() - box[:, :2].double()
            identity = corner.new_full((len(box), 1), image)
            true_rows.append(torch.cat([true.new_full((len(true), 1), image), true], dim=1).cpu())
            columns = (identity, corner, size, score.double()[:, None], label.double()[:, None])
            found_rows.append(torch.cat(columns, dim=1).cpu())
        self.truth.append(torch.cat(true_rows).to(device))
        self.detections.append(torch.cat(found_rows).to(device))

    def compute(self) -> DetectionScores:
        """The scores of everything collected so far."""
        images = _joined(self.images, (0,)).long()
        truth, detections = _joined(self.truth, (0, 8)), _joined(self.detections, (0, 7))
        for name, labels in (("truth", truth[:, 1]), ("detections", detections[:, 6])):
            if len(wrong := labels[(labels < 1) | (labels > self.num_classes)]):
                raise DataError(f"{name} have the label {int(wrong[0])}, expected 1 to {self.num_classes}")
        evaluation = evaluate_coco(images.tolist(), truth.tolist(), detections.tolist(), self.num_classes)
        # [IoU, recall, class, area, most detections]; -1 where there is no object
        precision = torch.from_numpy(evaluation.eval["precision"])
        precision = precision.masked_fill(precision < 0, math.nan)[..., -1].float()
        whole = precision[..., 0]
        return DetectionScores(
            ap=whole.nanmean(),
            ap50=whole[0].nanmean(),
            ap75=whole[5].nanmean(),
            ap_small=precision[..., 1].nanmean(),
            ap_medium=precision[..., 2].nanmean(),
            ap_large=precision[..., 3].nanmean(),
            class_ap=whole.nanmean(dim=(0, 1)),
            class_ap50=whole[0].nanmean(dim=0),
            false_positives=torch.tensor(_false_positives(evaluation, self.recall) / max(1, len(images))),
            objects=(truth[:, 7] == 0).sum(),
            truth=truth,
            detections=detections,
        )


def evaluate_coco(
    images: Sequence[int], truth: Sequence[Sequence[float]], detections: Sequence[Sequence[float]], num_classes: int
) -> Any:
    """pycocotools' COCOeval after it has looked at these rows, see `DetectionScores`; category ids are the labels."""
    import numpy as np
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress
        coco = COCO()
        coco.dataset = {
            "images": [{"id": int(image)} for image in images],
            "categories": [{"id": label} for label in range(1, num_classes + 1)],
            "annotations": [
                {
                    "id": number,
                    "image_id": int(image),
                    "category_id": int(label),
                    "bbox": box,
                    "area": area,
                    "iscrowd": int(ignored),
                }
                for number, (image, label, *box, area, ignored) in enumerate(truth, 1)
            ],
        }
        coco.createIndex()
        results = coco.loadRes(np.array(detections)) if detections else COCO()
        if not detections:
            results.dataset = coco.dataset | {"annotations": []}
            results.createIndex()
        evaluation = COCOeval(coco, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _false_positives(evaluation: Any, recall: float) -> float:
    """False positives at the highest threshold of the score at which the recall is reached with IoU 0.5."""
    objects, scores, hits = 0, [], []
    everything = evaluation.params.areaRng[0]
    for found in evaluation.evalImgs:
        if found is None or found["aRng"] != everything:
            continue
        objects += int((found["gtIgnore"] == 0).sum())
        counted = ~found["dtIgnore"][0].astype(bool)
        scores.append(torch.tensor(found["dtScores"], dtype=torch.float64)[torch.from_numpy(counted)])
        hits.append(torch.from_numpy(found["dtMatches"][0] > 0)[torch.from_numpy(counted)])
    if objects == 0:
        return math.nan
    score, order = torch.cat(scores).sort(descending=True, stable=True)
    found_so_far = torch.cat(hits)[order].cumsum(0)
    reached = (found_so_far >= recall * objects).nonzero()
    if not len(reached):
        return math.inf
    accepted = score >= score[int(reached[0])]
    return float(accepted.sum() - found_so_far[accepted][-1])


def _joined(state: Any, empty: tuple[int, ...]) -> Tensor:
    # A list before torchmetrics has brought the processes' states together, a tensor after.
    if isinstance(state, Tensor):
        return state.cpu()
    return torch.cat(state).cpu() if state else torch.zeros(empty, dtype=torch.float64)
