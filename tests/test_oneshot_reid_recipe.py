"""One-shot adaptation under Lightning's trainer: stages, labels, going on when interrupted, and what it refuses."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

pytest.importorskip("timm", reason="training needs the extra: pip install gingham[train]")
from gingham.cli import main
from gingham.cli.options import config_file, instantiate, packaged_configs
from gingham.data.reid import PersonDataset
from gingham.data.wardrobe.reid_export import write_market1501
from gingham.errors import CheckpointError, DataError
from gingham.methods.oneshot_reid import adaptation as adaptation_module
from gingham.methods.oneshot_reid.adaptation import OneShotAdaptation
from gingham.methods.oneshot_reid.data import AdaptationData
from gingham.methods.oneshot_reid.objective import embedding_loss
from gingham.methods.oneshot_reid.recipe import OneShotRecipe
from gingham.methods.oneshot_reid.split import one_shot_split, read_split, write_split
from gingham.methods.processes import in_first
from gingham.nn.checkpoint import read_state_dict
from trainings import trainer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

NETWORK: dict[str, Any] = {
    "backbone": "small",
    "num_classes": 6,
    "embedding_channels": 8,
    "bn_group": None,
    "backbone_options": {"widths": [8, 8, 8]},
}
STEPS = 3
DATA: dict[str, Any] = {
    "images": 3,
    "source_persons": 6,
    "lengths": [5, 4, 4],
    "size": [32, 16],
    "steps_per_epoch": STEPS,
    "persons_per_batch": 3,
    "items_per_person": 2,
    "target_persons_per_batch": 2,
    "target_items_per_person": 2,
    "evaluation_batch_size": 40,
}
ADAPTATION: dict[str, Any] = {
    "start": 1,
    "epochs": 2,
    "decay_epoch": 1,
    "radius_share": 0.1,
    "min_samples": 2,
    "k1": 4,
}


def recipe(network: dict[str, Any] | None = None, seed: int = 0, **options: Any) -> OneShotRecipe:
    torch.manual_seed(seed)
    given: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 0.003}
    return OneShotRecipe(NETWORK | (network or {}), **given | options)


def data(**options: Any) -> AdaptationData:
    return AdaptationData(**DATA | options)


def adaptation(**options: Any) -> OneShotAdaptation:
    return OneShotAdaptation(**ADAPTATION | options)


def fit(folder: Path, callback: OneShotAdaptation, *, given: Any = None, to: Any = None, **options: Any) -> Any:
    defaults: dict[str, Any] = {"max_epochs": 5, "limit_val_batches": 0}
    callbacks = [callback, *options.pop("callbacks", [])]
    run = trainer(folder, callbacks=callbacks, **defaults | options)
    model = to or recipe()
    run.fit(model, given or data())
    return run, model


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "pseudo_labels" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


class Watch(lightning.Callback):
    """Learning rates and the streams of every batch."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.streams: list[list[str]] = []
        self.batches: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, _: Any, outputs: Any, batch: Any, *__: Any) -> None:
        self.streams.append(list(batch))
        self.batches.append(batch)

    def on_before_optimizer_step(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


# ------------------------------------------------------------------------------------------------ a whole training


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, OneShotAdaptation, Watch, OneShotRecipe]:
    """A run that was never interrupted: an epoch on the source, two iterations of two epochs."""
    folder = tmp_path_factory.mktemp("finished")
    torch.set_num_threads(1)
    callback, watch = adaptation(), Watch()
    run, model = fit(folder, callback, callbacks=[watch], limit_val_batches=None, to=recipe(new_layers_rate=3.0))
    return folder, run, callback, watch, model


def test_the_source_comes_first_and_then_labels_and_clusters(finished: Any) -> None:
    watch = finished[3]
    assert watch.streams[:STEPS] == [["source"]] * STEPS
    assert watch.streams[STEPS:] == [["assigned", "mined"]] * (4 * STEPS)


def test_rates_fall_on_the_source_and_in_every_iteration(finished: Any) -> None:
    on_source = [(1 - step / STEPS) ** 0.9 for step in range(STEPS)]
    in_iteration = [1.0] * STEPS + [0.1] * STEPS
    for (backbone, others), factor in zip(finished[3].rates, on_source + 2 * in_iteration, strict=True):
        assert backbone == pytest.approx(0.003 * factor)
        assert others == pytest.approx(0.009 * factor)


