"""What the training of every network shares: optimiser, schedule, pretrained weights, and states to resume from.

for each step t of T:
    loss = the method's loss of network and batch
    SGD, Adam or AdamW, learning rate lr (1 - t / T)^power, or another schedule of the method's
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import lightning
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from gingham.data.batch_order import mixed_seed
from gingham.errors import CheckpointError


class Pace(NamedTuple):
    """Where a training of epochs of different lengths is, in optimiser steps of one with all items in every epoch."""

    step: int
    total: int


class NetworkRecipe(lightning.LightningModule, ABC):
    """Trains a network; what its steps are and how it is evaluated, subclasses say.

    Args:
        network_class: of the network.
        network: options of that class. ``backbone_weights`` are read when a training begins; resuming, evaluating and
            predicting do without.
        optimizer: "sgd", "adam" (weight decay is part of the gradient) or "adamw".
        learning_rate: at step 0, above 0.
        momentum: of "sgd", from 0 to below 1.
        weight_decay: on every parameter, 0 or more.
        power: of the polynomial schedule, 0 or more.
        warmup_steps: steps in which the learning rate rises from 0.

    Raises:
        ValueError: an argument outside its range.
        BackboneError: a backbone that does not exist or does not have an option.
    """

    def __init__(
        self,
        network_class: type[nn.Module],
        network: dict[str, Any],
        *,
        optimizer: Literal["sgd", "adam", "adamw"] = "sgd",
        learning_rate: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        power: float = 0.9,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        valid = inspect.signature(network_class).parameters
        if unknown := sorted(network.keys() - valid.keys()):
            raise ValueError(f"network has no option {unknown[0]!r}: there are {', '.join(valid)}")
        if optimizer not in ("sgd", "adam", "adamw"):
            raise ValueError(f"optimizer must be 'sgd', 'adam' or 'adamw', got {optimizer!r}")
        if not 0 < learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0, got {learning_rate}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}")
        self.require_not_negative(weight_decay=weight_decay, power=power, warmup_steps=warmup_steps)
        self.network: Any = network_class(**{**network, "backbone_weights": None})
        self.network_class, self.network_options = network_class, dict(network)
        if "num_classes" in valid:
            self.num_classes = int(network.get("num_classes", valid["num_classes"].default))
        self.optimizer, self.learning_rate, self.momentum = optimizer, learning_rate, momentum
        self.weight_decay, self.power, self.warmup_steps = weight_decay, power, warmup_steps
        self._random_states: dict[str, Tensor] = {}
        #: Is given each training batch with the losses of its items [B], where `gives_item_losses`; set by a callback
        #: such as drop-and-pick.
        self.observe: Callable[[Any, Tensor], None] | None = None
        #: Says where the schedule of the learning rate is, where that does not follow from the number of steps; set by
        #: a callback that leaves items out of epochs.
        self.pace: Callable[[], Pace] | None = None

    @staticmethod
    def require_not_negative(**options: float) -> None:
        """Raise a ValueError that names the first of these options that is below 0 or not finite."""
        for name, value in options.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {value}")

    # -------------------------------------------------------------------------------------------- what a method adds

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters for the optimiser; those without ``lr`` have the recipe's learning rate."""
        return [{"params": list(self.network.parameters())}]

    def pretrained_parts(self, network: Any) -> list[nn.Module]:
        """The modules of a network that ``backbone_weights`` are for."""
        return [network.backbone]

    def gives_item_losses(self) -> bool:
        """Whether every training step gives `observe`, where that is set, the loss of each item of its batch."""
        return False

    def rate_factor(self, step: int, total: int) -> float:
        """The learning rate at a step of the training, as a share of that at step 0; warm-up comes on top."""
        return float(max(0.0, 1 - step / total) ** self.power)

    def scheduled_factor(self, step: int, total: int) -> float:
        """The same with the warm-up."""
        rise = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return rise * self.rate_factor(step, total)

    @abstractmethod
    def evaluate(self, batch: Any, split: str) -> None:
        """Count a batch of "val" or "test" in the split's meters."""

    @abstractmethod
    def report(self, split: str) -> None:
        """Log the split's scores under its name, and begin anew."""

    # -------------------------------------------------------------------------------------------- evaluation

    def validation_step(self, batch: Any, batch_index: int) -> None:
        self.evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        self.report("val")

    def test_step(self, batch: Any, batch_index: int) -> None:
        self.evaluate(batch, "test")

    def on_test_epoch_end(self) -> None:
        self.report("test")

    # -------------------------------------------------------------------------------------------- training

    def on_fit_start(self) -> None:
        if self.network_options.get("backbone_weights") and self.trainer.ckpt_path is None:
            pretrained = self.network_class(**self.network_options)
            for own, loaded in zip(self.pretrained_parts(self.network), self.pretrained_parts(pretrained), strict=True):
                own.load_state_dict(loaded.state_dict())

    def configure_optimizers(self) -> Any:
        groups: Any = self.parameter_groups()
        if self.optimizer == "sgd":
            optimizer: Any = torch.optim.SGD(
                groups, lr=self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
            )
        else:
            kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
            optimizer = kind(groups, lr=self.learning_rate, weight_decay=self.weight_decay)
        pace = self.pace
        if pace is not None:
            total = pace().total
        elif math.isinf(steps := self.trainer.estimated_stepping_batches):
            raise MisconfigurationException(
                "trainer.max_epochs or trainer.max_steps must be given: the learning rate falls over the whole training"
            )
        else:
            total = max(1, int(steps))

        def factor(step: int) -> float:
            return self.scheduled_factor(step if pace is None else pace().step, total)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        if rank := self.trainer.global_rank:  # else all processes would drop out the same
            torch.manual_seed(mixed_seed(torch.initial_seed(), rank))

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        # Resumed: dropout goes on where it was.
        if "cpu" in self._random_states:
            torch.set_rng_state(self._random_states["cpu"])
        if "cuda" in self._random_states and self.device.type == "cuda":
            torch.cuda.set_rng_state(self._random_states["cuda"], self.device)
        self._random_states = {}

    # -------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        # One row for each process: their dropout differs.
        checkpoint["random_states"] = {
            name: self.all_gather(state.to(self.device)).reshape(-1, len(state)).cpu()  # type: ignore[union-attr]
            for name, state in states.items()
        }
        checkpoint["optimizer"] = self.optimizer
        checkpoint.setdefault("whole_epochs", self.pace is None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        optimizer = checkpoint.get("optimizer", self.optimizer)
        if self.trainer.state.fn == "fit" and optimizer != self.optimizer:
            raise CheckpointError(f"the checkpoint is of a run with optimizer {optimizer}, not {self.optimizer}")
        if self.trainer.state.fn == "fit" and self.pace is None and not checkpoint.get("whole_epochs", True):
            raise CheckpointError(
                "the checkpoint is of a training whose epochs left items out; go on with the callback that did that, "
                "such as drop-and-pick"
            )
        self._random_states = {}
        for name, states in checkpoint.get("random_states", {}).items():
            rows = states.reshape(-1, states.shape[-1])
            row = rows[self.trainer.global_rank % len(rows)]
            self._random_states[name] = row.clone()  # torch crashes on a view of a larger tensor
