"""How a classifier is trained and evaluated; by itself the ordinary training, with the callback Drop-and-Pick.

for each step:
    loss of each image = cross-entropy of network(image) and label       (the batch's mean is what is learned)
    SGD with momentum, learning rate divided by 10 at milestones, which are epochs, or falling as a polynomial
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from gingham.errors import DataError
from gingham.methods.dap.network import Classifier
from gingham.methods.network_recipe import NetworkRecipe


class ClassificationScores(NamedTuple):
    """How many images of a split were classified rightly, as shares of 1."""

    accuracy: Tensor  # of all images
    top5: Tensor | None  # whose class is among the five likeliest; None with five classes or fewer
    class_accuracy: Tensor  # [K], of the images of each class; NaN where there are none


class ClassificationRecipe(NetworkRecipe):
    """Trains and evaluates a `Classifier` on batches of images and labels from any loader.

    It logs ``loss`` and, after ``val_`` or ``test_``, ``accuracy`` and, with more than five classes, ``top5``. The
    whole scores of a split are kept in `scores`.

    Args:
        network: options of `gingham.methods.dap.network.Classifier`.
        milestones: epochs at which the learning rate is divided by 10, instead of the polynomial schedule.
        label_smoothing: share of each label that is spread over all classes, 0 to below 1. What ranks images is the
            cross-entropy without it.
        mixup: parameter of the Beta distribution by which images are mixed in pairs, or 0 for none.
        rank_mixed: allow drop-and-pick with `mixup`: an image then counts as hard by its share of the mixture's loss,
            that is the mixture's cross-entropy to its class, times its share in the mixture.
        options: of `gingham.methods.network_recipe.NetworkRecipe`.

    Raises:
        ValueError: an argument outside its range.
        BackboneError: a backbone that does not exist or does not have an option.

    Source: the usual training of classifiers; the paper's own is not confirmed.

    Example:
        >>> recipe = ClassificationRecipe({"backbone": "small", "num_classes": 10})
        >>> recipe.eval()(torch.randn(1, 3, 28, 28)).shape
        torch.Size([1, 10])
    """

    #: What the best checkpoint is chosen by.
    monitor = "val_accuracy"

    def __init__(
        self,
        network: dict[str, Any],
        milestones: tuple[int, ...] = (),
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        rank_mixed: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(Classifier, network, **options)
        if list(milestones) != sorted(set(milestones)) or not all(epoch > 0 for epoch in milestones):
            raise ValueError(f"milestones must be ascending epochs above 0, got {tuple(milestones)}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
        self.require_not_negative(mixup=mixup)
        if rank_mixed and not mixup:
            raise ValueError("rank_mixed does nothing without mixup; leave it out")
        self.milestones, self.label_smoothing = tuple(milestones), label_smoothing
        self.mixup, self.rank_mixed = mixup, rank_mixed
        self.meters = nn.ModuleDict({split: _meters(self.num_classes) for split in ("val", "test")})
        #: Of "val" and "test", from the last evaluation.
        self.scores: dict[str, ClassificationScores] = {}

    # -------------------------------------------------------------------------------------------- training

    def setup(self, stage: str) -> None:
        names: Sequence[str] | None = getattr(self.trainer.datamodule, "class_names", None)  # type: ignore[attr-defined]
        if names is not None and len(names) != self.num_classes:
            raise DataError(f"the network has num_classes {self.num_classes}, the data set has {len(names)} classes")

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.observe is not None and self.mixup and not self.rank_mixed:
            raise DataError(
                "images that mixup mixes have no loss of their own to rank them by; set model.mixup to 0, or "
                "model.rank_mixed to true to rank an image by its share of the mixture's loss"
            )

    def gives_item_losses(self) -> bool:
        return True

    def rate_factor(self, step: int, total: int) -> float:
        if not self.milestones:
            return super().rate_factor(step, total)
        if self.pace is not None:
            steps = total / (self.trainer.max_epochs or 1)
        else:  # also where max_steps ends the training; before the loader is there, all steps are of the first epoch
            steps = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
            steps = math.ceil(steps) if math.isfinite(steps) else steps
        return float(0.1 ** sum(step >= epoch * steps for epoch in self.milestones))

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        images, labels = batch["image"], batch["label"]
        share, order = 1.0, torch.arange(len(images), device=images.device)
        if self.mixup:
            share = torch.distributions.Beta(self.mixup, self.mixup).sample().item()
            order = torch.randperm(len(images)).to(images.device)
            images = share * images + (1 - share) * images[order]
        logits = self.network(images.contiguous(memory_format=torch.channels_last)).float()

        def loss_of(targets: Tensor, smoothing: float) -> Tensor:
            return F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")

        losses = loss_of(labels, self.label_smoothing)
        if self.mixup:
            losses = share * losses + (1 - share) * loss_of(labels[order], self.label_smoothing)
        if self.observe is not None:
            with torch.no_grad():
                self.observe(batch, share * loss_of(labels, 0.0))
        loss = losses.mean()
        self.log("loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    # -------------------------------------------------------------------------------------------- evaluation

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of images [B, 3, H, W]."""
        logits: Tensor = self.network(images.contiguous(memory_format=torch.channels_last)).float()
        return logits

    def views(self, item: Any) -> dict[str, Tensor]:
        """What pictures show of a data set's item beside its truth: the likeliest class, a single number."""
        return {"prediction": self(item["image"][None].to(self.device)).argmax(1)[0].cpu()}

    def evaluate(self, batch: Any, split: str) -> None:
        """Count a batch of "val" or "test" in the meters."""
        self.meters[split].update(self(batch["image"]), batch["label"])  # type: ignore[operator]

    def report(self, split: str) -> None:
        """Log the scores of a split, and begin to count anew."""
        meters = self.meters[split]
        found: dict[str, Tensor] = meters.compute()  # type: ignore[operator]
        meters.reset()  # type: ignore[operator]
        self.scores[split] = ClassificationScores(found["accuracy"], found.get("top5"), found["class_accuracy"])
        self.log(f"{split}_accuracy", found["accuracy"], prog_bar=True)
        if "top5" in found:
            self.log(f"{split}_top5", found["top5"])


class _ClassAccuracy(MulticlassAccuracy):
    """NaN, not 0, for a class that no image is of."""

    def compute(self) -> Tensor:
        found: Tensor = super().compute()
        return found.where(self.tp + self.fn > 0, torch.nan)  # type: ignore[operator]


def _meters(count: int) -> MetricCollection:
    options: dict[str, Any] = {"num_classes": count, "ignore_index": -1}  # the label of what fills a split up
    meters: dict[str, Metric | MetricCollection] = {
        "accuracy": MulticlassAccuracy(average="micro", **options),
        "class_accuracy": _ClassAccuracy(average="none", **options),
    }
    if count > 5:
        meters["top5"] = MulticlassAccuracy(top_k=5, average="micro", **options)
    return MetricCollection(meters, compute_groups=False)