def test_it_logs_scores_and_how_good_the_labels_were(finished: Any) -> None:
    _, run, callback, _, model = finished
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    figures = {"pseudo_accuracy", "weight_right", "pseudo_labels", "clusters", "clustered", "cluster_purity"}
    assert figures | {"loss_assigned", "loss_mined", "val_map", "val_rank1"} <= logged.keys()
    truth, labels = data().true_persons, callback.current
    guessed = data().known_persons < 0
    assert logged["pseudo_labels"] == guessed.sum() == 25
    right = labels.persons[guessed] == truth[guessed]
    assert logged["pseudo_accuracy"] == pytest.approx(right.mean())
    assert "pseudo_accuracy" in run.progress_bar_metrics
    assert logged["weight_right"] == pytest.approx(labels.weights[guessed][right].mean())
    assert logged["weight_wrong"] == pytest.approx(labels.weights[guessed][~right].mean())
    inside = labels.clusters >= 0
    majority = [np.bincount(truth[labels.clusters == cluster]).max() for cluster in range(labels.clusters.max() + 1)]
    assert logged["cluster_purity"] == pytest.approx(sum(majority) / inside.sum())
    (tested,) = run.test(model, data(), verbose=False)
    assert 0 < tested["test_map"] <= 1 and tested["test_queries"] == 8


def test_every_iteration_writes_its_labels(finished: Any) -> None:
    folder, _, callback, _, _ = finished
    found = sorted(file.name for file in (folder / "pseudo_labels").iterdir())
    assert found == ["final.csv", "iteration_00.csv", "iteration_01.csv", "split.json"]
    assert read_split(folder / "pseudo_labels" / "split.json") == data().split
    target, rows = data().target, table(folder, "iteration_01")
    assert [row["name"] for row in rows] == list(target.names)
    known = data().known_persons
    for index, row in enumerate(rows):
        assert int(row["labelled"]) == (known[index] >= 0)
        if known[index] >= 0:
            assert int(row["person"]) == target.person_ids[index] and float(row["weight"]) == 1
        assert float(row["weight"]) == pytest.approx(callback.current.weights[index], abs=1e-6)
        assert int(row["cluster"]) == callback.current.clusters[index]
        assert row["selected"] == "1"
    assert {int(row["person"]) for row in rows} <= set(target.person_ids.tolist())


def test_the_labels_are_those_of_the_network_at_that_moment(finished: Any, tmp_path: Path) -> None:
    folder, run, callback, _, model = finished
    again = data()
    run.datamodule = again
    features = model.features_of(again.target_loader())
    torch.testing.assert_close(features.norm(dim=1), torch.ones(30))
    persons, weights, _ = callback._guess(again, features)
    rows = table(folder, "final")
    assert [int(row["person"]) for row in rows] == again.known_ids[persons].tolist()
    assert [float(row["weight"]) for row in rows] == pytest.approx(weights.tolist(), abs=1e-5)


def test_new_networks_can_be_trained_on_the_last_labels(finished: Any, tmp_path: Path) -> None:
    file = finished[0] / "pseudo_labels" / "final.csv"
    again = data(labels_file=str(file))
    persons = len({row["person"] for row in table(finished[0], "final")})
    assert again.source.num_persons == persons
    assert again.source.names == again.target.names
    torch.testing.assert_close(again.source.read(3), again.target.read(3))
    assert persons == 5  # of each the labelled image at least
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    run.fit(recipe({"num_classes": persons}), again)
    assert set(run.callback_metrics) >= {"loss_source", "loss_source_classes"}


# ------------------------------------------------------------------------------------------------ what it is for


class Striped(PersonDataset):
    """Persons in three bands of colours of their own, each camera of the target with a tint and a pattern behind."""

    def __init__(self, split: str, domain: str, persons: int, images: int) -> None:
        sights = [(person, camera, image) for person in range(persons) for camera in (0, 1) for image in range(images)]
        kept = {"query": range(1), "gallery": range(1, images)}.get(split.removeprefix("val_"), range(images))
        self.sights = [sight for sight in sights if sight[2] in kept]
        ids, cameras, _ = zip(*self.sights, strict=True)
        super().__init__(split, np.array(ids) + 1, cameras, [f"{index:04d}" for index in range(len(ids))])
        self.seed = [{"train": 0}.get(split, 1), int(domain == "target")]
        self.tints = (1.0, 0.9) if domain == "source" else (0.65, 1.25)
        self.pictures = [self._draw(index) for index in range(len(ids))]

    def read(self, index: int) -> torch.Tensor:
        return self.pictures[index]

    def _draw(self, index: int) -> torch.Tensor:
        person, camera, image = self.sights[index]
        colours = np.random.default_rng([*self.seed, person]).uniform(40, 215, (3, 3))
        random = np.random.default_rng([*self.seed, person, camera, image, 9])
        tint = self.tints[camera] ** np.array([1.0, 0.0, -1.0])
        picture = np.repeat(colours * tint, 8, axis=0)[:, None] + random.normal(0, 25, (24, 12, 3))
        return torch.from_numpy(picture.clip(0, 255).astype(np.uint8)).permute(2, 0, 1).contiguous()


