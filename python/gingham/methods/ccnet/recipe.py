"""How CCNet is trained and evaluated: https://arxiv.org/abs/1811.11721, sections 3.3 and 4.1, and the official code.

for each step t of T:
    logits, auxiliary = network(images)                        R loops of criss-cross attention
    loss = cross_entropy(logits) + 0.4 cross_entropy(auxiliary)   (+ category-consistent loss)
    SGD with momentum, learning rate lr (1 - t / T)^0.9
"""

from __future__ import annotations

import inspect
import math
from typing import Any, Literal

import lightning
import torch
from torch import Tensor, nn

from gingham.data.segmentation import SegmentationItem
from gingham.errors import CheckpointError, DataError
from gingham.methods.ccnet.network import CCNet
from gingham.methods.ccnet.objective import HardPixels, category_consistent_loss, segmentation_loss
from gingham.metrics import SegmentationMeter
from gingham.nn.inference import multi_scale_flip, sliding_window, whole_image


class CCNetRecipe(lightning.LightningModule):
    """Trains and evaluates a `CCNet`.

    It takes batches of images and labels from any loader. It logs ``loss`` and, after ``val_`` or ``test_``, ``miou``,
    ``pixel_accuracy``, ``mean_accuracy``, ``iou/NN`` of every class and, with `report_classes`, ``focus_iou``.

    Args:
        network: options of `gingham.methods.ccnet.network.CCNet`. Its ``backbone_weights`` are read when a training
            begins; resuming, evaluating and predicting do without.
        optimizer: "sgd" (momentum 0.9, the paper's) or "adamw".
        learning_rate: at step 0, above 0.
        weight_decay: on every parameter, 0 or more.
        power: of the polynomial schedule, 0 or more.
        warmup_steps: steps in which the learning rate rises from 0. The official code has none.
        gamma_rate: factor on the learning rate of the attention's scale gamma, 0 or more.
        auxiliary_weight: of the auxiliary head's loss, 0 or more.
        hard_pixels: select hard pixels for the main loss (OHEM), or None.
        category_weights: weights of the category-consistent loss's variance, distance and regularisation terms, or None
            to leave the loss out. The network has ``category_channels`` if, and only if, they are given.
        evaluation: images "whole" or in "sliding" tiles.
        tile: side of the tiles in pixels.
        scales: factors of the image size over which logits are averaged in evaluation.
        flip: whether mirrored images are averaged too.
        report_classes: class indices whose mean IoU is logged as ``focus_iou``.
        skip_absent: leave classes that occur nowhere out of the mean IoU.

    Raises:
        ValueError: an argument outside its range, or arguments that do not fit together.
        BackboneError: a backbone that does not exist or does not have an option.
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
        if unknown := sorted(network.keys() - inspect.signature(CCNet).parameters.keys()):
            options = ", ".join(inspect.signature(CCNet).parameters)
            raise ValueError(f"network has no option {unknown[0]!r}: there are {options}")
        if optimizer not in ("sgd", "adamw"):
            raise ValueError(f"optimizer must be 'sgd' or 'adamw', got {optimizer!r}")
        if evaluation not in ("whole", "sliding"):
            raise ValueError(f"evaluation must be 'whole' or 'sliding', got {evaluation!r}")
        if not 0 < learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0, got {learning_rate}")
        ranges = {
            "weight_decay": weight_decay,
            "power": power,
            "warmup_steps": warmup_steps,
            "gamma_rate": gamma_rate,
            "auxiliary_weight": auxiliary_weight,
        }
        for name, value in ranges.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        if tile < 1:
            raise ValueError(f"tile must be 1 pixel or more, got {tile}")
        if not scales or not all(0 < scale < math.inf for scale in scales):
            raise ValueError(f"scales must be one or more numbers above 0, got {tuple(scales)}")
        if category_weights is not None and (len(category_weights) != 3 or min(category_weights) < 0):
            raise ValueError(f"category_weights must be three numbers of 0 or more, got {tuple(category_weights)}")
        if (category_weights is None) != (network.get("category_channels") is None):
            raise ValueError(
                "category_weights and network's category_channels come together: give both or neither, got "
                f"{category_weights} and {network.get('category_channels')}"
            )
        self.network = CCNet(**{**network, "backbone_weights": None})
        self.network_options = dict(network)
        self.num_classes = int(network.get("num_classes", 19))
        if not all(0 <= index < self.num_classes for index in report_classes):
            raise ValueError(
                f"report_classes must be between 0 and {self.num_classes - 1}, got {tuple(report_classes)}"
            )
        self.optimizer, self.learning_rate, self.weight_decay = optimizer, learning_rate, weight_decay
        self.power, self.warmup_steps, self.gamma_rate = power, warmup_steps, gamma_rate
        self.auxiliary_weight, self.hard_pixels, self.category_weights = auxiliary_weight, hard_pixels, category_weights
        self.evaluation, self.tile, self.scales, self.flip = evaluation, tile, tuple(scales), flip
        self.report_classes = tuple(report_classes)
        self.meters = nn.ModuleDict(
            {split: SegmentationMeter(self.num_classes, skip_absent=skip_absent) for split in ("val", "test")}
        )
        self._random_states: dict[str, Tensor] = {}

    def setup(self, stage: str) -> None:
        label_space = getattr(self.trainer.datamodule, "label_space", None)  # type: ignore[attr-defined]
        if label_space is not None and (classes := label_space().num_classes) != self.num_classes:
            raise DataError(f"the network has num_classes {self.num_classes}, the data set has {classes} classes")

    def on_fit_start(self) -> None:
        if self.network_options.get("backbone_weights") and self.trainer.ckpt_path is None:
            self.network.backbone.load_state_dict(CCNet(**self.network_options).backbone.state_dict())

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
        # Resumed: dropout goes on where it was.
        if "cpu" in self._random_states:
            torch.set_rng_state(self._random_states["cpu"])
        if "cuda" in self._random_states and self.device.type == "cuda":
            torch.cuda.set_rng_state(self._random_states["cuda"], self.device)
        self._random_states = {}

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
        if scores.labelled_pixels == 0 and not self.trainer.sanity_checking:
            hint = "; its labels are not public, take the val split: gingham validate" if split == "test" else ""
            raise DataError(f"the {split} split has no labelled pixels{hint}")
        self.log(f"{split}_miou", scores.miou, prog_bar=True)
        self.log(f"{split}_pixel_accuracy", scores.pixel_accuracy)
        self.log(f"{split}_mean_accuracy", scores.mean_accuracy)
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
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint["random_states"] = states
        checkpoint["network_options"] = self.network_options
        checkpoint["optimizer"] = self.optimizer

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        optimizer = checkpoint.get("optimizer", self.optimizer)
        if self.trainer.state.fn == "fit" and optimizer != self.optimizer:
            raise CheckpointError(f"the checkpoint is of a run with optimizer {optimizer}, not {self.optimizer}")
        self._random_states = checkpoint.get("random_states", {})
