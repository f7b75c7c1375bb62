"""What the training and evaluation of every segmentation method share; a method adds its network and its loss.

for each step:
    output = network(images)
    loss = the method's loss of output and labels (or of the labels that self-correction refined)
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gingham.data.labels import IGNORE_INDEX
from gingham.errors import DataError
from gingham.methods.network_recipe import NetworkRecipe
from gingham.metrics import BoundaryMeter, BoundaryScores, SegmentationMeter, SegmentationScores
from gingham.nn.inference import multi_scale_flip, sliding_window, whole_image
from gingham.nn.segmentation_loss import shrink_labels, widened


class Refinement(NamedTuple):
    """What a strategy such as self-correction puts in the place of a batch's labels."""

    labels: Tensor  # [B, K, H, W], probabilities
    teacher: Any  # what the teacher's network returned for the images, or None where it was not asked
    alpha: float  # the share of the given labels in the refined ones


class SegmentationRecipe(NetworkRecipe):
    """Trains and evaluates a segmentation network on batches of images and labels from any loader.

    It logs ``loss`` and, after ``val_`` or ``test_``, ``miou``, ``pixel_accuracy``, ``mean_accuracy``, ``iou/NN`` of
    every class, with `report_classes` ``focus_iou``, and with `boundary_width` ``boundary_iou``. The whole scores of a
    split are kept in `scores`.

    Args:
        network_class: of the network. Its output has a field ``logits`` [B, K, h, w].
        network: options of that class.
        evaluation: images "whole" or in "sliding" tiles.
        tile: side of the tiles in pixels.
        scales: factors of the image size over which predictions are averaged in evaluation.
        flip: whether mirrored images are averaged too; classes with a left and a right change places in them.
        average: of scales and mirrored images: of their "logits" or "probabilities".
        mirror_pairs: the class indices of each left and its right. A data module that knows its classes overrides them.
        report_classes: class indices whose mean IoU is logged as ``focus_iou``, with `skip_absent` that of those that
            occur.
        skip_absent: leave classes that occur nowhere out of the mean IoU.
        boundary_width: pixels on the inner side of a class's outline that the boundary IoU looks at, or None to leave
            it out.
        options: of `gingham.methods.network_recipe.NetworkRecipe`.

    Raises:
        ValueError: an argument outside its range.
        BackboneError: a backbone that does not exist or does not have an option.
    """

    def __init__(
        self,
        network_class: type[nn.Module],
        network: dict[str, Any],
        *,
        evaluation: Literal["whole", "sliding"] = "whole",
        tile: int = 769,
        scales: tuple[float, ...] = (1.0,),
        flip: bool = False,
        average: Literal["logits", "probabilities"] = "logits",
        mirror_pairs: tuple[tuple[int, int], ...] = (),
        report_classes: tuple[int, ...] = (),
        skip_absent: bool = False,
        boundary_width: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(network_class, network, **options)
        if evaluation not in ("whole", "sliding"):
            raise ValueError(f"evaluation must be 'whole' or 'sliding', got {evaluation!r}")
        if tile < 1:
            raise ValueError(f"tile must be 1 pixel or more, got {tile}")
        if not scales or not all(0 < scale < math.inf for scale in scales):
            raise ValueError(f"scales must be one or more numbers above 0, got {tuple(scales)}")
        if average not in ("logits", "probabilities"):
            raise ValueError(f"average must be 'logits' or 'probabilities', got {average!r}")
        if not all(0 <= index < self.num_classes for index in report_classes):
            raise ValueError(
                f"report_classes must be between 0 and {self.num_classes - 1}, got {tuple(report_classes)}"
            )
        if not all(0 <= index < self.num_classes for pair in mirror_pairs for index in pair):
            raise ValueError(
                f"mirror_pairs must be classes between 0 and {self.num_classes - 1}, got {tuple(mirror_pairs)}"
            )
        self.evaluation, self.tile, self.scales, self.flip = evaluation, tile, tuple(scales), flip
        self.average: Literal["logits", "probabilities"] = average
        self.report_classes = tuple(report_classes)
        self.meters = nn.ModuleDict(
            {split: SegmentationMeter(self.num_classes, skip_absent=skip_absent) for split in ("val", "test")}
        )
        self.boundary_meters = nn.ModuleDict(
            {}
            if boundary_width is None
            else {split: BoundaryMeter(self.num_classes, width=boundary_width) for split in ("val", "test")}
        )
        #: The classes that change places in a mirrored picture; the data module's, once there is one.
        self.mirror_pairs: tuple[tuple[int, int], ...] = tuple(mirror_pairs)
        #: Of "val" and "test", from the last evaluation.
        self.scores: dict[str, SegmentationScores] = {}
        self.boundary_scores: dict[str, BoundaryScores] = {}
        #: Gives refined labels for a batch; set by a callback such as self-correction.
        self.refine: Callable[[Any], Refinement | None] | None = None

    # -------------------------------------------------------------------------------------------- what a method adds

    @abstractmethod
    def loss(self, output: Any, batch: Any, refined: Refinement | None) -> Tensor:
        """The loss of a batch.

        Args:
            output: what the network returned for the images.
            batch: "image" [B, 3, H, W], "label" [B, H, W], and whatever else the data set gives.
            refined: labels to learn in place of the given ones, or None.
        """

    def learns_labels(self) -> bool:
        """Whether the loss is of the labels of pixels, so that refined ones can take their place."""
        return True

    def gives_item_losses(self) -> bool:
        return self.learns_labels()

    @torch.no_grad()
    def item_losses(self, output: Any, batch: Any) -> Tensor:
        """How hard each image is: the mean cross-entropy of its labelled pixels, at the size of the logits.

        Args:
            output: what the network returned for the images.
            batch: "label" [B, H, W].

        Returns:
            float32 [B]; 0 for an image without labelled pixels, from which there is nothing to learn.
        """
        logits = widened(output.logits)
        aligned = self.corners_align(batch["image"].shape[-2:])
        labels = shrink_labels(batch["label"], logits.shape[-2:], align_corners=aligned)
        losses = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
        labelled = (labels != IGNORE_INDEX).sum((-2, -1))
        return losses.sum((-2, -1)) / labelled.clamp(min=1)

    def corners_align(self, size: tuple[int, int] | torch.Size) -> bool:
        """Whether maps of images of this size (H, W) are resized with aligned corners, everywhere in the method."""
        return True

    # -------------------------------------------------------------------------------------------- training

    def setup(self, stage: str) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        label_space = getattr(data, "label_space", None)
        if label_space is not None:
            labels = label_space()
            if labels.num_classes != self.num_classes:
                raise DataError(
                    f"the network has num_classes {self.num_classes}, the data set has {labels.num_classes} classes"
                )
            self.mirror_pairs = labels.mirror_pairs
        if stage == "fit" and self.learns_labels() and hasattr(data, "require_training_labels"):
            data.require_training_labels()

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        images = batch["image"]
        refined = self.refine(batch) if self.refine is not None else None
        output = self.network(images.contiguous(memory_format=torch.channels_last))
        loss = self.loss(output, batch, refined)
        if self.observe is not None:
            self.observe(batch, self.item_losses(output, batch))
        self.log("loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    # -------------------------------------------------------------------------------------------- evaluation

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K, H, W] of images [B, 3, H, W], by the recipe's way of evaluation."""

        def network(x: Tensor) -> Tensor:
            logits: Tensor = self.network(x.contiguous(memory_format=torch.channels_last)).logits
            return logits

        def one_scale(x: Tensor) -> Tensor:
            if self.evaluation == "sliding":
                align_corners = self.corners_align((self.tile, self.tile))
                return sliding_window(network, x, tile=self.tile, align_corners=align_corners)
            return whole_image(network, x, align_corners=self.corners_align(x.shape[-2:]))

        if self.scales == (1.0,) and not self.flip:
            return one_scale(images)
        return multi_scale_flip(
            one_scale,
            images,
            scales=self.scales,
            flip=self.flip,
            mirror_pairs=self.mirror_pairs,
            average=self.average,
            align_corners=self.corners_align(images.shape[-2:]),
        )

    def predict_classes(self, images: Tensor) -> Tensor:
        """The class [B, H, W] of every pixel of images [B, 3, H, W]."""
        classes: Tensor = self(images).argmax(1)
        return classes

    def views(self, item: Any) -> dict[str, Tensor]:
        """What pictures show of a data set's item beside its truth: classes [H, W], or heat [H, W] in 0 to 1."""
        return {"prediction": self.predict_classes(item["image"][None].to(self.device))[0].cpu()}

    def evaluate(self, batch: Any, split: str) -> None:
        """Count a batch of "val" or "test" in the meters."""
        prediction = self.predict_classes(batch["image"])
        self.meters[split].update(prediction, batch["label"])  # type: ignore[operator]
        if split in self.boundary_meters:
            self.boundary_meters[split].update(prediction, batch["label"])  # type: ignore[operator]

    def report(self, split: str) -> None:
        """Log the scores of a split, and begin to count anew."""
        meter = self.meters[split]
        scores: SegmentationScores = meter.compute()  # type: ignore[operator]
        meter.reset()  # type: ignore[operator]
        if scores.labelled_pixels == 0 and not self.trainer.sanity_checking:
            hint = "; its labels are not public, take the val split: gingham validate" if split == "test" else ""
            raise DataError(f"the {split} split has no labelled pixels{hint}")
        self.scores[split] = scores
        self.log(f"{split}_miou", scores.miou, prog_bar=True)
        self.log(f"{split}_pixel_accuracy", scores.pixel_accuracy)
        self.log(f"{split}_mean_accuracy", scores.mean_accuracy)
        for index, iou in enumerate(scores.iou.tolist()):
            self.log(f"{split}_iou/{index:02d}", iou)
        if self.report_classes:
            focus = scores.iou[list(self.report_classes)].nanmean()
            self.log(f"{split}_focus_iou", focus, prog_bar=True)
        if split in self.boundary_meters:
            boundary = self.boundary_meters[split]
            self.boundary_scores[split] = boundary.compute()  # type: ignore[operator]
            boundary.reset()  # type: ignore[operator]
            self.log(f"{split}_boundary_iou", self.boundary_scores[split].mean)