class StripedData(AdaptationData):
    def open(self, split: str) -> PersonDataset:
        domain = "source" if split == "train_source" else "target"
        persons = 20 if split.startswith("train") else 30
        return Striped(split.removesuffix("_source"), domain, persons, images=4)


@pytest.mark.slow
def test_adaptation_finds_more_than_the_network_of_the_source(tmp_path: Path) -> None:
    """The mean over three seeds; of weights and networks, every one."""
    found = np.array([_adapted(tmp_path / str(seed), seed) for seed in range(3)])
    before, after, accuracy_before, accuracy_after = found.T
    assert (after > before).all() and (after - before).mean() > 0.1, found
    assert (accuracy_after - accuracy_before).mean() > 0.05, found


def _adapted(folder: Path, seed: int) -> tuple[float, float, float, float]:
    """The mAP of the source's network and of the adapted one, the accuracies of the first and of the last labels."""
    sizes = {"steps_per_epoch": 7, "persons_per_batch": 10, "items_per_person": 4, "evaluation_batch_size": 240}
    target = {"target_persons_per_batch": 10, "target_items_per_person": 4}
    scores, callback = [], adaptation(start=4, epochs=2, decay_epoch=2, k1=8, k2=3, self_mining=False)
    figures: list[Any] = []

    class Look(lightning.Callback):
        def on_validation_end(self, trainer: lightning.Trainer, *_: Any) -> None:
            scores.append(float(trainer.callback_metrics["val_map"]))

        def on_train_epoch_start(self, *_: Any) -> None:
            if callback.figures is not None:
                figures.append(callback.figures)

    given = StripedData(**DATA | sizes | target | {"size": [24, 12], "crop": False, "erasing": 0.0, "seed": seed})
    options: dict[str, Any] = {"num_classes": 20, "backbone_options": {"widths": [16, 16, 16]}}
    model = recipe(options, seed, learning_rate=0.005)
    every = {"limit_val_batches": None, "check_val_every_n_epoch": 4, "callbacks": [Look()]}
    fit(folder, callback, given=given, to=model, max_epochs=12, **every)
    assert all(x.weight_right > x.weight_wrong for x in figures), figures
    return scores[0], scores[-1], figures[0].pseudo_accuracy, figures[-1].pseudo_accuracy


# ------------------------------------------------------------------------------------------------ what is known


def test_the_persons_of_unlabelled_images_change_nothing(tmp_path: Path) -> None:
    split_file = tmp_path / "split.json"
    target = data().target
    split = one_shot_split(target.persons, target.cameras, target.names)
    write_split(split_file, split)
    states, accuracies = [], []
    for seed in (None, 0):
        given = data(split_file=str(split_file))
        if seed is not None:
            free = given.known_persons < 0
            noise = np.random.default_rng(seed).integers(1, 10_000, free.sum())
            given.target.person_ids[free] = noise
            given.target.persons = np.unique(given.target.person_ids, return_inverse=True)[1].astype(np.int64)
        callback = adaptation()
        _, model = fit(tmp_path / str(seed), callback, given=given, max_epochs=3)
        states.append(model.state_dict())
        accuracies.append(callback.figures.pseudo_accuracy)  # type: ignore[union-attr]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert accuracies[0] > accuracies[1]  # which somebody who knows the truth can say


@pytest.mark.parametrize("shots", [1, 2, 5])
def test_labelled_and_unlabelled_images_are_all(shots: int) -> None:
    given = data(shots=shots)
    known = given.known_persons
    assert (known >= 0).sum() == 5 * shots == len(given.split.labelled)
    assert (known[known >= 0] == given.true_persons[known >= 0]).all()
    assert len(known) == len(given.target) == 30 and (given.true_persons >= 0).all()


