"""How DCR is trained and evaluated: https://arxiv.org/abs/1810.04002, with the numbers of the official code.

for each step:
    boxes, scores, features, base losses = detector(images)
    samples = the objects, and boxes drawn from the pool of the sampling rule
    loss = base losses + weight * cross-entropy(branch(features, samples))      no gradient reaches the detector
in evaluation:
    scores = scores of the detector * scores of the branch, then suppression

Detector and branch share no parameter that both train: this is training either alone, with the other's boxes as they
come.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from gingham.data.detection import Detections
from gingham.errors import DataError
from gingham.methods.dcr.network import DCR
from gingham.methods.network_recipe import NetworkRecipe
from gingham.metrics import DetectionMeter, DetectionScores, voc_average_precision


class DCRRecipe(NetworkRecipe):
    """Trains and evaluates a `DCR` on lists of detection items.

    It logs ``loss`` and its parts and, after ``val_`` or ``test_``, ``ap``, ``ap50``, ``ap75``, ``ap_small``,
    ``ap_medium``, ``ap_large``, ``false_positives`` (an image, at a fixed recall) and ``ap50/NN`` of every class. The
    whole scores of a split are kept in `scores`.

    Args:
        network: options of `gingham.methods.dcr.network.DCR`.
        refinement_weight: of the branch's loss, 0 or more.
        milestones: shares of the training, ascending between 0 and 1, at which the learning rate is divided by 10; none
            for the polynomial schedule.
        recall: at which false positives are counted, see `gingham.metrics.DetectionMeter`.
        voc_points: log VOC's own average precision as ``voc_ap50``, too: at "eleven" points, as for VOC 2007, or at
            "all", as from 2010 on; None to leave it out.
        shown: detections with scores above it are in pictures, 0 to 1. Fused scores are never higher than the
            detector's: a threshold that suits those may be too high.
        options: of `gingham.methods.network_recipe.NetworkRecipe`. Biases have no weight decay.

    Raises:
        ValueError: an argument outside its range.
        DetectorError: a base that does not exist or does not have an option.
    """

    monitor = "val_ap"

    def __init__(
        self,
        network: dict[str, Any],
        refinement_weight: float = 1.0,
        milestones: tuple[float, ...] = (4 / 7, 6 / 7),
        recall: float = 0.7,
        voc_points: Literal["eleven", "all"] | None = None,
        shown: float = 0.3,
        **options: Any,
    ) -> None:
        self.require_not_negative(refinement_weight=refinement_weight)
        if list(milestones) != sorted(set(milestones)) or not all(0 < share < 1 for share in milestones):
            raise ValueError(f"milestones must ascend between 0 and 1, got {tuple(milestones)}")
        if voc_points not in (None, "eleven", "all"):
            raise ValueError(f"voc_points must be 'eleven', 'all' or None, got {voc_points!r}")
        if not 0 <= shown <= 1:
            raise ValueError(f"shown must be 0 to 1, got {shown}")
        super().__init__(DCR, network, **options)
        self.refinement_weight, self.milestones = refinement_weight, tuple(milestones)
        self.voc_points, self.shown = voc_points, shown
        self.meters = nn.ModuleDict(
            {split: DetectionMeter(self.num_classes, recall=recall) for split in ("val", "test")}
        )
        #: Of "val" and "test", from the last evaluation.
        self.scores: dict[str, DetectionScores] = {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        named = [(name, p) for name, p in self.network.named_parameters() if p.requires_grad]
        biases = [p for name, p in named if name.endswith("bias")]
        others = [p for name, p in named if not name.endswith("bias")]
        return [{"params": others}, {"params": biases, "weight_decay": 0.0}]

    def pretrained_parts(self, network: Any) -> list[nn.Module]:
        model = network.detector.model
        whole = str(self.network_options.get("base", "")).startswith("fasterrcnn_")  # whose weights are of everything
        stages = [] if network.branch is None else [network.branch.stages]
        return [model if whole else model.backbone.body, *stages]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        # A last layer that a detector's weights do not fit has been made anew in every process.
        for value in self.network.detector.model.roi_heads.box_predictor.state_dict().values():
            value.copy_(self.trainer.strategy.broadcast(value.cpu()))

    def rate_factor(self, step: int, total: int) -> float:
        if not self.milestones:
            return super().rate_factor(step, total)
        return float(0.1 ** sum(step >= share * total for share in self.milestones))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        state = self.network.sampling_state
        if state is not None:  # one row for each process
            rows: Any = self.all_gather(state.to(self.device))
            checkpoint["sampling_states"] = rows.reshape(-1, len(state)).cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        rows = checkpoint.get("sampling_states")
        self.network.sampling_state = None if rows is None else rows[self.trainer.global_rank % len(rows)].clone()

    def setup(self, stage: str) -> None:
        if self.trainer.precision in ("16-true", "bf16-true"):
            raise MisconfigurationException(
                f"trainer.precision is {self.trainer.precision}, which rounds the coordinates of boxes to several "
                "pixels: take 16-mixed or bf16-mixed"
            )
        names = getattr(self.trainer.datamodule, "class_names", None)  # type: ignore[attr-defined]
        if names is not None and len(names) != self.num_classes:
            raise DataError(
                f"the network has num_classes {self.num_classes}, the data set has {len(names)} classes of objects"
            )

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        targets = [{"boxes": item["boxes"], "labels": item["labels"]} for item in batch]
        losses = self.network.losses([item["image"] for item in batch], targets)
        weights = {"loss_refinement": self.refinement_weight}
        loss = torch.stack([weights.get(name, 1.0) * value for name, value in losses.items()]).sum()
        self.log("loss", loss, prog_bar=True, batch_size=len(batch))
        self.log_dict({f"parts/{name}": value for name, value in losses.items()}, batch_size=len(batch))
        return loss

    def forward(self, images: list[Tensor]) -> list[Detections]:
        """The detections in images [3, H, W] of float, 0 to 1."""
        found: list[Detections] = self.network(images)
        return found

    def evaluate(self, batch: Any, split: str) -> None:
        """Count a batch of "val" or "test" in the meter."""
        items = [item for item in batch if item["image_id"] >= 0]  # others only keep a process busy
        found = self([item["image"] for item in items]) if items else []
        self.meters[split].update(  # type: ignore[operator]
            [item["image_id"] for item in items],
            [item["truth"] for item in items],
            [one.boxes for one in found],
            [one.labels for one in found],
            [one.scores for one in found],
        )

    def report(self, split: str) -> None:
        """Log the scores of a split, and begin to count anew."""
        meter = self.meters[split]
        scores: DetectionScores = meter.compute()  # type: ignore[operator]
        meter.reset()  # type: ignore[operator]
        if scores.objects == 0 and self._looks_at_all(split):
            hint = "; its annotations are not public, take the val split: gingham validate" if split == "test" else ""
            raise DataError(f"the {split} split has no annotated objects{hint}")
        self.scores[split] = scores
        for name in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "false_positives"):
            self.log(f"{split}_{name}", getattr(scores, name), prog_bar=name in ("ap", "ap50"))
        for index, value in enumerate(scores.class_ap50.tolist(), 1):
            self.log(f"{split}_ap50/{index:02d}", value)
        if self.voc_points is not None:
            eleven = self.voc_points == "eleven"
            voc = voc_average_precision(scores.truth, scores.detections, self.num_classes, eleven_points=eleven)
            self.log(f"{split}_voc_ap50", voc.nanmean())

    def _looks_at_all(self, split: str) -> bool:
        """Whether an evaluation is of every image, not of the first batches only."""
        limit = getattr(self.trainer, f"limit_{split}_batches")  # also of fast_dev_run; 1.0 is a share, 1 a number
        return isinstance(limit, float) and limit == 1 and not self.trainer.sanity_checking

    def views(self, item: Any) -> dict[str, Detections]:
        """What pictures show of an item: its detections after refinement and, if there is a branch, before."""
        image = item["image"].to(self.device)
        output = self.network.detector([image])
        size = [(image.shape[-2], image.shape[-1])]
        (after,) = self.network.detect(output, self.network.fused_scores(output), size)
        views = {"refined": after.above(self.shown).cpu()}
        if self.network.branch is not None:
            (before,) = self.network.detect(output, output.scores, size)
            views["before"] = before.above(self.shown).cpu()
        return views
