"""Self-correction: models of restart cycles are averaged, and the average mixes its predictions into the labels.

Paper: Li et al., Self-Correction for Human Parsing, https://arxiv.org/abs/1910.09777, with the official code.

for each epoch:
    learning rate: warm-up, one cosine descent, from epoch `start` on a short cosine descent for each cycle
    train, in the cycles on labels refined by the average: (1 - alpha) prediction + alpha label, alpha = 1 / (cycle + 1)
    at the start and after every cycle:
        average <- mean of the weights at these moments
        estimate its batch-norm statistics anew by one pass over the training data
"""

from __future__ import annotations

import copy
import math
import os
import uuid
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gingham.data.segmentation import SegmentationDataset, read_soft_label, write_label, write_soft_label
from gingham.errors import DataError
from gingham.methods.processes import in_first, several_processes, share_buffers
from gingham.methods.resumable_data import EpochBatches
from gingham.methods.schp.labels_folder import Owner, claim, labels_to_go_on_with, leave, require_owner
from gingham.methods.schp.objective import refined_labels
from gingham.methods.schp.schedule import cycles_after, cyclical_rate
from gingham.methods.segmentation_data import SegmentationData
from gingham.methods.segmentation_recipe import Refinement, SegmentationRecipe


class SelfCorrection(Callback):
    """Trains any `SegmentationRecipe` in cycles, averages their weights and refines the labels.

    When training ends, the recipe's network has the weights of the average. On the way, the average of each cycle is
    written as ``checkpoints/cycle_N.ckpt`` of the run and evaluated as ``val_average_miou``, beside the ``val_miou`` of
    the network in training, which is what ``last.ckpt`` holds and ``best.ckpt`` is chosen by. Everything that a killed
    run needs to go on is in its checkpoints.

    Only networks at the end of a cycle are averaged. Those that a training has passed before it came to
    self-correction, or to a lower `start`, are missing from the mean, and so is that of an epoch in which it stopped.

    Args:
        start: epochs before the first average, 1 or more.
        cycle: epochs in a cycle, 1 or more.
        warmup: epochs in which the learning rate rises at the beginning, 0 to `start`.
        lowest: factor on the recipe's learning rate at the end of a descent, 0 to 1.
        peak: factor on the recipe's learning rate at the beginning of a cycle, 0 to 1.
        schedule: False leaves the learning rate to the recipe.
        average_weights: False takes the network of the latest cycle in place of the mean. With `refine_labels` and
            `estimate_batch_norm` False too, the learning rates are all that is left of the method.
        refine_labels: False trains on the given labels in the cycles too.
        refinement: "online", a batch's labels are mixed with what the average predicts for its augmented pictures; or
            "offline", once a cycle, the labels of the last cycle with what it predicts for the whole pictures:
            labels <- (cycle labels + prediction) / (cycle + 1). The soft labels are then files in the folder of the
            refined ones, one byte a class and pixel before compression.
        estimate_batch_norm: False leaves the average the batch-norm statistics of the first network, or without
            `average_weights` those of the latest.
        labels_dir: where the refined labels of each cycle are written, as label images of the data set's own values, so
            that people can look at them; by default beside the data set, in a folder of its name and "-refined", or for
            the embedded world in the folder of the run. The given labels are never touched. It must not hold labels of
            another run: a file in it, ``run.json``, says whose they are. Those of an overwritten run are deleted.
        write_labels: False writes no files.

    Raises:
        ValueError: an argument outside its range, or one that would do nothing with the others.

    Source: the paper and its official code: `start` 100 and `cycle` 10 of 150 epochs, `warmup` 10, `lowest` 1 %, `peak`
    one half. The official code refines online; the paper, by its author's word, offline, with a formula that is not
    confirmed.
    Where the recipe has ``semantics = "official"``, prediction and label are mixed before the softmax, and the average
    predicts in training mode, as the official code has it.
    """

    def __init__(
        self,
        start: int = 100,
        cycle: int = 10,
        warmup: int = 10,
        lowest: float = 0.01,
        peak: float = 0.5,
        schedule: bool = True,
        average_weights: bool = True,
        refine_labels: bool = True,
        refinement: Literal["online", "offline"] = "online",
        estimate_batch_norm: bool = True,
        labels_dir: str | None = None,
        write_labels: bool = True,
    ) -> None:
        for name, value, least in (("start", start, 1), ("cycle", cycle, 1), ("warmup", warmup, 0)):
            if value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
        if warmup > start:
            raise ValueError(f"warmup must be at most start {start}, got {warmup}")
        for name, share in (("lowest", lowest), ("peak", peak)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be 0 to 1, got {share}")
        self.start, self.cycle, self.warmup, self.lowest, self.peak = start, cycle, warmup, lowest, peak
        if refinement not in ("online", "offline"):
            raise ValueError(f"refinement must be 'online' or 'offline', got {refinement!r}")
        if refinement == "offline" and not refine_labels:
            raise ValueError("refinement must be 'online' where refine_labels is false, got 'offline'")
        if refinement == "offline" and not write_labels:
            raise ValueError("write_labels must be true: offline refinement keeps its labels in files")
        for option, does_nothing, owner in (
            ("lowest", not schedule and lowest != 0.01, "the schedule"),
            ("peak", not schedule and peak != 0.5, "the schedule"),
            ("labels_dir", labels_dir is not None and not (write_labels and refine_labels), "labels that are written"),
        ):
            if does_nothing:
                raise ValueError(f"{option} is an option of {owner}; leave it out")
        self.schedule, self.average_weights, self.refine_labels = schedule, average_weights, refine_labels
        self.offline = refinement == "offline"
        self.estimate_batch_norm = estimate_batch_norm
        self.labels_dir, self.write_labels = labels_dir, write_labels and refine_labels
        self.count = 0  # snapshots in the average
        self.average: nn.Module | None = None
        self._epochs = 0  # that were over when the last snapshot was taken
        self._run: str | None = None  # name of the training to whom refined labels belong
        self._soft_labels: str | None = None  # folder of the last cycle's
        self._loaded: dict[str, Tensor] | None = None  # the average of a checkpoint, until a network can hold it
        self._folder, self._owner = Path(), Owner("", None)  # of refined labels, in this part of the training
        self._refined: SegmentationDataset | None = None  # which brings soft labels along

    # ------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        average = None if self.average is None else self.average.state_dict()
        return {
            "count": self.count,
            "epochs": self._epochs,
            "average": average,
            "run": self._run,
            "soft_labels": self._soft_labels,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count, self._loaded = state_dict["count"], state_dict["average"]
        self._epochs, self._run = state_dict.get("epochs", 0), state_dict.get("run")
        self._soft_labels = state_dict.get("soft_labels")

    # ------------------------------------------------------------------------------------------ begin and end

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        if stage == "fit":  # what a training before left in this object; a checkpoint is loaded after
            self.count, self._epochs, self.average, self._loaded = 0, 0, None, None
            self._run, self._soft_labels, self._refined = None, None, None

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not isinstance(pl_module, SegmentationRecipe):
            raise DataError(f"self-correction works with segmentation recipes, got {type(pl_module).__name__}")
        if self.refine_labels and not pl_module.learns_labels():
            raise DataError(
                f"self-correction refines the labels of pixels, and this {type(pl_module).__name__} learns none; "
                "set refine_labels to false"
            )
        if self._loaded is not None:
            self.average = _teacher(pl_module)
            self.average.load_state_dict(self._loaded)
            self._loaded = None
        if self.write_labels:
            self._prepare_labels_folder(trainer)
        pl_module.refine = partial(self._refine, pl_module)
        self._official = getattr(pl_module, "semantics", "corrected") == "official"

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._leave(trainer, pl_module)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._leave(trainer, pl_module)

    def _leave(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Another training with the same parts and without this callback is an ordinary one."""
        if isinstance(pl_module, SegmentationRecipe):
            pl_module.refine = None
        if self._refined is not None:
            self._refined.soft_labels, self._refined = None, None
        if self.write_labels and trainer.is_global_zero:
            leave(self._folder, self._owner)

    # ------------------------------------------------------------------------------------------ training

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if math.isinf(trainer.num_training_batches):
            return
        steps_of_an_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        if trainer.estimated_stepping_batches < self.start * steps_of_an_epoch:
            rank_zero_warn(
                f"self-correction never begins: it starts after epoch {self.start}, and the training ends before; "
                "lower start or raise trainer.max_epochs"
            )

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        if not self.schedule:
            return
        factor = cyclical_rate(
            trainer.current_epoch,
            peak=1.0,
            low=self.lowest,
            warmup=self.warmup,
            start=self.start,
            cycle=self.cycle,
            cycle_peak=self.peak,
        )
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor

    def _refine(self, recipe: SegmentationRecipe, batch: Any) -> Refinement | None:
        if self.average is None or not self.refine_labels:
            return None
        alpha = 1 / (self.count + 1)
        if self.offline:
            soft = batch["soft"].float()
            return Refinement(soft / soft.sum(1, keepdim=True).clamp(min=1), None, alpha)
        self.average.train(self._official)
        with torch.no_grad():
            output: Any = self.average(batch["image"].contiguous(memory_format=torch.channels_last))
            labels = refined_labels(
                output.logits,
                batch["label"],
                alpha,
                blend=self._blend,
                align_corners=recipe.corners_align(batch["image"].shape[-2:]),
            )
        return Refinement(labels, output, alpha)

    @property
    def _blend(self) -> Any:
        return "logits" if self._official else "probabilities"

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, SegmentationRecipe)
        epochs = trainer.current_epoch + 1
        # A run that is resumed at the end of an epoch comes here a second time, and so does one that stops in an epoch.
        if not self._ends_cycle(epochs) or epochs <= self._epochs or not trainer.is_last_batch:
            return
        self._epochs = epochs
        self.average = self._average_with(pl_module)
        self.count += 1
        if self.estimate_batch_norm:
            devices = [pl_module.device] if pl_module.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices), trainer.precision_plugin.forward_context():
                torch.manual_seed(self.count)  # of dropout
                estimate_batch_norm(self.average, _images(trainer, pl_module.device))
        self.average.eval()
        student, pl_module.network = pl_module.network, self.average
        try:
            self._evaluate(trainer, pl_module)
            self._save(trainer)
            if self.write_labels:
                self._write_labels(trainer, pl_module)
            if self.offline:
                trainer.strategy.barrier()  # until every process has written its share
                self._use_soft_labels(trainer, self._folder / f"cycle_{self.count}")
        finally:
            pl_module.network = student

    def _average_with(self, recipe: SegmentationRecipe) -> nn.Module:
        """The average, with the network of this moment in it; the same in every process."""
        average = _teacher(recipe) if self.average is None else self.average
        if self.average_weights:
            average_parameters(average, recipe.network, 1 / (self.count + 1))
        else:
            average.load_state_dict(recipe.network.state_dict())
        share_buffers(average)
        return average

    def _ends_cycle(self, epochs: int) -> bool:
        before, after = (cycles_after(n, start=self.start, cycle=self.cycle) for n in (epochs - 1, epochs))
        return after > before

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.average is not None:
            assert isinstance(pl_module, SegmentationRecipe)
            pl_module.network.load_state_dict(self.average.state_dict())

    # ------------------------------------------------------------------------------------------ after a cycle

    def _evaluate(self, trainer: lightning.Trainer, pl_module: SegmentationRecipe) -> None:
        """Log the mean IoU of the average, which is in the place of the recipe's network, on the validation split."""
        if not trainer.enable_validation:
            return
        trainer.fit_loop.epoch_loop.val_loop.setup_data()  # before the first validation there is no loader
        loader: Any = trainer.val_dataloaders
        (limit,) = trainer.num_val_batches
        meter: Any = pl_module.meters["val"]
        was_training = pl_module.training
        pl_module.eval()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            for batch in islice(loader, None if math.isinf(limit) else int(limit)):
                images = trainer.precision_plugin.convert_input(batch["image"].to(pl_module.device))
                meter.update(pl_module.predict_classes(images), batch["label"].to(pl_module.device))
        pl_module.train(was_training)
        pl_module.log("val_average_miou", meter.compute().miou)
        meter.reset()

    def _save(self, trainer: lightning.Trainer) -> None:
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
        if folder is None:
            return
        file = Path(folder) / f"cycle_{self.count}.ckpt"
        part = file.with_suffix(".part")
        trainer.save_checkpoint(part, weights_only=True)
        if trainer.is_global_zero:
            os.replace(part, file)

    def _labels_folder(self, trainer: lightning.Trainer) -> Path:
        if self.labels_dir is not None:
            return Path(self.labels_dir)
        root = getattr(trainer.datamodule, "root", None)  # type: ignore[attr-defined]
        if root is not None:
            return Path(root).resolve().with_name(f"{Path(root).resolve().name}-refined")
        return Path(trainer.log_dir or trainer.default_root_dir) / "refined_labels"

    def _prepare_labels_folder(self, trainer: lightning.Trainer) -> None:
        """Find out before training, and not after the epochs before the first cycle, whether labels can be written."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, SegmentationData):
            raise DataError(
                "refined labels can be written for the pictures of a SegmentationData only, got "
                f"{type(data).__name__}; set write_labels to false"
            )
        self._folder = self._labels_folder(trainer).resolve()
        checkpoints = getattr(trainer.checkpoint_callback, "dirpath", None)
        self._run = trainer.strategy.broadcast(self._run or uuid.uuid4().hex)
        self._owner = Owner(self._run, None if checkpoints is None else str(Path(checkpoints).resolve()))
        in_first(trainer, lambda: claim(self._folder, self._owner))
        if self.offline and self.count:
            find = partial(labels_to_go_on_with, self.count, self._run, known=self._soft_labels, folder=self._folder)
            self._use_soft_labels(trainer, in_first(trainer, find))

    def _use_soft_labels(self, trainer: lightning.Trainer, folder: Path) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._refined = data.dataset("train")
        self._refined.soft_labels, self._soft_labels = folder, str(folder)

    def _write_labels(self, trainer: lightning.Trainer, pl_module: SegmentationRecipe) -> None:
        """The likeliest refined label of every training picture, at its own size, as a label image."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        dataset: SegmentationDataset = data.dataset("train")
        folder = self._folder / f"cycle_{self.count}"
        in_first(trainer, lambda: require_owner(self._folder, self._owner))
        alpha = 1 / (self.count + 1)
        was_training = pl_module.training
        pl_module.eval()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            for index in range(trainer.global_rank, len(dataset), trainer.world_size):
                item = data.evaluate(dataset.read(index))
                (folder / item["name"]).parent.mkdir(parents=True, exist_ok=True)  # names may have folders
                label = item["label"][None].to(pl_module.device)
                logits = pl_module(trainer.precision_plugin.convert_input(item["image"][None].to(pl_module.device)))
                soft = refined_labels(logits, label, alpha, blend=self._blend)[0].cpu()
                if self.offline:
                    if dataset.soft_labels is not None:
                        before = dataset.soft_labels / f"{item['name']}.npz"
                        kept = read_soft_label(before, dataset.num_classes, item["label"]).float() / 255
                        soft = (1 - alpha) * kept + alpha * logits[0].softmax(0).cpu()
                    write_soft_label(folder / f"{item['name']}.npz", soft)
                refined = soft.argmax(0).masked_fill(item["label"] == dataset.ignore_index, dataset.ignore_index)
                write_label(folder / f"{item['name']}.png", refined, dataset.labels)
        pl_module.train(was_training)


def _teacher(recipe: SegmentationRecipe) -> nn.Module:
    return copy.deepcopy(recipe.network).eval().requires_grad_(False)


def average_parameters(average: nn.Module, network: nn.Module, share: float) -> None:
    """Move the parameters of an average towards those of a network by a share; buffers stay as they are.

    With shares 1, 1/2, 1/3, ... the average is the plain mean of the networks that it has seen.

    Args:
        average: changed in place.
        network: of the same class.
        share: 0 to 1; with 1 the parameters are copied.

    Example:
        >>> average, network = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> for count, weight in enumerate((3.0, 6.0)):
        ...     _ = nn.init.constant_(network.weight, weight)
        ...     average_parameters(average, network, 1 / (count + 1))
        >>> average.weight.item()
        4.5
    """
    with torch.no_grad():
        for mean, new in zip(average.parameters(), network.parameters(), strict=True):
            mean.copy_(new) if share == 1 else mean.lerp_(new, share)


def estimate_batch_norm(network: nn.Module, batches: Any) -> None:
    """Set the batch-norm statistics of a network to what it sees in one pass over the data.

    The running mean becomes the mean over all batches, weighted by their images, and so does the running variance, of
    the variances within the batches. Under several processes, these are averaged. Nothing else changes.

    Args:
        network: changed in place; it comes out in the mode that it came in with.
        batches: of images [B, 3, H, W].

    Source: the official code, without its building of gradients.

    Example:
        >>> network = nn.BatchNorm2d(1)
        >>> estimate_batch_norm(network, [torch.zeros(2, 1, 2, 2), torch.full((1, 1, 2, 2), 6.0)])
        >>> network.running_mean.item(), network.momentum
        (2.0, 0.1)
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    was_training = network.training
    network.train()
    for norm in norms:
        norm.reset_running_stats()
    seen = 0
    with torch.no_grad():
        for images in batches:
            seen += len(images)
            for norm in norms:
                norm.momentum = len(images) / seen
            network(images.contiguous(memory_format=torch.channels_last))
        if several_processes():
            for norm in norms:
                for statistic in (norm.running_mean, norm.running_var):
                    assert statistic is not None
                    dist.all_reduce(statistic)
                    statistic /= dist.get_world_size()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.train(was_training)


def _images(trainer: lightning.Trainer, device: torch.device) -> Iterator[Tensor]:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    loader: Any = trainer.train_dataloader
    batches = trainer.num_training_batches  # of an epoch, which may be limited
    if getattr(data, "selection", None) is not None:  # drop-and-pick leaves images out of that
        dataset = data.dataset("train")
        options = (len(dataset), data.batch_size, data.seed, *data.process())
        loader = data.training_loader(dataset, batches=EpochBatches(*options, drop_last=data.drop_last))
        batches = len(loader)
    for batch in islice(loader, None if math.isinf(batches) else int(batches)):
        yield trainer.precision_plugin.convert_input(batch["image"].to(device))