@pytest.mark.parametrize("labels", ["given", "true", "none"])
def test_other_labels_to_compare_with(labels: Any, tmp_path: Path) -> None:
    callback, watch, given = adaptation(labels=labels, self_mining=labels == "none"), Watch(), data()
    fit(tmp_path, callback, given=given, max_epochs=3, callbacks=[watch])
    assert [file.name for file in (tmp_path / "pseudo_labels").iterdir()] == ["split.json"]
    expected = {"given": given.known_persons, "true": given.true_persons}.get(labels)
    for batch in watch.batches[STEPS:]:
        assert batch.keys() == ({"mined"} if expected is None else {"assigned"})
        if expected is not None:
            assert batch["assigned"]["person"].tolist() == expected[batch["assigned"]["index"]].tolist()
            assert (batch["assigned"]["weight"] == 1).all()


def test_progressive_selection_takes_the_surest_first(tmp_path: Path) -> None:
    seen = []

    class Look(lightning.Callback):
        def on_train_epoch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
            if callback.current is not None:
                seen.append((callback.current.iteration, int((callback.current.persons >= 0).sum())))

    callback = adaptation(selection="progressive", self_mining=False)
    fit(tmp_path, callback, callbacks=[Look()], max_epochs=7)
    assert seen == [(0, 13), (0, 13), (1, 21), (1, 21), (2, 30), (2, 30)]
    rows = table(tmp_path, "iteration_00")
    free = [row for row in rows if row["labelled"] == "0"]
    chosen = [float(row["score"]) for row in free if row["selected"] == "1"]
    others = [float(row["score"]) for row in free if row["selected"] == "0"]
    assert len(chosen) == 8 and len(others) == 17 and min(chosen) >= max(others)
    assert all(row["person"] for row in rows)  # the guess, taken or not


# ------------------------------------------------------------------------------------------------ clusters


def test_the_radius_is_that_of_the_first_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, used = [], []
    radius_of, cluster = adaptation_module.mining_radius, adaptation_module.dbscan

    def measure(distances: Any, share: float) -> float:
        measured.append(radius_of(distances, share))
        return measured[-1]

    def clusters(distances: Any, radius: float, min_samples: int) -> Any:
        used.append((radius, radius_of(distances, 0.1)))
        return cluster(distances, radius, min_samples)

    monkeypatch.setattr(adaptation_module, "mining_radius", measure)
    monkeypatch.setattr(adaptation_module, "dbscan", clusters)
    fit(tmp_path, adaptation(epochs=1, decay_epoch=1), max_epochs=4)
    assert len(measured) == 1 and [radius for radius, _ in used] == measured * 3
    assert used[2][1] != measured[0]


def test_parts_of_images_have_clusters_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[np.ndarray] = []
    seen: list[torch.Tensor] = []
    cluster, measure = adaptation_module.dbscan, adaptation_module.mining_distances

    def clusters(distances: Any, radius: float, min_samples: int) -> Any:
        found.append(cluster(distances, radius, min_samples).numpy())
        return torch.from_numpy(found[-1])

    def distances(target: Any, source: Any, **options: Any) -> Any:
        seen.append(target)
        return measure(target, source, **options)

    monkeypatch.setattr(adaptation_module, "dbscan", clusters)
    monkeypatch.setattr(adaptation_module, "mining_distances", distances)
    callback, watch = adaptation(start=1, epochs=1, decay_epoch=1, radius_share=0.3), Watch()
    model = recipe({"num_parts": 2})
    fit(tmp_path, callback, to=model, max_epochs=3, callbacks=[watch])
    assert len(found) == 2 * 3 and len(callback.radii) == 3
    for features in seen:
        torch.testing.assert_close(features.norm(dim=1), torch.ones(30))
        assert features.shape == (30, 8)
    inside = np.all([part >= 0 for part in found[3:]], axis=0)
    labels = callback.current
    assert ((labels.clusters >= 0) == inside).all() and inside.any()  # type: ignore[union-attr]
    pairs = {*zip(labels.clusters[inside].tolist(), found[3][inside].tolist(), strict=True)}  # type: ignore[union-attr]
    assert sorted(number for number, _ in pairs) == list(range(len(pairs)))
    for batch in watch.batches[STEPS:]:
        assert batch["assigned"].keys() == {"image", "person", "weight", "index"}
    last = watch.batches[-1]["mined"]
    assert last["parts"].tolist() == np.stack(found[4:], axis=1)[last["index"]].tolist()
    output = model.network(last["image"])
    alone = embedding_loss(output, last["person"], part_persons=last["parts"])
    assert float(model._losses("mined", output, last)["mined"]) == pytest.approx(float(alone))
    assert model.embed(last["image"]).shape == (4, 24)
    again = adaptation()
    again.load_state_dict(callback.state_dict())
    assert again.radii == callback.radii and (again.current.parts == labels.parts).all()  # type: ignore[union-attr]


