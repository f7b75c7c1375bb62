"""Drop-and-Pick as a callback: any recipe that tells the losses of its items trains on fewer of them.

Paper: Cheng et al., https://arxiv.org/abs/1811.09347; what of it is known says the README here.

before each epoch: the active samples, see `active_set.py`
for each batch of a permutation of them:
    the recipe's own step; keep the loss of each sample
learning rate: where an ordinary training would be at this share of the epoch
"""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from gingham.errors import CheckpointError, DataError
from gingham.methods.dap.active_set import ActiveSet, Drop, check_options
from gingham.methods.dap.schedule import Basis, Schedule
from gingham.methods.network_recipe import NetworkRecipe, Pace
from gingham.methods.resumable_data import EpochBatches, ResumableData

_STATE = "drop_and_pick"  # in a checkpoint


class DropAndPick(Callback):
    """Leaves the samples with the smallest losses out of more and more epochs, and picks all up again in cycles.

    It works with every recipe that gives the losses of its items (`NetworkRecipe.gives_item_losses`) and every data
    module of the package whose training items stay the same. It logs ``active``, the share of the samples that an epoch
    visited, and when the training is tested ``test_visits``, the visits of all epochs. Several processes hold the same
    losses and drop the same samples. All that a killed run needs to go on is in its checkpoints.

    Args:
        budget: B, the visits of the training as a share of those without dropping, above 0 to 1; the fraction follows
            from it. None where `fraction` is given.
        fraction: rho, the share that each drop takes, 0 to 1, in place of a budget.
        warmup: epochs with all samples before the first cycle, 0 or more.
        cycle: epochs in a cycle, 1 or more. One that outlasts the training drops and never picks.
        interval: epochs between two drops in a cycle, 1 or more.
        basis: what a fraction is of: the "survivors" of the drops before, or the "original" data set.
        final: last epochs with all samples, 0 or more.
        min_active: samples that are always left, 1 or more; by default one batch of all processes.
        drop: which samples: the "easiest", or to compare with the "hardest", or as many "random" ones that are drawn
            anew for every epoch.
        smoothing: share of a new loss in the one that ranks, above 0 to 1; below 1 it is an exponential average.
        skip_hardest: share of all samples, those with the largest losses, that every cycle drops first, 0 to 1.
            Mislabelled samples are among them.
        class_floor: share of each class's samples that is never dropped, 0 to 1. Where it holds samples back, a
            training makes more visits than planned.
        rescale: "loss" weighs samples by N over the number of active ones, "rate" multiplies the learning rate by it;
            with plain SGD without decay they are the same, and with Adam the first is refused: it would do nothing.

    Raises:
        ValueError: an argument outside its range, or budget and fraction both given, or neither.

    Source: the paper, for the warm-up, the cycles that begin with all samples and shrink in steps, and the ranking by
    loss. Every number here is our own choice; 0.75 is the computation that the first version reports on, 0.85 that of
    the second (DaR).

    Example:
        >>> DropAndPick(budget=0.85).budget
        0.85
    """

    def __init__(
        self,
        budget: float | None = 0.75,
        fraction: float | None = None,
        warmup: int = 10,
        cycle: int = 5,
        interval: int = 1,
        basis: Basis = "survivors",
        final: int = 0,
        min_active: int | None = None,
        drop: Drop = "easiest",
        smoothing: float = 1.0,
        skip_hardest: float = 0.0,
        class_floor: float = 0.0,
        rescale: Literal["none", "loss", "rate"] = "none",
    ) -> None:
        if (budget is None) == (fraction is None):
            raise ValueError(f"budget or fraction must be given, and the other be None, got {budget} and {fraction}")
        if budget is not None and not 0 < budget <= 1:
            raise ValueError(f"budget must be above 0 and at most 1, got {budget}")
        if fraction is not None and not 0 <= fraction <= 1:
            raise ValueError(f"fraction must be 0 to 1, got {fraction}")
        if min_active is not None and min_active < 1:
            raise ValueError(f"min_active must be 1 or more, got {min_active}")
        Schedule(1, 1, warmup, cycle, interval, basis, final)  # raises what is wrong
        check_options(drop, smoothing, skip_hardest, class_floor)
        if rescale not in ("none", "loss", "rate"):
            raise ValueError(f"rescale must be 'none', 'loss' or 'rate', got {rescale!r}")
        self.budget, self.fraction = budget, fraction
        self.warmup, self.cycle, self.interval, self.basis, self.final = warmup, cycle, interval, basis, final
        self.min_active, self.drop = min_active, drop
        self.smoothing, self.skip_hardest, self.class_floor = smoothing, skip_hardest, class_floor
        self.rescale = rescale
        #: Once a training has begun.
        self.active_set: ActiveSet | None = None
        self._recipe: NetworkRecipe | None = None
        self._pending: list[tuple[Tensor, Tensor]] = []  # of this process, not in the set yet
        self._warned = False

    # ------------------------------------------------------------------------------------------ begin

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, NetworkRecipe) or not pl_module.gives_item_losses():
            raise DataError(
                f"drop-and-pick ranks items by their losses, and this {type(pl_module).__name__} gives none"
            )
        if self.rescale == "loss" and pl_module.optimizer != "sgd":
            raise MisconfigurationException(
                f"rescale must be 'rate' with the optimizer {pl_module.optimizer}, which divides gradients by their "
                "size: 'loss' would do nothing"
            )
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, ResumableData):
            raise DataError(f"drop-and-pick chooses from the items of a ResumableData, got {type(data).__name__}")
        _require_whole_epochs(trainer)
        dataset = data.dataset("train")  # type: ignore[attr-defined]
        batches = data.training_batches(len(dataset))
        self.active_set = self._active_set(dataset, batches, int(trainer.max_epochs or 0), data.seed)
        self._recipe, self._pending = pl_module, []
        data.selection = self
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]  # epochs differ in length
        pl_module.observe = self._observe
        pl_module.pace = lambda: self._pace(trainer, batches)
        interval, least = trainer.val_check_interval, batches.batches_of(min(self._planned()))
        if isinstance(interval, int) and trainer.check_val_every_n_epoch is not None and interval > least:
            raise MisconfigurationException(
                f"trainer.val_check_interval must be at most {least}, the batches of the shortest epoch, got {interval}"
            )

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        # Another training with the same parts and without this callback is an ordinary one.
        if stage == "fit" and self._recipe is not None:
            self._recipe.observe = self._recipe.pace = None
            trainer.datamodule.selection = None  # type: ignore[attr-defined]

    def _active_set(self, dataset: Any, batches: EpochBatches, epochs: int, seed: int) -> ActiveSet:
        if batches.batches_of(len(dataset)) == 0:
            raise DataError(f"the train split has {len(dataset)} items, fewer than one batch of all processes needs")
        one_batch = min(len(dataset), batches.batch_size * batches.world_size)
        if batches.drop_last and self.min_active is not None and self.min_active < one_batch:
            raise MisconfigurationException(
                f"min_active must be {one_batch} or more, a batch of all processes, got {self.min_active}"
            )
        labels = getattr(dataset, "targets", None)
        if self.class_floor and labels is None:
            raise DataError(f"class_floor needs the class of every item, and {type(dataset).__name__} has none")
        schedule = Schedule(
            len(dataset),
            epochs,
            self.warmup,
            self.cycle,
            self.interval,
            self.basis,
            self.final,
            min_active=self.min_active or one_batch,
        )
        fraction = self.fraction
        if fraction is None:
            assert self.budget is not None
            try:
                fraction = schedule.fraction_for(self.budget)
            except ValueError as error:
                raise MisconfigurationException(str(error)) from error
        return ActiveSet(
            schedule,
            fraction,
            drop=self.drop,
            smoothing=self.smoothing,
            skip_hardest=self.skip_hardest,
            class_floor=self.class_floor,
            labels=None if labels is None else torch.as_tensor(labels),  # torchvision's data sets have lists
            seed=seed,
        )

    def _planned(self) -> list[int]:
        assert self.active_set is not None
        return self.active_set.schedule.sizes(self.active_set.fraction)

    def _pace(self, trainer: lightning.Trainer, batches: EpochBatches) -> Pace:
        def steps_of(count: int) -> int:
            return math.ceil(count / trainer.accumulate_grad_batches)

        assert self.active_set is not None
        schedule, epoch = self.active_set.schedule, trainer.current_epoch
        whole = steps_of(batches.batches_of(schedule.length))
        trained = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        in_epoch = trained * whole // batches.batches_of(self.count(epoch))
        return Pace(epoch * whole + in_epoch, schedule.epochs * whole)

    # ------------------------------------------------------------------------------------------ what the data asks for

    def count(self, epoch: int) -> int:
        """The number of items of an epoch."""
        assert self.active_set is not None
        if epoch > self.active_set.epoch:
            self._gather()
        return self.active_set.count(epoch)

    def indices(self, epoch: int) -> Tensor:
        """The items of an epoch, int64, ascending."""
        assert self.active_set is not None
        if epoch > self.active_set.epoch:
            self._gather()
        return self.active_set.indices(epoch)

    # ------------------------------------------------------------------------------------------ losses

    def _observe(self, batch: Any, losses: Tensor) -> None:
        self._pending.append((batch["index"].detach(), losses.detach().float()))

    def _gather(self) -> None:
        """Put the losses that all processes saw into the set; every process has to come here."""
        if not self._pending:  # as in every other process: all have as many batches
            return
        assert self.active_set is not None and self._recipe is not None
        indices, losses = (torch.cat(values) for values in zip(*self._pending, strict=True))
        self._pending = []
        # Batch after batch, and within it process after process, however often this is called in an epoch.
        indices, losses = (
            self._recipe.all_gather(values).reshape(-1, len(values)).T.flatten().cpu()  # type: ignore[union-attr]
            for values in (indices, losses)
        )
        if self.active_set.record(indices, losses) and not self._warned:
            self._warned = True
            rank_zero_warn("some losses are not finite; drop-and-pick keeps such samples until it knows better")

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._gather()
        assert self.active_set is not None
        share = self.active_set.count(trainer.current_epoch) / self.active_set.schedule.length
        pl_module.log("active", share)

    def on_test_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.active_set is not None:
            pl_module.log("test_visits", float(self.active_set.visits))

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.rescale == "none":
            return
        assert self.active_set is not None
        factor = self.active_set.schedule.length / self.active_set.count(trainer.current_epoch)
        for group in optimizer.param_groups:
            if self.rescale == "rate":
                group["lr"] *= factor  # the schedule sets it anew after every step
                continue
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    # ------------------------------------------------------------------------------------------ state

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.active_set is not None:
            self._gather()
            checkpoint[_STATE] = self.active_set.state_dict()
            checkpoint["whole_epochs"] = False  # also of a state that is saved after the training

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.active_set is None:
            return
        if _STATE not in checkpoint:
            raise CheckpointError("the checkpoint is of a training without drop-and-pick, which cannot take it over")
        self.active_set.load_state_dict(checkpoint[_STATE])


def _require_whole_epochs(trainer: lightning.Trainer) -> None:
    limit = trainer.limit_train_batches  # 1.0 is the whole epoch, 1 a single batch
    is_cut = not isinstance(limit, float) or limit != 1.0 or trainer.overfit_batches  # type: ignore[attr-defined]
    if is_cut or trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise MisconfigurationException(
            "drop-and-pick needs whole epochs: leave trainer.limit_train_batches, overfit_batches and fast_dev_run out"
        )
    if trainer.max_steps != -1 or not trainer.max_epochs or trainer.max_epochs < 0:
        raise MisconfigurationException(
            "drop-and-pick counts epochs: give trainer.max_epochs, and no trainer.max_steps (-1 undoes that of a "
            "configuration)"
        )
