"""How PDML is trained and evaluated: https://arxiv.org/abs/1811.02233.

for each step:
    logits, features = network(images)                               read at the labelled points only
    loss = cross_entropy(logits) + distance_metric(features)         of the points of all images of the batch
    from 40 % of the training on:  + cross_entropy(logits, pixels that the network is sure of)

That there is a point-wise cross-entropy and a distance metric across images is confirmed. Formula, weights, schedule
and the rule by which labels are extended are not; all are options.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gingham.errors import DataError
from gingham.methods.pdml.extension import ExtendedLabels, extend_labels, surest_pixels
from gingham.methods.pdml.memory import FeatureMemory
from gingham.methods.pdml.network import PDML, PDMLOutput
from gingham.methods.pdml.objective import (
    MetricTerms,
    PointPool,
    contrastive_metric,
    gather_rows,
    global_mean,
    point_cross_entropy,
    pool_points,
    prototype_metric,
    triplet_metric,
)
from gingham.methods.segmentation_recipe import Refinement, SegmentationRecipe
from gingham.metrics.embedding_purity import EmbeddingPurity
from gingham.nn.point_sampling import sample_at_points
from gingham.nn.segmentation_loss import cross_entropy, shrink_labels, upsample_logits

_METRICS = {"triplet": triplet_metric, "contrastive": contrastive_metric, "prototype": prototype_metric}
_MARGINS = {"triplet": 0.3, "contrastive": 1.0, "prototype": 0.3}


@dataclass(frozen=True)
class DistanceMetric:
    """Which distance metric loss is used, on what, and from when.

    Args:
        form: "triplet", "contrastive" or "prototype", the functions of these names in
            `gingham.methods.pdml.objective`.
        weight: of the loss, 0 or more.
        warmup_epochs: epochs with the cross-entropy alone before.
        scope: compare the points of the "batch" of all processes, or those of one "image" only.
        margin: above 0; None for 0.3, or 1.0 with "contrastive".
        normalise: scale features to length 1.
        squared: take the square of the distance; not with "contrastive", which has it.
        mining: "triplet" only: "all" triplets, or the "hardest" of each anchor.
        average: over the triplets that cost something ("active"), or over "all"; not with "contrastive".
        memory: earlier features of each class that are compared too, 0 for none. Needs the scope "batch".

    Raises:
        ValueError: a number outside its range, an unknown name, or options that do not go together.

    Source: that there is a metric across images is confirmed; its form, weight and memory are not.

    Example:
        >>> metric = DistanceMetric("contrastive", margin=0.5)
        >>> metric(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])).loss
        tensor(0.)
    """

    form: Literal["triplet", "contrastive", "prototype"] = "triplet"
    weight: float = 1.0
    warmup_epochs: int = 1
    scope: Literal["batch", "image"] = "batch"
    margin: float | None = None
    normalise: bool = True
    squared: bool = False
    mining: Literal["all", "hardest"] = "all"
    average: Literal["active", "all"] = "active"
    memory: int = 0

    def __post_init__(self) -> None:
        for name, value, valid in (
            ("form", self.form, tuple(_METRICS)),
            ("scope", self.scope, ("batch", "image")),
            ("mining", self.mining, ("all", "hardest")),
            ("average", self.average, ("active", "all")),
        ):
            if value not in valid:
                raise ValueError(f"{name} must be one of {', '.join(valid)}, got {value!r}")
        SegmentationRecipe.require_not_negative(
            weight=self.weight, warmup_epochs=self.warmup_epochs, memory=self.memory
        )
        if self.margin is not None and not self.margin > 0:
            raise ValueError(f"margin must be above 0, got {self.margin}")
        if self.form != "triplet" and self.mining != "all":
            raise ValueError(f"mining is of the form 'triplet' only, got {self.mining!r} with {self.form!r}")
        if self.form == "contrastive" and (self.squared or self.average != "active"):
            raise ValueError("squared and average are not of the form 'contrastive'")
        if self.memory and self.scope == "image":
            raise ValueError(f"memory must be 0 with the scope 'image', got {self.memory}")

    def __call__(self, features: Tensor, labels: Tensor, **others: Any) -> MetricTerms:
        """The loss of features [M, D] and labels [M]; `others` are ``images`` and ``memory``."""
        options: dict[str, Any] = {"margin": self.margin or _MARGINS[self.form], "normalise": self.normalise}
        if self.form != "contrastive":
            options |= {"squared": self.squared, "average": self.average}
        if self.form == "triplet":
            options["mining"] = self.mining
        return _METRICS[self.form](features, labels, **options, **others)


@dataclass(frozen=True)
class LabelExtension:
    """When and how pixels that the network is sure of become labels, see `gingham.methods.pdml.extension`.

    Args:
        weight: of their cross-entropy, 0 or more.
        begin: share of the training after which it begins, 0 to 1.
        ramp_epochs: epochs in which the weight rises linearly, 0 or more.
        threshold: least probability of a pixel's class; above 1 there are none.
        largest_share: of an image's pixels that one class may get, above 0.
        metric_pixels: pixels of each class and image that join the distance metric, 0 for none.

    Raises:
        ValueError: a number outside its range.

    Source: an "online extension" is known by name only; the rule and its numbers are ours.

    Example:
        >>> LabelExtension(threshold=0.6).begin
        0.4
    """

    weight: float = 1.0
    begin: float = 0.4
    ramp_epochs: float = 2.0
    threshold: float = 0.9
    largest_share: float = 0.2
    metric_pixels: int = 0

    def __post_init__(self) -> None:
        SegmentationRecipe.require_not_negative(
            weight=self.weight,
            ramp_epochs=self.ramp_epochs,
            threshold=self.threshold,
            metric_pixels=self.metric_pixels,
        )
        if not 0 <= self.begin <= 1:
            raise ValueError(f"begin must be between 0 and 1, got {self.begin}")
        if not self.largest_share > 0:
            raise ValueError(f"largest_share must be above 0, got {self.largest_share}")


class PDMLRecipe(SegmentationRecipe):
    """Trains and evaluates a `PDML` network on batches of images and points.

    Images, logits and features are resized and read as the network resizes its maps, by its ``align_corners``.

    Batches have "points" [B, N, 3], see `gingham.data.points.collate_points`. Beside what every segmentation recipe
    logs, it logs ``loss_points``, ``loss_metric``, ``metric_mean``, ``metric_active``, ``loss_extension``,
    ``extension_coverage``, ``extension_accuracy`` (where there are masks), ``images_without_points``, and, with
    `purity_pixels`, ``purity`` and ``distance_ratio`` after ``val_`` or ``test_``, see
    `gingham.metrics.embedding_purity.EmbeddingPurity`.

    Args:
        network: options of `gingham.methods.pdml.network.PDML`.
        metric: the distance metric loss, or None for the baseline without it.
        extension: the extension of labels, or None.
        supervision: learn from "points", or, as an upper bound, from all "labels" in place of the point cross-entropy.
        point_average: cross-entropy over all "points", or over each image's and then over "images".
        auxiliary_weight: of the auxiliary head's loss, 0 or more.
        backbone_rate: factor on the learning rate of the backbone, 0 or more.
        purity_pixels: pixels of each class and image from which the purity of features is measured, 0 to leave it out.
            It costs the network a second pass over the evaluated images.
        average: of scales and mirrored images in evaluation: of their "logits" or "probabilities".
        options: of `gingham.methods.segmentation_recipe.SegmentationRecipe`.

    Raises:
        ValueError: an argument outside its range, or arguments that do not fit together.
        BackboneError: a backbone that does not exist or does not have an option.

    Source: the file's head says what of it is confirmed.

    Example:
        >>> recipe = PDMLRecipe({"backbone": "small", "num_classes": 6, "output_stride": 4}, metric=DistanceMetric())
        >>> recipe.eval()(torch.randn(1, 3, 32, 48)).shape
        torch.Size([1, 6, 32, 48])
    """

    def __init__(
        self,
        network: dict[str, Any],
        metric: DistanceMetric | None = None,
        extension: LabelExtension | None = None,
        supervision: Literal["points", "labels"] = "points",
        point_average: Literal["points", "images"] = "points",
        auxiliary_weight: float = 0.4,
        backbone_rate: float = 1.0,
        purity_pixels: int = 0,
        average: Literal["logits", "probabilities"] = "probabilities",
        **options: Any,
    ) -> None:
        super().__init__(PDML, network, average=average, **options)
        if supervision not in ("points", "labels"):
            raise ValueError(f"supervision must be 'points' or 'labels', got {supervision!r}")
        if point_average not in ("points", "images"):
            raise ValueError(f"point_average must be 'points' or 'images', got {point_average!r}")
        self.require_not_negative(
            auxiliary_weight=auxiliary_weight, backbone_rate=backbone_rate, purity_pixels=purity_pixels
        )
        if extension is not None and supervision == "labels":
            raise ValueError("extension is of points: leave it out with supervision 'labels'")
        if metric is None and network.get("metric_channels") is not None:
            raise ValueError("metric must be given where the network has metric_channels, got None")
        self.metric, self.extension = metric, extension
        self.supervision, self.point_average = supervision, point_average
        self.auxiliary_weight, self.backbone_rate = auxiliary_weight, backbone_rate
        self.memory = (
            FeatureMemory(self.num_classes, int(self.network.feature_channels), metric.memory)
            if metric is not None and metric.memory
            else None
        )
        self._steps, self._steps_of_an_epoch = 1, 1.0
        self.purity_meters = nn.ModuleDict(
            {
                split: EmbeddingPurity(purity_pixels, align_corners=self.network.align_corners)
                for split in ("val", "test")
                if purity_pixels
            }
        )

    def learns_labels(self) -> bool:
        return self.supervision == "labels"

    def corners_align(self, size: tuple[int, int] | torch.Size) -> bool:
        return bool(self.network.align_corners)

    def parameter_groups(self) -> list[dict[str, Any]]:
        backbone = [p for name, p in self.network.named_parameters() if name.startswith("backbone.")]
        others = [p for name, p in self.network.named_parameters() if not name.startswith("backbone.")]
        return [{"params": backbone, "lr": self.learning_rate * self.backbone_rate}, {"params": others}]

    # -------------------------------------------------------------------------------------------- training

    def on_train_start(self) -> None:
        super().on_train_start()
        self._steps = int(self.trainer.estimated_stepping_batches)
        self._steps_of_an_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches

    def loss(self, output: PDMLOutput, batch: Any, refined: Refinement | None) -> Tensor:
        images = batch["image"]
        size, count = images.shape[-2:], len(images)
        read = partial(sample_at_points, size=size, align_corners=self.network.align_corners)
        log = partial(self.log, batch_size=count)
        if self.supervision == "labels":
            loss = self._label_loss(output, batch["label"], refined)
            if self.metric is None:
                return loss
        if "points" not in batch:
            raise DataError("the batches have no points: name a point file or a rule with --data.points")
        pool = pool_points(batch["points"])
        if self.supervision == "points":
            if refined is not None:
                raise ValueError("refined labels need supervision 'labels': points cannot be mixed with them")
            loss = point_cross_entropy(read(output.logits, *pool[:3]), pool, average=self.point_average)
            log("loss_points", loss)
            if output.auxiliary is not None:
                auxiliary = read(output.auxiliary, *pool[:3])
                loss = loss + self.auxiliary_weight * point_cross_entropy(auxiliary, pool, average=self.point_average)
        log("images_without_points", 1 - len(pool.image.unique()) / count)

        extended = None
        if self.extension is not None and (share := self._extension_share()) > 0:
            extended = self._extended(output.logits, pool, images)
            labelled = extended.labels != 255
            total = cross_entropy(output.logits, extended.labels) * labelled.sum()
            extension_loss = global_mean(total, labelled.sum())
            loss = loss + self.extension.weight * share * extension_loss
            log("loss_extension", extension_loss)
            log("extension_coverage", labelled.float().mean())
            truth = self._shrunk(batch["label"], extended.labels.shape[-2:])
            known = labelled & (truth != 255)
            if known.any():
                log("extension_accuracy", (truth == extended.labels)[known].float().mean())
        if self.metric is not None:
            terms = self._metric_terms(output.features, read(output.features, *pool[:3]), pool, extended)
            # In the warm-up too it is part of the loss: processes wait for the gradient of a projection.
            weight = self.metric.weight if self.current_epoch >= self.metric.warmup_epochs else 0.0
            loss = loss + weight * terms.loss
            log("loss_metric", terms.loss)
            log("metric_mean", terms.mean_over_all)
            log("metric_active", terms.active)
        return loss

    def _label_loss(self, output: PDMLOutput, labels: Tensor, refined: Refinement | None) -> Tensor:
        soft = None if refined is None else refined.labels

        def term(logits: Tensor) -> Tensor:
            full = upsample_logits(logits, labels.shape[-2:], align_corners=self.network.align_corners)
            return cross_entropy(full, labels, soft=soft)

        loss = term(output.logits)
        return loss if output.auxiliary is None else loss + self.auxiliary_weight * term(output.auxiliary)

    def _metric_terms(
        self, maps: Tensor, features: Tensor, pool: PointPool, extended: ExtendedLabels | None
    ) -> MetricTerms:
        """The distance metric over the points of all processes, and of pixels that became labels."""
        assert self.metric is not None
        labels, image = pool.label, pool.image
        if extended is not None and self.extension is not None and self.extension.metric_pixels:
            at = surest_pixels(extended, self.extension.metric_pixels)
            features = torch.cat([features, maps.movedim(1, -1)[at].to(features)])
            labels = torch.cat([labels, extended.labels[at]])
            image = torch.cat([image, at[0]])
        several = dist.is_available() and dist.is_initialized()
        rank, processes = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        features, labels, image = (gather_rows(rows) for rows in (features, labels, image * processes + rank))
        if self.metric.scope == "image":
            return self.metric(features, labels, images=image)
        if self.memory is None:
            return self.metric(features, labels)
        terms = self.metric(features, labels, memory=self.memory.contents())
        self.memory.push(features, labels)
        return terms

    def _extended(self, logits: Tensor, pool: PointPool, images: Tensor) -> ExtendedLabels:
        assert self.extension is not None
        # Padding is exactly 0 after normalisation, in all channels; a photograph's pixel is not.
        padding = self._shrunk((images == 0).all(dim=1).long(), logits.shape[-2:])
        return extend_labels(
            logits,
            pool,
            images.shape[-2:],
            threshold=self.extension.threshold,
            largest_share=self.extension.largest_share,
            valid=padding == 0,
            align_corners=self.network.align_corners,
        )

    def _shrunk(self, labels: Tensor, size: torch.Size) -> Tensor:
        return shrink_labels(labels, size, align_corners=self.network.align_corners)

    def _extension_share(self) -> float:
        """The share of its weight that the extension has at this step: 0 before it begins, 1 after the ramp."""
        assert self.extension is not None
        since = self.global_step - self.extension.begin * self._steps
        if since < 0:
            return 0.0
        ramp = self.extension.ramp_epochs * self._steps_of_an_epoch
        return min(1.0, (since + 1) / ramp) if ramp else 1.0

    # -------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, batch: Any, split: str) -> None:
        super().evaluate(batch, split)
        if split in self.purity_meters:
            features = self.network(batch["image"].contiguous(memory_format=torch.channels_last)).features
            self.purity_meters[split].update(features, batch["label"])  # type: ignore[operator]

    def report(self, split: str) -> None:
        super().report(split)
        if split in self.purity_meters:
            meter = self.purity_meters[split]
            scores = meter.compute()  # type: ignore[operator]
            meter.reset()  # type: ignore[operator]
            self.log(f"{split}_purity", scores.purity)
            self.log(f"{split}_distance_ratio", scores.distance_ratio)