def test_an_iteration_with_too_few_clusters_does_without(tmp_path: Path) -> None:
    watch = Watch()
    run = trainer(tmp_path, callbacks=[adaptation(min_samples=30), watch], max_epochs=2, limit_val_batches=0)
    with pytest.warns(UserWarning, match="self-mining found 0 clusters, fewer than the 2 of a batch"):
        run.fit(recipe(), data())
    assert watch.streams[STEPS:] == [["assigned"]] * STEPS
    with pytest.raises(DataError, match="iteration 0 has nothing to train on"):
        fit(tmp_path, adaptation(min_samples=30, labels="none"), max_epochs=2)


# ------------------------------------------------------------------------------------------------ interruptions


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[Any]]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    _, model = fit(folder, adaptation(), to=recipe({"dropout": 0.3}))
    return model.state_dict(), [table(folder, f"iteration_{number:02d}") for number in (0, 1)]


@pytest.mark.parametrize("stop", [1, STEPS, 3 * STEPS, 4 * STEPS + 1])
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(whole: Any, stop: int, tmp_path: Path) -> None:
    """On the source, at the ends of an epoch, of an iteration, and in its midst."""

    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
            if trainer.global_step == stop:
                trainer.save_checkpoint(tmp_path / "half.ckpt")
                raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fit(tmp_path / "first", adaptation(), to=recipe({"dropout": 0.3}), callbacks=[Stop()])
    model = recipe({"dropout": 0.3})
    run = trainer(tmp_path / "second", callbacks=[adaptation()], max_epochs=5, limit_val_batches=0)
    run.fit(model, data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for name, value in whole[0].items():
        assert torch.equal(value, model.state_dict()[name]), name
    for number in (0, 1):
        file = f"iteration_{number:02d}"
        where = "second" if (tmp_path / "second" / "pseudo_labels" / f"{file}.csv").exists() else "first"
        assert table(tmp_path / where, file) == whole[1][number]


def test_workers_learn_from_the_labels_of_the_moment(whole: Any, tmp_path: Path) -> None:
    """From the first epoch and after an interruption, though Lightning asks for the loader before there are any."""

    class Save(lightning.Callback):
        def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
            if trainer.global_step == 3 * STEPS + 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    fit(tmp_path / "first", adaptation(), to=recipe({"dropout": 0.3}), callbacks=[Save()])
    model = recipe({"dropout": 0.3})
    run = trainer(tmp_path / "second", callbacks=[adaptation()], max_epochs=5, limit_val_batches=0)
    run.fit(model, data(workers=1), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for name, value in whole[0].items():
        assert torch.equal(value, model.state_dict()[name]), name
    torch.save(model.network.state_dict(), tmp_path / "source.pt")
    states = []
    for workers in (0, 1):
        watch, begun = Watch(), recipe(source_weights=str(tmp_path / "source.pt"))
        options: dict[str, Any] = {"callbacks": [watch], "max_epochs": 2}
        fit(tmp_path, adaptation(start=0), to=begun, given=data(workers=workers), **options)
        assert not any("source" in streams for streams in watch.streams)
        states.append(begun.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


# ------------------------------------------------------------------------------------------------ the best network


def test_the_best_of_the_validations_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states, scores = [], iter([0.9, 0.2, 0.7, 0.7, 0.1])

    class Keep(lightning.Callback):
        def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
            states.append({name: value.clone() for name, value in pl_module.network.state_dict().items()})

    def report(model: Any, split: str) -> None:
        model.log("val_map", next(scores))
        model.meters[split].reset()

    monkeypatch.setattr(OneShotRecipe, "report", report)
    files: dict[str, Any] = {"enable_checkpointing": True, "callbacks": [Keep(), ModelCheckpoint(tmp_path / "files")]}
    _, model = fit(tmp_path, adaptation(keep="best"), limit_val_batches=None, **files)
    assert len(states) == 5
    kept = read_state_dict(tmp_path / "files" / "kept.ckpt")
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, states[2][name])  # of the source none, of the target the first of the best
        assert torch.equal(value, kept[f"network.{name}"])
    assert not torch.equal(states[2]["embedding.0.weight"], states[4]["embedding.0.weight"])


# ------------------------------------------------------------------------------------------------ weights of a source


def test_adaptation_can_begin_with_a_network_of_the_source(tmp_path: Path) -> None:
    source = recipe()
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    run.fit(source, data())
    run.save_checkpoint(tmp_path / "source.ckpt")
    torch.save(source.network.state_dict(), tmp_path / "plain.pt")
    labels = []
    for file in ("source.ckpt", "plain.pt"):
        model = recipe({"num_classes": 0, "target_classes": 5}, source_weights=str(tmp_path / file))
        callback = adaptation(start=0)
        run, _ = fit(tmp_path / file.partition(".")[0], callback, to=model, max_epochs=2)
        assert "loss_assigned_classes" in run.callback_metrics
        labels.append(table(tmp_path / file.partition(".")[0], "iteration_00"))
    assert labels[0] == labels[1]
    features = source.features_of(data().target_loader())
    persons, _, _ = callback._guess(data(), features)
    assert [int(row["person"]) for row in labels[0]] == data().known_ids[persons].tolist()
    other = recipe({"embedding_channels": 9}, source_weights=str(tmp_path / "plain.pt"))
    with pytest.raises(CheckpointError, match=r"plain\.pt does not fit the model: .*embedding"):
        fit(tmp_path, adaptation(start=0), to=other)


# ------------------------------------------------------------------------------------------------ files, processes


def test_adaptation_from_files_gives_the_numbers_of_adaptation_from_memory(tmp_path: Path) -> None:
    given = data()
    for domain, splits in (("source", ["train_source"]), ("target", ["train", "query", "gallery"])):
        for split in splits:
            write_market1501(tmp_path / domain, given.open(split))  # type: ignore[arg-type]
    files = {"root": str(tmp_path / "target"), "source_root": str(tmp_path / "source"), "complete": False}
    found = []
    for options in ({}, {"name": "market1501", "source_name": "market1501", **files}):
        run, model = fit(tmp_path / f"run{len(found)}", adaptation(), given=data(**options), max_epochs=3)
        (scores,) = run.test(model, data(**options), verbose=False)
        found.append((scores, model.network.state_dict()))
    assert found[0][0] == found[1][0]
    for name, value in found[0][1].items():
        assert torch.equal(value, found[1][1][name]), name


@pytest.mark.slow
def test_two_processes_label_as_one_does(tmp_path: Path) -> None:
    torch.save(recipe().network.state_dict(), tmp_path / "source.pt")
    content = {
        "model": {
            "class_path": "gingham.methods.oneshot_reid.recipe.OneShotRecipe",
            "init_args": {"network": NETWORK, "source_weights": str(tmp_path / "source.pt"), "optimizer": "adamw"},
        },
        "data": {
            "class_path": "gingham.methods.oneshot_reid.data.AdaptationData",
            "init_args": DATA | {"lengths": [5, 3, 3]},
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "check_val_every_n_epoch": 2,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {
                    "class_path": "gingham.methods.oneshot_reid.adaptation.OneShotAdaptation",
                    "init_args": ADAPTATION | {"start": 0},
                }
            ],
        },
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    words = ["fit", f"--config={file}"]
    assert main([*words, f"--run_dir={tmp_path / 'alone'}"]) == 0
    together = ["--trainer.devices=2", "--trainer.strategy=ddp", f"--run_dir={tmp_path / 'together'}"]
    command = [sys.executable, "-m", "gingham.cli", *words, *together]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (one,), (other,) = ([*(tmp_path / run).rglob("iteration_00.csv")] for run in ("alone", "together"))
    for row, again in zip(table(one.parents[1], "iteration_00"), table(other.parents[1], "iteration_00"), strict=True):
        assert [row[name] for name in ("name", "person", "labelled")] == [
            again[name] for name in ("name", "person", "labelled")
        ]
        assert float(row["weight"]) == pytest.approx(float(again["weight"]), abs=1e-4)
    # After training, the batch norms of both count as those of the first, which the checkpoint has.
    given = instantiate({name: content[name] for name in ("model", "data")}, source=file)
    trainer(tmp_path, callbacks=[adaptation(start=0)], max_epochs=0).fit(given.model, given.data)
    given.model.load_state_dict(read_state_dict(tmp_path / "together" / "checkpoints" / "last.ckpt"))
    guess = adaptation()._guess(given.data, given.model.features_of(given.data.target_loader()))
    (last,) = (tmp_path / "together").rglob("final.csv")
    for row, score in zip(table(last.parents[1], "final"), guess.scores, strict=True):
        assert float(row["score"]) == pytest.approx(score, abs=2e-5)


# ------------------------------------------------------------------------------------------------ options


def refused(text: str, error: Any, action: Callable[[], Any]) -> None:
    with pytest.raises(error, match=text):
        action()


def test_nothing_is_chosen_by_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdaptationData, "has_validation", property(lambda _: False))
    refused("the best would be chosen by the test", DataError, lambda: fit(tmp_path, adaptation(keep="best")))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"target_persons_per_batch": 6},
            "the labelled images are of 5 persons, .* data.target_persons_per_batch 6 x 1",
        ),
        ({"target_persons_per_batch": 1}, "target_persons_per_batch must be 2 or more"),
        ({"target_items_per_person": 1}, "target_items_per_person must be 2 or more where target_mining is 'semi'"),
        ({"persons_per_batch": 1}, "^data.persons_per_batch must be 2 or more"),
        ({"lengths": [1, 4, 4]}, "the labelled images are of 1 persons"),
    ],
    ids=str,
)
def test_batches_that_cannot_be_are_refused_before_the_source_is_learnt(
    options: dict[str, Any], text: str, tmp_path: Path
) -> None:
    watch = Watch()
    refused(text, DataError, lambda: fit(tmp_path, adaptation(), given=data(**options), callbacks=[watch]))
    assert not watch.streams


