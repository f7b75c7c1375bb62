"""What a run leaves in its folder so that it can be continued: metrics.csv and the checkpoints."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from gingham.errors import CheckpointError


class MetricsFile(Logger):
    """Writes csv/metrics.csv in the folder of a run, and keeps what an earlier part of the run wrote there.

    Args:
        folder: of the run.
        kept_steps: the number of optimiser steps of the run that is continued; the rows of those steps are kept.
    """

    def __init__(self, folder: Path, kept_steps: int = 0) -> None:
        super().__init__()
        self.file = folder / "csv" / "metrics.csv"
        self._rows: list[dict[str, Any]] = []
        if kept_steps and self.file.is_file():
            with self.file.open(newline="") as file:
                self._rows = [row for row in csv.DictReader(file) if int(row["step"]) < kept_steps]
        self._columns: list[str] = []  # of the file
        self._written = 0  # rows in the file

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return "csv"

    @property
    def log_dir(self) -> str:
        return str(self.file.parent)

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """The configuration is a file of its own."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._rows.append({"step": step, **metrics})

    @rank_zero_only
    def save(self) -> None:
        new = self._rows[self._written :]
        if not new:
            return
        columns = sorted({name for row in new for name in row}.union(self._columns))
        if columns == self._columns:
            with self.file.open("a", newline="") as file:
                csv.DictWriter(file, columns).writerows(new)
        else:
            columns = sorted({name for row in self._rows for name in row})
            self.file.parent.mkdir(parents=True, exist_ok=True)
            part = self.file.with_suffix(".part")
            with part.open("w", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(self._rows)
            part.replace(self.file)
        self._columns, self._written = columns, len(self._rows)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


class LastCheckpoint(Checkpoint):
    """Keeps last.ckpt: the state after every so many optimiser steps, at the end of an epoch, and of the training.

    A state gets that name when the next batch begins or training ends, once the metrics that belong to it are on disk:
    whenever a run is killed, last.ckpt and metrics.csv fit together. Gradients in accumulation are not part of a
    state, which is why it is taken after an optimiser step. Where a validation follows, it is taken a step later: a
    resumed run would not validate again, and not know of what was best there.

    Args:
        folder: of the checkpoints.
        every: optimiser steps between states.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.file, self.part, self.every = folder / "last.ckpt", folder / "last.ckpt.part", every
        self._step = 0  # of the batch before
        self._due = self._taken = False

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # With max_steps, Lightning would end an epoch a second time where it goes on after it.
        trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._step, self._due = trainer.global_step, False

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        # After a resumption at the end of an epoch, Lightning counts one step too many for its loggers.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
        self._publish(trainer)

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        step, loop = trainer.global_step, trainer.fit_loop
        stepped, self._step = step != self._step, step
        if not stepped or trainer.is_last_batch:
            return
        self._due |= step % self.every == 0
        is_over = step == trainer.max_steps or (trainer.should_stop and loop._can_stop_early)
        assert loop._data_fetcher is not None
        if is_over or (self._due and not loop.epoch_loop._should_check_val_fx(loop._data_fetcher)):
            self._take(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.is_last_batch:  # else the training was stopped in the midst of the epoch
            self._take(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._publish(trainer)

    def _take(self, trainer: lightning.Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        trainer.save_checkpoint(self.part, weights_only=False)
        self._due, self._taken = False, True

    def _publish(self, trainer: lightning.Trainer) -> None:
        if self._taken and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()
            os.replace(self.part, self.file)
        self._taken = False


def checkpoints(folder: Path, every: int, monitor: str | None = "val_miou") -> list[Callback]:
    """The best state by `monitor`, if there is one, and the last. In this order: the last then knows of the best."""
    if monitor is None:
        return [LastCheckpoint(folder, every)]
    best = ModelCheckpoint(
        folder, filename="best", monitor=monitor, mode="max", save_top_k=1, enable_version_counter=False
    )
    return [best, LastCheckpoint(folder, every)]


def resolve_checkpoint(path: str | None, run_dir: Path) -> str | None:
    """The file that ``--ckpt_path`` means: a path, or the name of one in the run's folder, such as "last".

    Raises:
        CheckpointError: there is no such file.
    """
    if path is None:
        return None
    folder = run_dir / "checkpoints"
    named = folder / f"{path}.ckpt"
    file = named if named.is_file() or path in ("last", "best") else Path(path)
    if not file.is_file():
        there = sorted(entry.stem for entry in folder.glob("*.ckpt"))
        raise CheckpointError(
            f"no checkpoint {file}: give a file, or the name of one in the run_dir {run_dir} "
            f"({'there are ' + ', '.join(there) if there else 'which has none'})"
        )
    return str(file)
