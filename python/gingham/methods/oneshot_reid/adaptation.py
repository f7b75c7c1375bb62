"""Adaptation to a target of which one image a person is labelled: label, cluster, train, and again.

Paper: Fu et al., One Shot Domain Adaptation for Person Re-Identification, https://arxiv.org/abs/1811.10144v1, with the
numbers of the authors' later code.

for each iteration t:
    features of all source and target images
    clusters of the target, labels ignored                          eps from the first iteration
    label and confidence of each unlabelled image by its likeness to the labelled ones
    train for some epochs: triplets of the clusters + weighted triplets of labelled and pseudo-labelled images
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from gingham.errors import CheckpointError, DataError
from gingham.methods.oneshot_reid.data import AdaptationData
from gingham.methods.oneshot_reid.mining import Diagonal, dbscan, mining_distances, mining_radius
from gingham.methods.oneshot_reid.objective import Likeness, PseudoLabels, Selection, pseudo_labels, select
from gingham.methods.oneshot_reid.recipe import OneShotRecipe
from gingham.methods.oneshot_reid.split import write_split
from gingham.methods.oneshot_reid.streams import TargetLabels
from gingham.methods.processes import in_first

LabelSource = Literal["pseudo", "given", "true", "none"]


class Figures(NamedTuple):
    """How good the labels of an iteration are, as only somebody who knows the truth can say."""

    pseudo_accuracy: float  # of the pseudo labels in use
    weight_right: float  # mean confidence of right ones
    weight_wrong: float
    pseudo_labels: float  # how many are in use
    clusters: float
    clustered: float  # share of the images that is no noise
    cluster_purity: float  # share of these that are of the person whom most in their cluster are of


class Guess(NamedTuple):
    """Of each of the N images of the target; the labelled ones are as they are, with a weight of 1 and a score of 0."""

    persons: Any  # [N] int64, a place among the persons of the labelled images
    weights: Any  # [N] float32, confidence
    scores: Any  # [N] float32, higher is more alike


class OneShotAdaptation(Callback):
    """Trains a `OneShotRecipe` on the source first, then in iterations on the target.

    The recipe's own schedule of learning rates ends with the epochs on the source. Every iteration logs `Figures` after
    its last epoch and writes its labels as ``pseudo_labels/iteration_NN.csv`` in the folder of the run, beside
    ``split.json``, the labelled images. At the end of training the kept network labels the target once more,
    ``pseudo_labels/final.csv``, which a new network can be trained on
    (`gingham.methods.oneshot_reid.data.AdaptationData`, ``labels_file``). Everything that a killed run needs to go on
    is in its checkpoints.

    Labels and clusters are made by the first process, for all, in memory for a few matrices of all pairs of images.

    Args:
        start: epochs on the source before the first iteration, 0 or more; 0 needs ``source_weights`` of the recipe.
        epochs: of an iteration, 1 or more. There are as many iterations as fit ``trainer.max_epochs``.
        decay_epoch: epoch of an iteration from which on the learning rate is a tenth, 0 to `epochs`.
        rate: factor on the recipe's learning rates in iterations, above 0.
        labels: whom the images of the target are held to be: "pseudo", labels by likeness; "given", the labelled images
            alone; "true", all images with their true persons, an upper bound; "none", clusters alone.
        selection: of pseudo labels, see `gingham.methods.oneshot_reid.objective.select`.
        metric: of likeness, see `gingham.methods.oneshot_reid.objective.pseudo_labels`.
        k1: of re-ranking, for labels and clusters, 1 or more.
        k2: likewise.
        lambda_value: of re-ranking for labels, 0 to 1.
        self_mining: whether clusters are trained on too.
        source_share: mu of their distances, 0 to 1.
        diagonal: of their distances, see `gingham.methods.oneshot_reid.mining.mining_distances`.
        radius_share: rho, see `gingham.methods.oneshot_reid.mining.mining_radius`.
        min_samples: images around a core of a cluster, 1 or more.
        keep: which network is left at the end, of the "last" epoch or of the "best" validation in an iteration, which
            is also written as ``kept.ckpt`` where the trainer has a folder of checkpoints.
        write_labels: False writes no files.

    Raises:
        ValueError: an argument outside its range.

    Source: the authors' later code: 30 iterations, `decay_epoch` at 55 of 70 shorter epochs; it keeps the network that
    is best on the test. Whether the paper's self-mining is this clustering is not confirmed.
    """

    def __init__(
        self,
        start: int = 0,
        epochs: int = 25,
        decay_epoch: int = 20,
        rate: float = 1.0,
        labels: LabelSource = "pseudo",
        selection: Selection = "all",
        metric: Likeness = "rerank",
        k1: int = 20,
        k2: int = 6,
        lambda_value: float = 0.3,
        self_mining: bool = True,
        source_share: float = 0.1,
        diagonal: Diagonal = "zero",
        radius_share: float = 1.6e-3,
        min_samples: int = 4,
        keep: Literal["last", "best"] = "last",
        write_labels: bool = True,
    ) -> None:
        for name, value, least in (
            ("start", start, 0),
            ("epochs", epochs, 1),
            ("k1", k1, 1),
            ("k2", k2, 1),
            ("min_samples", min_samples, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
        if not 0 <= decay_epoch <= epochs:
            raise ValueError(f"decay_epoch must be 0 to epochs {epochs}, got {decay_epoch}")
        if not 0 < rate < math.inf:
            raise ValueError(f"rate must be above 0, got {rate}")
        for name, share in (("lambda_value", lambda_value), ("source_share", source_share)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be 0 to 1, got {share}")
        if not 0 < radius_share <= 1:
            raise ValueError(f"radius_share must be above 0 and at most 1, got {radius_share}")
        for name, given, valid in (
            ("labels", labels, ("pseudo", "given", "true", "none")),
            ("selection", selection, ("all", "progressive")),
            ("metric", metric, ("rerank", "euclidean")),
            ("diagonal", diagonal, ("zero", "keep")),
            ("keep", keep, ("last", "best")),
        ):
            if given not in valid:
                raise ValueError(f"{name} must be one of {', '.join(valid)}, got {given!r}")
        if labels == "none" and not self_mining:
            raise ValueError("self_mining must be true where labels is 'none': nothing would be trained on")
        self.start, self.epochs, self.decay_epoch, self.rate = start, epochs, decay_epoch, rate
        self.labels: LabelSource = labels
        self.selection: Selection = selection
        self.metric: Likeness = metric
        self.k1, self.k2, self.lambda_value = k1, k2, lambda_value
        self.self_mining, self.source_share, self.radius_share = self_mining, source_share, radius_share
        self.diagonal: Diagonal = diagonal
        self.min_samples, self.keep, self.write_labels = min_samples, keep, write_labels
        self.current: TargetLabels | None = None
        self.figures: Figures | None = None
        self.split: str | None = None  # the hash of the labelled images' names
        self.radii: list[float] = []  # of the first iteration: of whole images, and of each part where there are parts
        self.best: dict[str, Tensor] | None = None
        self.best_score = -math.inf

    # ------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        labels = None
        if self.current is not None:
            labels = {
                name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
                for name, value in self.current._asdict().items()
            }
        figures = None if self.figures is None else self.figures._asdict()
        state = {"labels": labels, "figures": figures, "radii": self.radii, "split": self.split}
        return state | {"best": self.best, "best_score": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        labels, figures = state_dict["labels"], state_dict["figures"]
        if labels is not None:
            kept: Any = {name: value.numpy() if isinstance(value, Tensor) else value for name, value in labels.items()}
            self.current = TargetLabels(**kept)
        self.figures = None if figures is None else Figures(**figures)
        self.radii, self.best, self.best_score = state_dict["radii"], state_dict["best"], state_dict["best_score"]
        self.split = state_dict["split"]

    # ------------------------------------------------------------------------------------------ training

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(pl_module, OneShotRecipe) or not isinstance(data, AdaptationData):
            raise DataError(
                "adaptation works with OneShotRecipe and AdaptationData, got "
                f"{type(pl_module).__name__} and {type(data).__name__}"
            )
        if trainer.max_epochs is None or trainer.max_epochs < 0:
            raise DataError("trainer.max_epochs must be given: it says how many iterations there are")
        if self.keep == "best" and not data.has_validation:
            raise DataError(
                "keep must be 'last' without persons held back for validation (data.validation_persons): the best "
                "would be chosen by the test"
            )
        if self.keep == "best" and not self._is_validated(trainer):
            raise DataError(
                "keep must be 'last' where no epoch of an iteration is validated (trainer.check_val_every_n_epoch, "
                "limit_val_batches): there would be no best"
            )
        if self.start == 0 and pl_module.source_weights is None:
            raise DataError("start must be 1 or more epochs where the recipe has no source_weights")
        if self.current is not None and len(self.current.weights) != len(data.target):
            raise CheckpointError(
                f"the checkpoint has labels of {len(self.current.weights)} images, the target has {len(data.target)}"
            )
        if self.split not in (None, data.split.sha256):
            raise CheckpointError(
                "the checkpoint is of a training with other labelled images (data.split_file, split_seed, split_rule "
                f"or shots): the sha256 of their names is {self.split}, now {data.split.sha256}"
            )
        self.split = data.split.sha256
        self._require_batches(trainer, pl_module, data)
        folder = self._folder(trainer)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_split(folder / "split.json", data.split)
        data.use_labels(self.current)
        # Where a run is resumed, the moment may have come since its checkpoint was written.
        self._label_if_due(trainer, pl_module, data.next_epoch())

    def _require_batches(self, trainer: lightning.Trainer, recipe: OneShotRecipe, data: AdaptationData) -> None:
        """Raise now what would only be raised after the epochs on the source."""
        if self.iterations(trainer) < 1:
            return
        shape, known = data.shapes["assigned"], len(data.known_ids)
        if shape.persons < 2:
            raise DataError(f"data.target_persons_per_batch must be 2 or more, got {shape.persons}")
        if recipe.target_mining == "semi" and shape.images < 2:
            raise DataError(
                f"data.target_items_per_person must be 2 or more where target_mining is 'semi', got {shape.images}"
            )
        if self.labels != "none" and known < shape.persons * data.process()[1]:
            raise DataError(
                f"the labelled images are of {known} persons, fewer than a batch of all processes has: "
                f"data.target_persons_per_batch {shape.persons} x {data.process()[1]}"
            )

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_index: int
    ) -> None:
        assert isinstance(pl_module, OneShotRecipe)
        if self.current is None:
            steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
            factor = pl_module.scheduled_factor(trainer.global_step, self.start * steps)
        else:
            past = trainer.current_epoch - self.current.first_epoch
            if self.current.iteration == past == batch_index == 0:
                for optimizer in trainer.optimizers:
                    optimizer.state.clear()  # momenta of the source
            factor = self.rate * (0.1 if past >= self.decay_epoch else 1.0)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.keep != "best" or self.current is None or trainer.sanity_checking:
            return
        assert isinstance(pl_module, OneShotRecipe)
        if (score := float(trainer.callback_metrics[pl_module.monitor])) > self.best_score:
            self.best_score = score
            self.best = {name: value.detach().cpu().clone() for name, value in pl_module.network.state_dict().items()}

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, OneShotRecipe)
        epoch = trainer.current_epoch + 1
        if (
            self.current is not None
            and self.figures is not None
            and epoch in (self.current.first_epoch + self.epochs, trainer.max_epochs)
        ):
            for name, value in self.figures._asdict().items():
                if not math.isnan(value):
                    pl_module.log(name, value, prog_bar=name == "pseudo_accuracy")
        self._label_if_due(trainer, pl_module, epoch)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, OneShotRecipe)
        if self.current is None:
            return
        if self.best is not None:
            pl_module.network.load_state_dict(self.best)
            files = trainer.checkpoint_callback
            if isinstance(files, ModelCheckpoint) and files.dirpath is not None:
                trainer.save_checkpoint(Path(files.dirpath) / "kept.ckpt", weights_only=False)
        if self.labels == "pseudo":
            data: AdaptationData = trainer.datamodule  # type: ignore[attr-defined]
            target = pl_module.features_of(data.target_loader())
            self._write(trainer, data, "final", in_first(trainer, lambda: self._guess(data, target)))

    # ------------------------------------------------------------------------------------------ labels

    def iterations(self, trainer: lightning.Trainer) -> int:
        """How many iterations the training has."""
        return math.ceil(((trainer.max_epochs or 0) - self.start) / self.epochs)

    def _is_validated(self, trainer: lightning.Trainer) -> bool:
        """Whether a validation comes within the iterations, if there are any."""
        if self.iterations(trainer) < 1:
            return True
        if trainer.limit_val_batches == 0:
            return False
        every = trainer.check_val_every_n_epoch
        return every is None or (trainer.max_epochs or 0) // every > self.start // every

    def _label_if_due(self, trainer: lightning.Trainer, recipe: OneShotRecipe, epoch: int) -> None:
        """Make the labels of the iteration that begins with this epoch, if they are not made yet."""
        due, past = divmod(epoch - self.start, self.epochs)
        made = -1 if self.current is None else self.current.iteration
        if past or due <= made or not 0 <= due < self.iterations(trainer):
            return
        data: AdaptationData = trainer.datamodule  # type: ignore[attr-defined]
        target = recipe.features_of(data.target_loader())
        source = recipe.features_of(data.source_loader()) if self.self_mining else None
        # Once for all processes: it takes memory, and machines of different kinds round differently.
        groups = 1 if recipe.network.num_parts == 1 else 1 + recipe.network.num_parts
        outcome = in_first(trainer, lambda: self._make(data, target, source, groups, due, self.iterations(trainer)))
        self.radii, (clusters, parts), guess, selected = outcome
        known = data.known_persons
        persons: Any = known
        weights = np.ones(len(known), np.float32)
        if guess is not None:
            self._write(trainer, data, f"iteration_{due:02d}", guess, selected, clusters)
            persons, weights = np.where(selected, guess.persons, -1), guess.weights
        elif self.labels == "true":
            persons = data.true_persons
        elif self.labels == "none":
            persons = None
            if clusters is None:
                raise DataError(f"iteration {due} has nothing to train on: labels is 'none', and clusters are too few")
        self.current = TargetLabels(due, epoch, persons, weights, clusters, parts)
        self.figures = _figures(self.current, selected & (known < 0), data.true_persons)
        data.use_labels(self.current)

    def _make(
        self, data: AdaptationData, target: Tensor, source: Tensor | None, groups: int, iteration: int, iterations: int
    ) -> tuple[list[float], tuple[Any, Any], Guess | None, Any]:
        """Radii and clusters, labels, and which images take part with them, of an iteration."""
        clusters = (None, None) if source is None else self._clusters(data, target, source, groups)
        known = data.known_persons
        selected = known >= 0
        if self.labels != "pseudo":
            return self.radii, clusters, None, selected
        guess = self._guess(data, target)
        is_free = known < 0
        selected[is_free] = select(torch.from_numpy(guess.scores[is_free]), iteration, iterations, self.selection)
        return self.radii, clusters, guess, selected

    def _guess(self, data: AdaptationData, target: Tensor) -> Guess:
        persons = data.known_persons.copy()
        weights, scores = np.ones(len(persons), np.float32), np.zeros(len(persons), np.float32)
        is_known = persons >= 0
        known = torch.from_numpy(is_known)
        found: PseudoLabels = pseudo_labels(
            target[~known],
            target[known],
            torch.from_numpy(persons[is_known]),
            metric=self.metric,
            k1=self.k1,
            k2=self.k2,
            lambda_value=self.lambda_value,
        )
        persons[~is_known] = found.persons.numpy()
        weights[~is_known] = found.weights.numpy()
        scores[~is_known] = found.scores.numpy()
        return Guess(persons, weights, scores)

    def _clusters(self, data: AdaptationData, target: Tensor, source: Tensor, groups: int) -> tuple[Any, Any]:
        """Clusters [N] of the images and, with more than one group of features, those of their parts [N, P].

        An image that is noise in one group is noise. Nothing where too few clusters are left.
        """
        found: list[Any] = []
        for group, features in enumerate(zip(target.chunk(groups, dim=1), source.chunk(groups, dim=1), strict=True)):
            if groups > 1:
                features = (F.normalize(features[0]), F.normalize(features[1]))
            distances = mining_distances(
                *features, k1=self.k1, k2=self.k2, source_share=self.source_share, diagonal=self.diagonal
            )
            if len(self.radii) == group:
                try:
                    self.radii.append(mining_radius(distances, self.radius_share))
                except ValueError as error:
                    raise DataError(f"radius_share of the adaptation does not fit: {error}") from error
            found.append(dbscan(distances, self.radii[group], self.min_samples).numpy())
        clusters, parts = found[0], None
        if groups > 1:
            parts = np.stack(found[1:], axis=1)
            inside = (np.stack(found) >= 0).all(axis=0)
            clusters = np.full_like(clusters, -1)
            clusters[inside] = np.unique(found[0][inside], return_inverse=True)[1]
        if (count := int(clusters.max(initial=-1)) + 1) < data.least_clusters():
            rank_zero_warn(
                f"self-mining found {count} clusters, fewer than the {data.least_clusters()} of a batch: this "
                "iteration does without"
            )
            return None, None
        return clusters, parts

    def _folder(self, trainer: lightning.Trainer) -> Path | None:
        """Where labels are written; None in all processes but the first, or where none are."""
        folder = trainer.log_dir or trainer.default_root_dir  # a broadcast: every process has to ask
        return Path(folder) / "pseudo_labels" if self.write_labels and trainer.is_global_zero else None

    def _write(
        self,
        trainer: lightning.Trainer,
        data: AdaptationData,
        name: str,
        guess: Guess,
        selected: Any = None,
        clusters: Any = None,
    ) -> None:
        folder = self._folder(trainer)
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name}.csv"
        part = file.with_suffix(".part")
        ids, known = data.known_ids, data.known_persons
        with part.open("w", newline="") as table:
            writer = csv.writer(table, lineterminator="\n")
            writer.writerow(["name", "person", "weight", "score", "labelled", "selected", "cluster"])
            for index, image in enumerate(data.target.names):
                cluster = "" if clusters is None else int(clusters[index])
                taken = 1 if selected is None else int(selected[index])
                row = [image, int(ids[guess.persons[index]]), f"{guess.weights[index]:.6f}"]
                writer.writerow([*row, f"{guess.scores[index]:.6f}", int(known[index] >= 0), taken, cluster])
        part.replace(file)


def _figures(labels: TargetLabels, guessed: Any, truth: Any) -> Figures:
    def mean(values: Any) -> float:
        return float(np.mean(values)) if len(values) else math.nan

    accuracy = right_weight = wrong_weight = math.nan
    if labels.persons is not None and guessed.any():
        right = labels.persons[guessed] == truth[guessed]
        weights = labels.weights[guessed]
        accuracy, right_weight, wrong_weight = mean(right), mean(weights[right]), mean(weights[~right])
    clusters, clustered, purity = 0.0, math.nan, math.nan
    if labels.clusters is not None:
        inside = labels.clusters >= 0
        clusters, clustered = float(labels.clusters.max() + 1), mean(inside)
        _, numbers = np.unique(truth, return_inverse=True)
        table = np.zeros((int(clusters), int(numbers.max()) + 1), np.int64)
        np.add.at(table, (labels.clusters[inside], numbers[inside]), 1)
        purity = float(table.max(axis=1).sum() / max(1, inside.sum()))
    return Figures(accuracy, right_weight, wrong_weight, float(guessed.sum()), clusters, clustered, purity)