def test_a_training_goes_on_with_the_same_labelled_images_only(tmp_path: Path) -> None:
    run, _ = fit(tmp_path, adaptation(), max_epochs=1)
    run.save_checkpoint(tmp_path / "half.ckpt")
    for options in ({"split_seed": 1}, {"shots": 2}):
        again = trainer(tmp_path, callbacks=[adaptation()], max_epochs=2, limit_val_batches=0)
        with pytest.raises(CheckpointError, match="the checkpoint is of a training with other labelled images"):
            again.fit(recipe(), data(**options), ckpt_path=tmp_path / "half.ckpt", weights_only=True)


def test_a_network_that_has_diverged_labels_nothing(tmp_path: Path) -> None:
    model = recipe()
    torch.save({name: x * torch.nan for name, x in model.network.state_dict().items()}, tmp_path / "source.pt")
    model = recipe(source_weights=str(tmp_path / "source.pt"))
    refused("the network has diverged", DataError, lambda: fit(tmp_path, adaptation(start=0), to=model))


def test_a_radius_that_no_pair_is_within_is_named(tmp_path: Path) -> None:
    refused(
        "radius_share of the adaptation does not fit: share must select a pair",
        DataError,
        lambda: fit(tmp_path, adaptation(radius_share=1e-6), max_epochs=2),
    )


