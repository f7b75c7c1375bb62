"""How SeeNet is trained and evaluated: https://arxiv.org/abs/1810.09821.

for each step:
    M_A, M_B, M_C = network(images, tags)                    whole, self-erased, and background alone
    loss = logistic(mean M_A, tags) + logistic(mean M_B, tags) + logistic(mean M_C, nothing)
    SGD with momentum; biases at twice the learning rate and without decay

All branches learn from the first step on, as the authors say. The deploy network is the only official code: optimiser,
rates, schedule and weights of the losses are not confirmed, and are options.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import BinaryAveragePrecision, MultilabelAveragePrecision

from gingham.data.segmentation import FolderSegmentation
from gingham.errors import DataError
from gingham.methods.network_recipe import NetworkRecipe
from gingham.methods.seenet.attention import Attention, attend
from gingham.methods.seenet.network import SeeNet
from gingham.methods.seenet.objective import branch_losses
from gingham.methods.seenet.seeds import SeedRule
from gingham.metrics import AttentionMeter, AttentionScores, SegmentationScores

_WITHOUT_MASKS = "the {split} split has no masks to evaluate attention by; train with --trainer.limit_val_batches 0"


class SeeNetRecipe(NetworkRecipe):
    """Trains a `SeeNet` on batches of images and tags, and measures its attention by masks where there are any.

    It logs ``loss``, a loss for each branch, ``erased`` and ``background`` (shares of places in these zones) and
    ``unattended`` (share of tagged classes whose map has no positive value, so that all counts as background). After
    ``val_`` or ``test_`` come ``miou`` and ``object_iou`` (with and without the background, of attention that reaches
    the threshold), ``seed_iou`` (the latter at 0.3, from where on the rule of seeds counts attention), ``precision``,
    ``recall``, ``leakage`` (share of the attention on the background), ``threshold``, ``tag_precision`` (mean average
    precision of the image's classes) and ``iou/NN`` of every class.

    Args:
        network: options of `gingham.methods.seenet.network.SeeNet`.
        loss_weights: of the three branches, 0 or more.
        branch_warmup: optimiser steps in which the first branch learns alone. The authors have none; a backbone that is
            not pretrained has no attention to erase by at first.
        bias_rate: factor on the learning rate of biases, 0 or more; they have no weight decay.
        milestones: optimiser steps at which the learning rate is divided by 10, instead of the polynomial schedule.
        attention_size: side of the square that pictures are resized to in evaluation, or None to leave them.
        flip: whether mirrored pictures are looked at too in evaluation.
        per_class_zones: build the zones of each class in evaluation from its map alone.
        threshold: attention from which on a pixel counts as an object; None for the best one of the last validation,
            which a checkpoint keeps.
        options: of `gingham.methods.network_recipe.NetworkRecipe`.

    Raises:
        ValueError: an argument outside its range.
        BackboneError: a backbone that does not exist or does not have an option.
    """

    threshold: Tensor  # scalar

    def __init__(
        self,
        network: dict[str, Any],
        loss_weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
        branch_warmup: int = 0,
        bias_rate: float = 2.0,
        milestones: tuple[int, ...] = (),
        attention_size: int | None = 256,
        flip: bool = True,
        per_class_zones: bool = False,
        threshold: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(SeeNet, network, **options)
        if len(loss_weights) != 3 or min(loss_weights) < 0:
            raise ValueError(f"loss_weights must be three numbers of 0 or more, got {tuple(loss_weights)}")
        self.require_not_negative(branch_warmup=branch_warmup, bias_rate=bias_rate)
        if not all(step > 0 for step in milestones):
            raise ValueError(f"milestones must be steps above 0, got {tuple(milestones)}")
        if attention_size is not None and attention_size < 1:
            raise ValueError(f"attention_size must be 1 pixel or more, got {attention_size}")
        if threshold is not None and not 0 < threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}")
        self.loss_weights, self.branch_warmup = tuple(loss_weights), branch_warmup
        self.bias_rate, self.milestones = bias_rate, tuple(milestones)
        self.attention_size, self.flip, self.per_class_zones = attention_size, flip, per_class_zones
        self.calibrate = threshold is None
        self.register_buffer("threshold", torch.tensor(0.5 if threshold is None else threshold))
        splits = ("val", "test")
        self.meters = nn.ModuleDict({split: AttentionMeter(self.num_classes) for split in splits})
        self.tag_meters = nn.ModuleDict({split: _tag_meter(self.num_classes) for split in splits})
        #: Of "val" and "test", from the last evaluation: over all thresholds, and at the one in use.
        self.attention_scores: dict[str, AttentionScores] = {}
        self.scores: dict[str, SegmentationScores] = {}

    # -------------------------------------------------------------------------------------------- training

    def setup(self, stage: str) -> None:
        label_space = getattr(self.trainer.datamodule, "label_space", None)  # type: ignore[attr-defined]
        if label_space is not None and label_space().num_classes != self.num_classes + 1:
            raise DataError(
                f"the network has num_classes {self.num_classes}, the data set has {label_space().num_classes} "
                "classes with the background"
            )
        if stage == "fit" and self.trainer.limit_val_batches != 0 and label_space is not None:
            self._require_masks(self.trainer.datamodule.dataset("val"), "val")  # type: ignore[attr-defined]

    @staticmethod
    def _require_masks(dataset: Any, split: str) -> None:
        """Files without any mask are found before the first epoch, not after it."""
        if isinstance(dataset, FolderSegmentation) and all(file.label is None for file in dataset.images):
            raise DataError(_WITHOUT_MASKS.format(split=split))

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        images, tags = batch["image"], _tags(batch)
        output = self.network(images.contiguous(memory_format=torch.channels_last), tags)
        terms = branch_losses(output, tags)
        others = float(self.global_step >= self.branch_warmup)  # weighed 0, they have gradients of 0 in every process
        first, second, third = self.loss_weights
        loss = first * terms.attended + others * (second * terms.potential + third * terms.background)
        shares = {f"loss_{name}": term for name, term in terms._asdict().items()}
        if output.zones is not None:
            shares["erased"] = (output.zones == 0).float().mean()
            shares["background"] = (output.zones == -1).float().mean()
        unattended = (output.attended.amax((-2, -1)) <= 0)[tags > 0]
        if len(unattended):
            shares["unattended"] = unattended.float().mean()
        self.log_dict(shares, batch_size=len(images))
        self.log("loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def parameter_groups(self) -> list[dict[str, Any]]:
        biases = [p for name, p in self.network.named_parameters() if name.endswith("bias")]
        weights = [p for name, p in self.network.named_parameters() if not name.endswith("bias")]
        return [{"params": weights}, {"params": biases, "lr": self.learning_rate * self.bias_rate, "weight_decay": 0.0}]

    def rate_factor(self, step: int, total: int) -> float:
        if not self.milestones:
            return super().rate_factor(step, total)
        return float(0.1 ** sum(step >= milestone for milestone in self.milestones))

    # -------------------------------------------------------------------------------------------- evaluation

    def attend(self, images: Tensor, tags: Tensor) -> Attention:
        """The attention of the tagged classes of images, by the recipe's way of evaluation.

        Args:
            images: [B, 3, H, W], normalised.
            tags: [B, C], above 0 where an image has the class.
        """
        return attend(
            self.network, images, tags, size=self.attention_size, flip=self.flip, per_class=self.per_class_zones
        )

    @torch.no_grad()
    def predict_tags(self, images: Tensor) -> Tensor:
        """The classes that the network finds in images: those of probability 0.5 or more, at least the likeliest.

        Args:
            images: [B, 3, H, W], normalised.

        Returns:
            [B, C] int64, 0 or 1.
        """
        logits = attend(
            self.network, images, images.new_zeros(len(images), self.num_classes), size=self.attention_size, flip=False
        ).logits
        return ((logits >= 0) | (logits == logits.amax(dim=1, keepdim=True))).long()

    def classes_of(self, attention: Tensor) -> Tensor:
        """The class of every pixel, [B, H, W], 0 for the background: the strongest that reaches the threshold."""
        strongest, kind = attention.max(dim=1)
        return torch.where(strongest >= self.threshold, kind + 1, 0)

    def views(self, item: Any) -> dict[str, Tensor]:
        """What pictures show of a data set's item: attention [H, W] of its strongest class, and classes [H, W]."""
        image = item["image"][None].to(self.device)
        tags = item["tags"][None].to(self.device) if "tags" in item else self.predict_tags(image)
        attention = self.attend(image, tags).maps
        return {"attention": attention.amax(dim=1)[0].cpu(), "prediction": self.classes_of(attention)[0].cpu()}

    def evaluate(self, batch: Any, split: str) -> None:
        """Count a batch of "val" or "test" in the meters."""
        tags = _tags(batch)
        attention = self.attend(batch["image"], tags)
        self.meters[split].update(attention.maps, batch["label"])  # type: ignore[operator]
        # Of logits, torchmetrics makes probabilities only where some in the batch are outside 0 to 1.
        self.tag_meters[split].update(attention.logits.sigmoid(), tags)  # type: ignore[operator]

    def report(self, split: str) -> None:
        """Log the scores of a split, and begin to count anew."""
        found: AttentionScores = self.meters[split].compute()  # type: ignore[operator]
        tag_precision = self.tag_meters[split].compute()  # type: ignore[operator]
        for meters in (self.meters, self.tag_meters):
            meters[split].reset()  # type: ignore[operator]
        if self.trainer.sanity_checking:
            return
        self.log(f"{split}_tag_precision", tag_precision.nan_to_num())
        if found.labelled_pixels == 0:
            raise DataError(_WITHOUT_MASKS.format(split=split))
        if split == "val" and self.calibrate:
            self.threshold.copy_(found.thresholds[found.best()])
        index = _nearest(found, float(self.threshold))
        scores = found.at(float(self.threshold))
        self.attention_scores[split], self.scores[split] = found, scores
        self.log(f"{split}_miou", scores.miou, prog_bar=True)
        for name in ("object_iou", "precision", "recall"):
            self.log(f"{split}_{name}", getattr(found, name)[index])
        self.log(f"{split}_seed_iou", found.object_iou[_nearest(found, SeedRule().least)])
        self.log(f"{split}_leakage", found.leakage)
        self.log(f"{split}_threshold", found.thresholds[index])
        for number, iou in enumerate(scores.iou.tolist()):
            self.log(f"{split}_iou/{number:02d}", iou)


def _tag_meter(count: int) -> Metric:
    if count == 1:
        return BinaryAveragePrecision(ignore_index=-1)
    return MultilabelAveragePrecision(count, ignore_index=-1)


def _nearest(scores: AttentionScores, threshold: float) -> int:
    return int((scores.thresholds - threshold).abs().argmin())


def _tags(batch: Any) -> Tensor:
    if "tags" not in batch:
        raise DataError("the batches have no tags: take a data set with image-level labels, such as voc_tags")
    tags: Tensor = batch["tags"]
    return tags
