"""How CCNet is trained and evaluated: https://arxiv.org/abs/1811.11721, sections 3.3 and 4.1, and the official code.

for each step t of T:
    logits, auxiliary = network(images)                        R loops of criss-cross attention
    loss = cross_entropy(logits) + 0.4 cross_entropy(auxiliary)   (+ category-consistent loss)
    SGD with momentum, learning rate lr (1 - t / T)^0.9
"""

from __future__ import annotations

from typing import Any, Literal

import lightning
import torch
from torch import Tensor, nn

from gingham.data.segmentation import SegmentationItem
from gingham.methods.ccnet.network import CCNet
from gingham.methods.ccnet.objective import HardPixels, category_consistent_loss, segmentation_loss
from gingham.metrics import SegmentationMeter
from gingham.nn.inference import multi_scale_flip, sliding_window, whole_image


class CCNetRecipe(lightning.LightningModule):
    """Trains and evaluates a `CCNet`.

    Args:
        network: options of `gingham.methods.ccnet.network.CCNet`.
        optimizer: "sgd" (momentum 0.9, the paper's) or "adamw".
        learning_rate: at step 0.
        weight_decay: on every parameter.
        power: of the polynomial schedule.
        warmup_steps: steps in which the learning rate rises from 0. The official code has none.
        gamma_rate: factor on the learning rate of the attention's scale gamma.
        auxiliary_weight: of the auxiliary head's loss.
        hard_pixels: select hard pixels for the main loss (OHEM), or None.
        category_weights: weights of the category-consistent loss's variance, distance and regularisation terms, or None
            to leave the loss out. The network then needs `category_channels`.
        evaluation: images "whole" or in "sliding" tiles.
        tile: side of the tiles.
        scales: over which logits are averaged in evaluation.
        flip: whether mirrored images are averaged too.
        report_classes: class indices whose mean IoU is logged as ``focus_iou``.
        skip_absent: leave classes that occur nowhere out of the mean IoU.
    """

    def __init__(
        self,
        network: dict[str, Any],
        optimizer: Literal["sgd", "adamw"] = "sgd",
        learning_rate: float = 0.01,
        weight_decay: float = 1e-4,
        power: float = 0.9,
        warmup_steps: int = 0,
        gamma_rate: float = 1.0,
        auxiliary_weight: float = 0.4,
        hard_pixels: HardPixels | None = None,
        category_weights: tuple[float, float, float] | None = None,
        evaluation: Literal["whole", "sliding"] = "whole",
        tile: int = 769,
        scales: tuple[float, ...] = (1.0,),
        flip: bool = False,
        report_classes: tuple[int, ...] = (),
        skip_absent: bool = False,
    ) -> None:
        super().__init__()
        self.network = CCNet(**network)
        self.network_options = dict(network)
        self.optimizer, self.learning_rate, self.weight_decay = optimizer, learning_rate, weight_decay
        self.power, self.warmup_steps, self.gamma_rate = power, warmup_steps, gamma_rate
        self.auxiliary_weight, self.hard_pixels, self.category_weights = auxiliary_weight, hard_pixels, category_weights
        self.evaluation, self.tile, self.scales, self.flip = evaluation, tile, tuple(scales), flip
        self.report_classes = tuple(report_classes)
        classes = int(network.get("num_classes", 19))
        self.meters = nn.ModuleDict(
            {split: SegmentationMeter(classes, skip_absent=skip_absent) for split in ("val", "test")}
        )
        self._random_state: Tensor | None = None

    # -------------------------------------------------------------------------------------------- training

    def training_step(self, batch: SegmentationItem, batch_index: int) -> Tensor:
        images, labels = batch["image"], batch["label"]
        output = self.network(images.contiguous(memory_format=torch.channels_last))
        loss = segmentation_loss(output, labels, hard_pixels=self.hard_pixels, auxiliary_weight=self.auxiliary_weight)
        if self.category_weights is not None:
            terms = category_consistent_loss(output.features, labels)
            loss = loss + sum(weight * term for weight, term in zip(self.category_weights, terms, strict=True))
        self.log("loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def configure_optimizers(self) -> Any:
        gammas = [p for name, p in self.network.named_parameters() if name.endswith("gamma")]
        others = [p for name, p in self.network.named_parameters() if not name.endswith("gamma")]
        groups: Any = [{"params": others}]
        if gammas:
            groups.append({"params": gammas, "lr": self.learning_rate * self.gamma_rate})
        if self.optimizer == "sgd":
            optimizer: Any = torch.optim.SGD(
                groups, lr=self.learning_rate, momentum=0.9, weight_decay=self.weight_decay
            )
        else:
            optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, weight_decay=self.weight_decay)
        total = max(1, int(self.trainer.estimated_stepping_batches))

        def factor(step: int) -> float:
            rise = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
            return float(rise * max(0.0, 1 - step / total) ** self.power)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        if self._random_state is not None:  # resumed: dropout goes on where it was
            torch.set_rng_state(self._random_state)
            self._random_state = None

    # -------------------------------------------------------------------------------------------- evaluation

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K, H, W] of images [B, 3, H, W], by the recipe's way of evaluation."""

        def network(x: Tensor) -> Tensor:
            logits: Tensor = self.network(x.contiguous(memory_format=torch.channels_last)).logits
            return logits

        def one_scale(x: Tensor) -> Tensor:
            return (
                sliding_window(network, x, tile=self.tile) if self.evaluation == "sliding" else whole_image(network, x)
            )

        if self.scales == (1.0,) and not self.flip:
            return one_scale(images)
        return multi_scale_flip(one_scale, images, scales=self.scales, flip=self.flip)

    def _evaluate(self, batch: SegmentationItem, split: str) -> None:
        self.meters[split].update(self(batch["image"]).argmax(1), batch["label"])  # type: ignore[operator]

    def _report(self, split: str) -> None:
        meter = self.meters[split]
        scores = meter.compute()  # type: ignore[operator]
        meter.reset()  # type: ignore[operator]
        self.log(f"{split}_miou", scores.miou, prog_bar=True)
        self.log(f"{split}_pixel_accuracy", scores.pixel_accuracy)
        for index, iou in enumerate(scores.iou.tolist()):
            self.log(f"{split}_iou/{index:02d}", iou)
        if self.report_classes:
            focus = scores.iou[list(self.report_classes)].mean()
            self.log(f"{split}_focus_iou", focus, prog_bar=True)

    def validation_step(self, batch: SegmentationItem, batch_index: int) -> None:
        self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def test_step(self, batch: SegmentationItem, batch_index: int) -> None:
        self._evaluate(batch, "test")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    # -------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["random_state"] = torch.get_rng_state()
        checkpoint["network_options"] = self.network_options

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._random_state = checkpoint.get("random_state")