class OfTwo:
    """What a callback sees of a trainer in one of two processes, which get from the first what it made."""

    def __init__(self, first: bool, made: Any = None) -> None:
        self.is_global_zero, self.made, self.strategy = first, made, self

    def broadcast(self, mine: Any) -> Any:
        self.made = mine if self.is_global_zero else self.made
        return self.made


def test_labels_are_made_once_and_an_error_is_everybodys() -> None:
    first: Any = OfTwo(first=True)
    assert in_first(first, lambda: 3) == 3
    second: Any = OfTwo(first=False, made=first.made)
    assert in_first(second, lambda: pytest.fail("made twice")) == 3

    def fail() -> None:
        raise DataError("nothing to cluster")

    refused("nothing to cluster", DataError, lambda: in_first(first, fail))
    second.made = first.made
    refused("nothing to cluster", DataError, lambda: in_first(second, lambda: None))


@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {"check_val_every_n_epoch": 6}], ids=str)
def test_a_best_that_no_validation_can_find_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="keep must be 'last' where no epoch of an iteration is validated"):
        fit(tmp_path, adaptation(keep="best"), **{"limit_val_batches": None, **options})


def test_synchronised_batch_norms_take_no_groups(tmp_path: Path) -> None:
    model = recipe({"bn_group": 2})
    torch.nn.SyncBatchNorm.convert_sync_batchnorm(model.network)
    with pytest.raises(DataError, match=r"trainer\.sync_batchnorm replaces batch norms that take groups"):
        fit(tmp_path, adaptation(), to=model)


def test_what_does_not_fit_together_is_named(tmp_path: Path) -> None:
    refused("^start must be 1 or more epochs", DataError, lambda: fit(tmp_path, adaptation(start=0)))
    refused(
        "num_classes 9, the source has 6", DataError, lambda: fit(tmp_path, adaptation(), to=recipe({"num_classes": 9}))
    )
    refused("max_epochs must be given", DataError, lambda: fit(tmp_path, adaptation(), max_epochs=-1, max_steps=3))
    split = tmp_path / "split.json"
    write_split(split, one_shot_split(np.array([0]), np.array([0]), ["nobody"]))
    refused("lists 'nobody', which is no training image", DataError, lambda: data(split_file=str(split)).known_ids)
    labels = tmp_path / "labels.csv"
    labels.write_text("name,person\nnobody,1\n")
    refused("labels.csv: has no label for", DataError, lambda: data(labels_file=str(labels)).source)
    twice = [*data().target.names, data().target.names[0]]
    labels.write_text("name,person\n" + "".join(f"{name},1\n" for name in twice))
    refused(
        "labels.csv: has labels of other images, or two of one", DataError, lambda: data(labels_file=str(labels)).source
    )
    labels.write_text("image\nnobody\n")
    refused("labels.csv: is no table of labels", DataError, lambda: data(labels_file=str(labels)).source)
    refused("data.source_root is not set", DataError, lambda: data(source_name="market1501").source)


@pytest.mark.parametrize(
    "options",
    [
        {"start": -1},
        {"epochs": 0},
        {"decay_epoch": 3},
        {"rate": 0.0},
        {"labels": "all"},
        {"selection": "some"},
        {"metric": "cosine"},
        {"k1": 0},
        {"k2": 0},
        {"lambda_value": 1.5},
        {"source_share": -0.1},
        {"diagonal": "one"},
        {"radius_share": 0.0},
        {"min_samples": 0},
        {"keep": "all"},
    ],
    ids=str,
)
def test_options_of_the_adaptation_outside_their_range_are_named(options: dict[str, Any]) -> None:
    refused(f"^{next(iter(options))} must be", ValueError, lambda: adaptation(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"margin": -1.0},
        {"source_mining": "easy"},
        {"target_mining": "easy"},
        {"weighting": "all"},
        {"new_layers_rate": 0.0},
        {"constant_share": 1.0},
        {"final_factor": 0.0},
        {"tenth_every": 0.0},
        {"tenth_every": 0.4, "constant_share": 0.5},
    ],
    ids=str,
)
def test_options_of_the_recipe_outside_their_range_are_named(options: dict[str, Any]) -> None:
    refused(f"^{next(iter(options))} must be", ValueError, lambda: recipe(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"shots": 0},
        {"split_rule": "last"},
        {"steps_per_epoch": 0},
        {"target_persons_per_batch": 0},
        {"target_items_per_person": 0},
        {"source_persons": 0},
    ],
    ids=str,
)
def test_options_of_the_data_outside_their_range_are_named(options: dict[str, Any]) -> None:
    refused(f"^{next(iter(options))} must be", ValueError, lambda: data(**options))


def test_the_rate_on_the_source_is_that_of_the_code() -> None:
    made = recipe(constant_share=2 / 3)
    assert [made.rate_factor(epoch, 150) for epoch in (0, 99, 100)] == [1, 1, 1]
    assert made.rate_factor(125, 150) == pytest.approx(0.001**0.5)
    assert made.rate_factor(150, 150) == pytest.approx(0.001)


@pytest.mark.parametrize("steps", [1, 43, 47])
def test_the_rate_of_a_new_network_is_that_of_the_code(steps: int) -> None:
    made = recipe(tenth_every=0.4)
    for epoch in (0, 59, 60, 119, 120, 149):
        expected = 0.1 ** (epoch // 60)
        for step in (epoch * steps, epoch * steps + steps - 1):
            assert made.rate_factor(step, 150 * steps) == pytest.approx(expected)


@pytest.mark.parametrize("name", [name for name in packaged_configs() if name.startswith("oneshot_reid_")])
def test_packaged_configurations_are_whole(name: str) -> None:
    content = yaml.safe_load(Path(config_file(name)).read_text())
    with torch.device("meta"):
        parts = instantiate(content, source=name)
    assert isinstance(parts.model, OneShotRecipe) and isinstance(parts.data, AdaptationData)
