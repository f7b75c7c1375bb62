"""Self-correction: cycles, averages, batch-norm statistics, refined labels, and going on after a kill at any moment."""

import csv
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("lightning", reason="training needs the extra: pip install gingham[train]")
import lightning
from PIL import Image
from torch.utils.data import DataLoader

from gingham.cli import main
from gingham.cli.records import LastCheckpoint
from gingham.data.person_warp import PersonAugmentation
from gingham.data.segmentation import read_soft_label
from gingham.data.transforms import EvaluationTransform, RandomScaleCropFlip
from gingham.data.wardrobe import Dolls, write_lip
from gingham.errors import DataError
from gingham.methods.pdml.recipe import PDMLRecipe
from gingham.methods.schp.recipe import SCHPRecipe
from gingham.methods.schp.schedule import cycles_after, cyclical_rate
from gingham.methods.schp.self_correction import SelfCorrection, average_parameters, estimate_batch_norm
from gingham.methods.segmentation_data import SegmentationData
from gingham.methods.spgnet.recipe import SPGNetRecipe
from trainings import trainer

pytestmark = pytest.mark.usefixtures("one_thread")

# --- the schedule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [
        (0, 7e-5),
        (1, 7.63e-4),
        (5, 3.535e-3),
        (9, 6.307e-3),
        (10, 7e-3),
        (55, 3.535e-3),
        (99, 7.211078e-5),
        (100, 3.5e-3),
        (101, 3.416062e-3),
        (105, 1.785e-3),
        (109, 1.539381e-4),
        (110, 3.5e-3),
        (149, 1.539381e-4),
    ],
)
def test_learning_rate_of_an_epoch(epoch: int, rate: float) -> None:
    assert cyclical_rate(epoch) == pytest.approx(rate, abs=1e-9)


def test_a_cycle_never_reaches_the_lowest_rate() -> None:
    assert min(cyclical_rate(epoch) for epoch in range(100, 300)) > 1.5e-4


def test_averages_come_after_the_start_and_after_every_cycle() -> None:
    due = [epochs for epochs in range(1, 151) if cycles_after(epochs) > cycles_after(epochs - 1)]
    assert due == [100, 110, 120, 130, 140, 150]
    assert [cycles_after(epochs) for epochs in due] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("options", [{"start": 0}, {"cycle": 0}, {"warmup": -1}, {"start": 5, "warmup": 6}], ids=str)
def test_epochs_outside_their_range_are_named(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"^{list(options)[-1]} must be "):
        cyclical_rate(120, **options)  # type: ignore[arg-type]
    if "warmup" not in options:
        with pytest.raises(ValueError, match=f"^{list(options)[-1]} must be "):
            cycles_after(120, **options)


# --- the average ------------------------------------------------------------------------------------------------------


def snapshots(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for _ in range(count)]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1)])
def test_the_average_is_the_plain_mean_in_any_order(order: tuple[int, ...]) -> None:
    networks = snapshots(4)
    before = [deepcopy(network.state_dict()) for network in networks]
    average = deepcopy(networks[3])
    official = torch.optim.swa_utils.AveragedModel(networks[3])
    for count, index in enumerate(order):
        average_parameters(average, networks[index], 1 / (count + 1))
        official.update_parameters(networks[index])
    for name, value in average.named_parameters():
        mean = torch.stack([dict(network.named_parameters())[name] for network in networks]).mean(0)
        torch.testing.assert_close(value, mean, rtol=0, atol=1e-6)
    for value, other in zip(average.parameters(), official.module.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-6)
    for network, state in zip(networks, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_the_first_call_copies_and_buffers_stay() -> None:
    average, network = snapshots(2)
    average[1].running_mean += 7  # type: ignore[index, operator]
    average_parameters(average, network, 1.0)
    for value, other in zip(average.parameters(), network.parameters(), strict=True):
        assert torch.equal(value, other)
    assert average[1].running_mean.tolist() == [7.0] * 4  # type: ignore[index]


# --- batch-norm statistics --------------------------------------------------------------------------------------------


def test_statistics_are_means_over_batches_weighted_by_images() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(n, 3, 5, 4) * scale + scale for n, scale in ((4, 1.0), (4, 3.0), (2, 5.0))]
    norm = nn.BatchNorm2d(3, momentum=0.1)
    estimate_batch_norm(norm, batches)
    means = torch.stack([x.mean((0, 2, 3)) for x in batches])
    variances = torch.stack([x.transpose(0, 1).flatten(1).var(1, unbiased=True) for x in batches])
    weights = torch.tensor([0.4, 0.4, 0.2])[:, None]
    torch.testing.assert_close(norm.running_mean, (weights * means).sum(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(norm.running_var, (weights * variances).sum(0), rtol=1e-6, atol=1e-6)
    assert norm.momentum == 0.1
    again = deepcopy(norm)
    estimate_batch_norm(again, batches)
    torch.testing.assert_close(again.running_mean, norm.running_mean)
    torch.testing.assert_close(again.running_var, norm.running_var)


def test_estimation_changes_the_output_and_nothing_else() -> None:
    network = snapshots(1)[0].eval()
    images = torch.randn(6, 3, 8, 8) + 2
    before, parameters = network(images), deepcopy(dict(network.named_parameters()))
    estimate_batch_norm(network, images.split(3))
    assert not network.training
    assert not torch.allclose(network(images), before)
    assert all(torch.equal(value, parameters[name]) for name, value in network.named_parameters())
    assert all(value.grad is None for value in network.parameters())


# --- the callback -----------------------------------------------------------------------------------------------------

NETWORK: dict[str, Any] = {
    "backbone": "small",
    "num_classes": 8,
    "output_stride": 4,
    "context_channels": 8,
    "parsing_channels": 8,
    "detail_channels": 8,
    "edge_channels": 4,
    "dropout": 0.1,
    "backbone_options": {"widths": [8, 8, 8, 8]},
}
CYCLES = {"start": 2, "cycle": 1, "warmup": 1}


def config(folder: Path, **callback: Any) -> Path:
    """A tiny SCHP on dolls: three steps an epoch, averages after epochs 2, 3 and 4."""
    content = {
        "model": {
            "class_path": "gingham.methods.schp.recipe.SCHPRecipe",
            "init_args": {"network": NETWORK, "optimizer": "adamw", "learning_rate": 0.01, "warp_size": None},
        },
        "data": {
            "class_path": "gingham.methods.segmentation_data.SegmentationData",
            "init_args": {
                "name": "wardrobe_dolls",
                "lengths": [12, 4, 4],
                "batch_size": 4,
                "evaluation_batch_size": 4,
                "crop": [64, 32],
                "scales": None,
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 4,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {
                    "class_path": "gingham.methods.schp.self_correction.SelfCorrection",
                    "init_args": CYCLES | callback,
                }
            ],
        },
    }
    file = folder / "config.json"
    file.write_text(json.dumps(content))
    return file


def words(folder: Path, file: Path, *more: str) -> list[str]:
    return ["fit", f"--config={file}", f"--run_dir={folder / 'run'}", "--checkpoint_every=1", *more]


def columns(folder: Path, name: str) -> list[float]:
    with (folder / "run" / "csv" / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(words(folder, config(folder))) == 0
    return folder


def state(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "run" / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return content


def correction(folder: Path) -> dict[str, Any]:
    (found,) = (x for x in state(folder, "last")["callbacks"].values() if "average" in x)
    return dict(found)


def test_the_average_of_the_cycles_is_in_the_checkpoints(finished: Path) -> None:
    found = correction(finished)
    assert found["count"] == 3
    last = {name.removeprefix("network."): value for name, value in state(finished, "cycle_3")["state_dict"].items()}
    assert all(torch.equal(value, last[name]) for name, value in found["average"].items())
    student = state(finished, "last")["state_dict"]["network.fusion.0.weight"]
    assert not torch.equal(student, found["average"]["fusion.0.weight"])
    assert len(columns(finished, "val_average_miou")) == 3
    assert len(columns(finished, "val_miou")) == 4


@pytest.mark.slow
def test_the_average_is_evaluated_like_any_checkpoint(finished: Path, tmp_path: Path) -> None:
    file = config(tmp_path)
    assert main(["validate", f"--config={file}", f"--run_dir={finished / 'run'}", "--ckpt_path=cycle_3"]) == 0
    report = json.loads((finished / "run" / "validate.json").read_text())
    assert report["val_miou"] == pytest.approx(columns(finished, "val_average_miou")[-1], abs=1e-6)
    with (finished / "run" / "validate_classes.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert [row["class"] for row in rows] == [*Dolls("val", 0).class_names, "mean"]
    assert float(rows[-1]["IoU"]) == pytest.approx(100 * report["val_miou"], abs=0.01)


def test_refined_labels_are_label_images_of_every_picture(finished: Path) -> None:
    folders = sorted((finished / "run").rglob("refined_labels/cycle_*"))
    assert [folder.name for folder in folders] == ["cycle_1", "cycle_2", "cycle_3"]
    dolls = Dolls("train", 12, noise=True)
    for folder in folders:
        assert sorted(file.stem for file in folder.iterdir()) == sorted(item["name"] for item in dolls)
    with Image.open(folders[0] / f"{dolls[0]['name']}.png") as image:
        assert image.mode == "P"
        assert image.size == (32, 64)
        assert max(image.get_flattened_data()) < 8


def test_labels_on_disk_are_refined_beside_them_and_stay(tmp_path: Path) -> None:
    for split, count in (("train", 12), ("val", 4)):
        write_lip(tmp_path / "LIP", Dolls(split, count, noise=split == "train"))
    before = {file: file.read_bytes() for file in (tmp_path / "LIP").rglob("*.*")}
    data = ["--data.name=lip", f"--data.root={tmp_path / 'LIP'}", "--data.classes=wardrobe_dolls"]
    file = config(tmp_path)
    assert main(words(tmp_path, file, *data, "--trainer.max_epochs=2")) == 0
    assert {file: file.read_bytes() for file in (tmp_path / "LIP").rglob("*.*")} == before
    refined = tmp_path / "LIP-refined" / "cycle_1"
    assert len(list(refined.iterdir())) == 12
    assert main([*words(tmp_path, file, *data), f"--run_dir={tmp_path / 'other'}"]) == 2  # they are another run's
    assert main(words(tmp_path, file, *data, "--trainer.max_epochs=2", "--overwrite")) == 0


class Watch:
    """What a recipe is given in place of labels, and the learning rates, batch by batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alphas: list[float | None] = []
        self.rates: list[float] = []
        loss = SCHPRecipe.loss

        def watched(recipe: SCHPRecipe, output: Any, batch: Any, refined: Any) -> Tensor:
            self.alphas.append(None if refined is None else refined.alpha)
            self.rates.append(recipe.trainer.optimizers[0].param_groups[0]["lr"])
            if refined is not None:
                assert not refined.labels.requires_grad
                torch.testing.assert_close(refined.labels.sum(1), torch.ones_like(refined.labels[:, 0]))
            return loss(recipe, output, batch, refined)

        monkeypatch.setattr(SCHPRecipe, "loss", watched)


def test_labels_are_refined_from_the_first_average_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    assert main(words(tmp_path, config(tmp_path, write_labels=False))) == 0
    assert watch.alphas == [None] * 6 + [1 / 2] * 3 + [1 / 3] * 3
    factors = [cyclical_rate(e, peak=1.0, low=0.01, warmup=1, start=2, cycle=1, cycle_peak=0.5) for e in range(4)]
    assert watch.rates == pytest.approx([0.01 * factor for factor in factors for _ in range(3)])
    assert not list(tmp_path.rglob("refined_labels"))


def test_offline_labels_are_the_running_mean_of_label_and_predictions(tmp_path: Path) -> None:
    assert main(words(tmp_path, config(tmp_path, refinement="offline"), "--data.augmentation=person")) == 0
    dolls = Dolls("train", 12, noise=True)
    name, label = dolls[0]["name"], dolls[0]["label"]
    folders = sorted((tmp_path / "run").rglob("refined_labels/cycle_*"))
    soft = [read_soft_label(folder / f"{name}.npz", 8, label) / 255 for folder in folders]
    given = nn.functional.one_hot(label, 8).movedim(-1, 0).float()
    recipe = SCHPRecipe(NETWORK, warp_size=None).eval()
    for count, refined in enumerate(soft, 1):
        recipe.load_state_dict(state(tmp_path, f"cycle_{count}")["state_dict"])
        image = EvaluationTransform()(dolls[0])["image"]
        with torch.no_grad():
            given = (count * given + recipe(image[None])[0].softmax(0)) / (count + 1)
        torch.testing.assert_close(refined, given, rtol=0, atol=0.01)
    with Image.open(folders[-1] / f"{name}.png") as image:
        assert image.getpixel((0, 0)) == int(soft[-1][:, 0, 0].argmax())


@pytest.mark.parametrize("augment", [RandomScaleCropFlip, PersonAugmentation])
def test_soft_labels_go_with_the_pixels(augment: Any) -> None:
    item = Dolls("train", 1)[0]
    soft = 255 * nn.functional.one_hot(item["label"], 8).movedim(-1, 0).to(torch.uint8)
    for seed in range(4):
        torch.manual_seed(seed)
        moved = augment((60, 40), mirror_pairs=((2, 3), (5, 6)))({**item, "soft": soft})
        labelled = moved["label"] != 255
        assert torch.equal(moved["soft"].argmax(0)[labelled], moved["label"][labelled])


def test_weights_alone_and_labels_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    (tmp_path / "weights").mkdir()
    assert main(words(tmp_path / "weights", config(tmp_path / "weights", refine_labels=False))) == 0
    assert watch.alphas == [None] * 12
    (tmp_path / "labels").mkdir()
    assert main(words(tmp_path / "labels", config(tmp_path / "labels", average_weights=False))) == 0
    assert watch.alphas[12:] == [None] * 6 + [1 / 2] * 3 + [1 / 3] * 3
    average, student = correction(tmp_path / "labels")["average"], state(tmp_path / "labels", "last")["state_dict"]
    assert torch.equal(average["fusion.0.weight"], student["network.fusion.0.weight"])


def dolls(**options: Any) -> SegmentationData:
    sizes: dict[str, Any] = {"batch_size": 4, "crop": (64, 32), "scales": None, "lengths": (8, 4, 4)}
    return SegmentationData("wardrobe_dolls", **sizes | options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("crop", "aligned"), [((64, 32), False), ((65, 33), True)])
def test_the_average_predicts_labels_by_the_corner_rule_of_the_recipe(
    tmp_path: Path, crop: tuple[int, int], aligned: bool
) -> None:
    torch.manual_seed(0)
    network = {"backbone": "small", "num_classes": 8, "decoder_channels": 8}
    recipe = SPGNetRecipe(network | {"backbone_options": {"widths": [8, 8, 8, 8]}})
    correction = SelfCorrection(start=1, cycle=1, warmup=0, write_labels=False)
    batch: Any = {"image": torch.randn(2, 3, *crop), "label": torch.randint(8, (2, *crop))}
    found: list[Any] = []

    class Refine(lightning.Callback):
        def on_train_end(self, *_: Any) -> None:
            assert recipe.refine is not None
            found.append(recipe.refine(batch))

    callbacks = [correction, Refine()]
    trainer(tmp_path, callbacks=callbacks, max_epochs=1, limit_val_batches=0).fit(recipe, dolls(crop=crop))
    (refined,) = found
    assert correction.average is not None and refined.alpha == 0.5
    logits = correction.average(batch["image"]).logits
    predicted = nn.functional.interpolate(logits, crop, mode="bilinear", align_corners=aligned).softmax(1)
    given = nn.functional.one_hot(batch["label"], 8).movedim(-1, 1)
    torch.testing.assert_close(refined.labels, (predicted + given) / 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("limit", "batches"), [(1.0, 2), (1, 1)])
def test_batch_norms_are_estimated_on_the_batches_of_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: Any, batches: int
) -> None:
    def count(network: nn.Module, images: Any) -> None:
        seen.append(len(list(images)))

    seen: list[int] = []
    monkeypatch.setattr("gingham.methods.schp.self_correction.estimate_batch_norm", count)
    correction = SelfCorrection(start=1, cycle=1, warmup=0, write_labels=False)
    options = {"max_epochs": 2, "limit_val_batches": 0, "limit_train_batches": limit}
    trainer(tmp_path, callbacks=[correction], **options).fit(schp(), dolls())
    assert seen == [batches] * 2


@pytest.mark.filterwarnings("ignore")
def test_a_second_training_with_the_same_parts_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    correction, recipe, data = SelfCorrection(start=1, cycle=1, warmup=0, refinement="offline"), schp(), dolls()
    for number in range(2):
        correction.labels_dir = str(tmp_path / f"labels_{number}")
        trainer(tmp_path, callbacks=[correction], max_epochs=2, limit_val_batches=0).fit(recipe, data)
        assert correction.count == 2 and recipe.refine is None
        assert "soft" not in data.dataset("train")[0]
    assert watch.alphas == [None, None, 1 / 2, 1 / 2] * 2


class Then(lightning.Callback):
    """Does something when a training begins, or after its first epoch."""

    def __init__(self, act: Callable[[], None], *, at_the_end: bool = False) -> None:
        self.act, self.at_the_end = act, at_the_end

    def on_train_start(self, *_: Any) -> None:
        if not self.at_the_end:
            self.act()

    def on_train_epoch_end(self, *_: Any) -> None:
        if self.at_the_end:
            self.act()


def offline(folder: Path, labels: Path, epochs: int = 2, then: Any = (), checkpoint: Path | None = None) -> None:
    """A training in a folder, refined offline after every epoch."""
    correction = SelfCorrection(start=1, cycle=1, warmup=0, refinement="offline", labels_dir=str(labels))
    saves = LastCheckpoint(folder / "checkpoints", 1)
    saves.dirpath = folder / "checkpoints"  # type: ignore[attr-defined]
    options = {"max_epochs": epochs, "limit_val_batches": 0, "enable_checkpointing": True}
    run = trainer(folder, callbacks=[correction, *then, saves], **options)
    run.fit(schp(), dolls(), ckpt_path=checkpoint, weights_only=True if checkpoint else None)


@pytest.mark.filterwarnings("ignore")
def test_labels_of_one_training_at_a_time_are_in_a_folder(tmp_path: Path) -> None:
    labels = tmp_path / "labels"

    def another() -> None:
        with pytest.raises(DataError, match=f"{labels}: holds refined labels of another run"):
            offline(tmp_path / "second", labels)

    offline(tmp_path / "first", labels, epochs=1, then=[Then(another)])  # before there is a label
    another()
    offline(tmp_path / "first", labels, checkpoint=tmp_path / "first" / "checkpoints" / "last.ckpt")
    assert len(list((labels / "cycle_2").glob("*.npz"))) == 8
    taken = Then((labels / "run.json").unlink, at_the_end=True)
    checkpoint = tmp_path / "first" / "checkpoints" / "last.ckpt"
    with pytest.raises(DataError, match=f"{labels}: was deleted or taken by another run"):
        offline(tmp_path / "first", labels, epochs=4, then=[taken], checkpoint=checkpoint)
    assert not (labels / "cycle_4").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_training_without_a_cycle_leaves_the_folder_to_others(tmp_path: Path) -> None:
    for folder in (tmp_path / "first", tmp_path / "second"):
        correction = SelfCorrection(start=2, cycle=1, warmup=0, labels_dir=str(tmp_path / "labels"))
        trainer(folder, callbacks=[correction], max_epochs=1, limit_val_batches=0).fit(schp(), dolls())
    assert not list((tmp_path / "labels").iterdir())


@pytest.mark.filterwarnings("ignore")
def test_a_training_that_goes_on_elsewhere_finds_its_labels_or_says_so(tmp_path: Path) -> None:
    first, checkpoint = tmp_path / "first", tmp_path / "first" / "checkpoints" / "last.ckpt"
    offline(first, first / "labels")
    (tmp_path / "third").mkdir()
    copy = shutil.copy(checkpoint, tmp_path / "third")
    offline(tmp_path / "second", tmp_path / "second" / "labels", 3, checkpoint=checkpoint)
    offline(first, first / "labels", 3, checkpoint=checkpoint)
    for name in ("cycle_3", "run.json"):
        assert (tmp_path / "second" / "labels" / name).exists()
    for label in (first / "labels" / "cycle_3").iterdir():
        assert (tmp_path / "second" / "labels" / "cycle_3" / label.name).read_bytes() == label.read_bytes()
    first.rename(tmp_path / "moved")
    offline(tmp_path / "moved", tmp_path / "moved" / "labels", 3, checkpoint=copy)
    with pytest.raises(DataError, match="no refined labels of cycle 2, with which this training goes on"):
        offline(tmp_path / "fourth", tmp_path / "fourth" / "labels", 3, checkpoint=copy)


@pytest.mark.filterwarnings("ignore")
def test_labels_of_a_run_that_is_overwritten_are_replaced(tmp_path: Path) -> None:
    labels = tmp_path / "labels"
    offline(tmp_path / "run", labels, epochs=3)
    before = (labels / "run.json").read_text()
    with pytest.raises(DataError, match="another run"):
        offline(tmp_path / "run", labels)  # which can still be continued
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("*.ckpt"):
        checkpoint.unlink()
    offline(tmp_path / "run", labels, epochs=2)
    assert (labels / "run.json").read_text() != before
    assert sorted(path.name for path in labels.iterdir()) == ["cycle_1", "cycle_2", "run.json"]


class Counts(lightning.Callback):
    """How many networks the average holds after each epoch."""

    def __init__(self, correction: SelfCorrection) -> None:
        self.correction = correction
        self.found: list[int] = []

    def on_train_epoch_end(self, *_: Any) -> None:
        self.found.append(self.correction.count)


@pytest.mark.filterwarnings("ignore")
def test_a_training_that_comes_late_to_self_correction_averages_ends_of_cycles_only(tmp_path: Path) -> None:
    plain = trainer(tmp_path, max_epochs=4, limit_val_batches=0)
    plain.fit(schp(), dolls())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    correction = SelfCorrection(start=2, cycle=3, warmup=1, write_labels=False)
    counts = Counts(correction)
    later = trainer(tmp_path, callbacks=[correction, counts], max_epochs=9, limit_val_batches=0)
    later.fit(schp(), dolls(), ckpt_path=tmp_path / "plain.ckpt", weights_only=True)
    assert counts.found == [1, 1, 1, 2, 2]  # after epochs 5 to 9


class Stop(lightning.Callback):
    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{"max_steps": 3}, {"callbacks": [Stop()]}], ids=["max_steps", "should_stop"])
def test_an_epoch_that_is_cut_short_is_no_end_of_a_cycle(tmp_path: Path, options: dict[str, Any]) -> None:
    correction = SelfCorrection(start=1, cycle=1, warmup=0, write_labels=False)
    callbacks = [correction, *options.pop("callbacks", [])]
    run = trainer(tmp_path, callbacks=callbacks, max_epochs=4, limit_val_batches=0, **options)
    run.fit(schp(), dolls())
    assert run.global_step == 3 and correction.count == 1


@pytest.mark.filterwarnings("ignore")
def test_the_schedule_alone_changes_nothing_but_the_learning_rate(tmp_path: Path) -> None:
    """Neither the weights nor the batch-norm statistics that the training ends with."""
    options = {"average_weights": False, "refine_labels": False, "estimate_batch_norm": False}
    alone = SelfCorrection(start=2, cycle=1, warmup=1, **options)  # type: ignore[arg-type]

    class Rates(lightning.Callback):
        def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
            epoch = trainer.current_epoch
            factor = cyclical_rate(epoch, peak=1.0, low=0.01, warmup=1, start=2, cycle=1, cycle_peak=0.5)
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = group["initial_lr"] * factor

    trained = []
    for callback in (alone, Rates()):
        recipe = schp()
        run = trainer(tmp_path, callbacks=[callback], max_epochs=4)
        run.fit(recipe, dolls())
        trained.append(recipe.network.state_dict())
        assert run.callback_metrics.get("val_average_miou", 0.0) in (0.0, run.callback_metrics["val_miou"])
    assert alone.count == 3
    for name, value in trained[1].items():
        assert torch.equal(trained[0][name], value), name


def schp(**options: Any) -> SCHPRecipe:
    torch.manual_seed(0)
    return SCHPRecipe(NETWORK, learning_rate=0.001, **{"warp_size": None} | options)


@pytest.mark.filterwarnings("ignore")
def test_plain_loaders_will_do_where_no_labels_are_written(tmp_path: Path) -> None:
    def run(**options: Any) -> SelfCorrection:
        correction = SelfCorrection(start=1, cycle=1, warmup=0, **options)
        loaders = DataLoader(items, 4), DataLoader(items, 4)
        trainer(tmp_path, callbacks=[correction], max_epochs=2).fit(schp(), *loaders)
        return correction

    transform = EvaluationTransform()
    items = [transform(item) for item in Dolls("train", 8)]
    assert run(write_labels=False).count == 2
    with pytest.raises(DataError, match="pictures of a SegmentationData only, got NoneType; set write_labels to false"):
        run()


@pytest.mark.filterwarnings("ignore")
def test_points_are_no_labels_to_refine(tmp_path: Path) -> None:
    network = {"backbone": "small", "num_classes": 6, "head_channels": 8, "output_stride": 4}
    scenes = SegmentationData(
        "wardrobe_points", points="instances", batch_size=4, crop=64, scales=None, lengths=(8, 1, 1)
    )
    for supervision in ("points", "labels"):
        correction = SelfCorrection(start=1, cycle=1, warmup=0, write_labels=False)
        recipe = PDMLRecipe(network, supervision=supervision)  # type: ignore[arg-type]
        run = trainer(tmp_path, callbacks=[correction], max_epochs=2, limit_val_batches=0)
        if supervision == "points":
            with pytest.raises(DataError, match="this PDMLRecipe learns none; set refine_labels to false"):
                run.fit(recipe, scenes)
        else:
            run.fit(recipe, scenes)
            assert correction.count == 2


@pytest.mark.filterwarnings("ignore")
def test_a_folder_that_cannot_be_written_is_named_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    steps: list[int] = []
    monkeypatch.setattr(SCHPRecipe, "training_step", lambda *_: steps.append(1))
    for folder, readable in ((tmp_path / "file" / "labels", True), (tmp_path / "closed", False)):
        monkeypatch.setattr(os, "access", lambda *_, readable=readable: readable)
        correction = SelfCorrection(start=1, cycle=1, warmup=0, labels_dir=str(folder))
        with pytest.raises(DataError, match=f"{folder}: no labels can be written there .*labels_dir"):
            trainer(tmp_path, callbacks=[correction], max_epochs=2).fit(schp(), dolls())
    assert not steps


def test_a_training_too_short_for_a_cycle_says_so(tmp_path: Path) -> None:
    for epochs, start in ((1, 2), (2, 2)):
        correction = SelfCorrection(start=start, cycle=1, warmup=0, write_labels=False)
        run = trainer(
            tmp_path, callbacks=[correction], max_epochs=epochs, limit_val_batches=0, accumulate_grad_batches=3
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.fit(schp(), dolls())
        said = [text for warning in caught if "self-correction never begins" in (text := str(warning.message))]
        assert len(said) == (correction.count == 0) == (epochs < start)


@pytest.mark.filterwarnings("ignore")
def test_an_average_is_evaluated_before_the_first_validation_and_within_the_limit(tmp_path: Path) -> None:
    class Count(lightning.Callback):
        def on_train_epoch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
            known.append("val_average_miou" in trainer.callback_metrics)

    seen, known = 0, []

    class Watched(SCHPRecipe):
        def predict_classes(self, images: Tensor) -> Tensor:
            nonlocal seen
            seen += len(images)
            return super().predict_classes(images)

    def run(limit: Any, **options: Any) -> None:
        recipe = Watched(NETWORK, warp_size=None)
        correction = SelfCorrection(start=1, cycle=1, warmup=0, write_labels=False)
        callbacks = [correction, Count()]
        trainer(tmp_path, callbacks=callbacks, max_epochs=2, limit_val_batches=limit, **options).fit(recipe, dolls())

    run(3, check_val_every_n_epoch=2)  # one picture a batch
    assert known == [False, True] and seen == 3 * 3
    run(0)
    assert known[2:] == [False, False] and seen == 3 * 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_cycles_are_of_the_precision_of_the_training(tmp_path: Path, precision: Any) -> None:
    for refinement in ("online", "offline"):
        folder = tmp_path / refinement
        correction = SelfCorrection(
            start=1,
            cycle=1,
            warmup=0,
            refinement=refinement,  # type: ignore[arg-type]
            labels_dir=str(folder),
        )
        run = trainer(tmp_path, callbacks=[correction], max_epochs=2, precision=precision)
        run.fit(schp(warp_size=48), dolls())
        assert run.callback_metrics["loss"].isfinite() and run.callback_metrics["val_average_miou"] > 0
        assert len(list((folder / "cycle_2").glob("*.png"))) == 8


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("refinement", ["online", "offline"])
def test_cycles_on_a_gpu_go_on_from_a_checkpoint(tmp_path: Path, refinement: Any) -> None:
    def part(epochs: int, checkpoint: Path | None = None) -> tuple[SelfCorrection, lightning.Trainer]:
        correction = SelfCorrection(
            start=1, cycle=1, warmup=0, refinement=refinement, labels_dir=str(tmp_path / "labels")
        )
        recipe = SCHPRecipe(NETWORK, warp_size=48, flip=True, boundary_width=1, learning_rate=0.001)
        run = trainer(tmp_path, callbacks=[correction], accelerator="gpu", max_epochs=epochs)
        run.fit(recipe, dolls(), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        return correction, run

    first, run = part(2)
    assert first.count == 2 and run.callback_metrics["val_average_miou"] > 0
    run.save_checkpoint(tmp_path / "last.ckpt")
    second, run = part(3, tmp_path / "last.ckpt")
    assert second.count == 3 and run.callback_metrics["loss"].isfinite()
    assert run.callback_metrics["val_boundary_iou"] >= 0
    assert len(list((tmp_path / "labels" / "cycle_3").glob("*.png"))) == 8
    assert second.average is not None
    assert {value.device for value in second.average.parameters()} == {run.strategy.root_device}


@pytest.mark.filterwarnings("ignore")
def test_labels_of_pictures_in_subfolders_go_to_subfolders(tmp_path: Path) -> None:
    root = tmp_path / "LIP"
    for split, count in (("train", 8), ("val", 4)):
        write_lip(root, Dolls(split, count))
        for kind in ("images", "segmentations"):
            (root / f"{split}_{kind}").rename(root / "moved")
            (root / f"{split}_{kind}").mkdir()
            (root / "moved").rename(root / f"{split}_{kind}" / "part")
        names = (root / f"{split}_id.txt").read_text().split()
        (root / f"{split}_id.txt").write_text("".join(f"part/{name}\n" for name in names))
    data = SegmentationData("lip", str(root), classes="wardrobe_dolls", batch_size=4, crop=(64, 32), scales=None)
    correction = SelfCorrection(start=1, cycle=1, warmup=0, refinement="offline")
    trainer(tmp_path, callbacks=[correction], max_epochs=2, limit_val_batches=0).fit(schp(), data)
    assert len(list((tmp_path / "LIP-refined" / "cycle_2" / "part").glob("*.png"))) == 8


@pytest.mark.slow
def test_it_works_on_ccnet_by_configuration_alone(tmp_path: Path) -> None:
    callback = json.dumps(
        [
            {
                "class_path": "gingham.methods.schp.self_correction.SelfCorrection",
                "init_args": CYCLES,
            }
        ]
    )
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    small = ["--data.lengths=[32,8,8]", "--trainer.max_epochs=3", f"--trainer.callbacks={callback}"]
    assert main(["fit", "--config=ccnet_world", f"--run_dir={tmp_path / 'run'}", *small, *quiet]) == 0
    assert correction(tmp_path)["count"] == 2
    assert len(columns(tmp_path, "val_average_miou")) == 2
    assert len(list((tmp_path / "run").rglob("refined_labels/cycle_2/*.png"))) == 32


@pytest.mark.parametrize(
    "options",
    [
        {"refinement": "both"},
        {"refine_labels": False, "refinement": "offline"},
        {"refinement": "offline", "write_labels": False},
        {"start": 0},
        {"cycle": 0},
        {"warmup": -1},
        {"start": 5, "warmup": 6},
        {"lowest": 2.0},
        {"peak": -0.1},
    ],
    ids=str,
)
def test_options_outside_their_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{list(options)[-1]} must"):
        SelfCorrection(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"lowest": 0.1, "schedule": False},
        {"peak": 1.0, "schedule": False},
        {"labels_dir": "labels", "write_labels": False},
        {"labels_dir": "labels", "refine_labels": False},
    ],
    ids=str,
)
def test_options_that_would_do_nothing_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} is an option of .*; leave it out"):
        SelfCorrection(**options)


# --- killed -----------------------------------------------------------------------------------------------------------


def fit_and_die(arguments: list[str], fatal: int, counted: str | None) -> None:
    """Train; die by SIGKILL at event number `fatal`: before or after a step, an average, a label file, a checkpoint."""
    from gingham.methods.schp import self_correction
    from gingham.methods.segmentation_recipe import SegmentationRecipe

    torch.set_num_threads(1)
    events: list[str] = []

    def watch(owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            for moment in ("before", "after"):
                if moment == "after":
                    result = original(*args, **kwargs)
                events.append(f"{moment} {name}")
                if len(events) == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, watched)

    watch(SegmentationRecipe, "training_step")
    watch(self_correction, "average_parameters")
    watch(self_correction, "estimate_batch_norm")
    watch(self_correction, "write_label")
    watch(self_correction, "write_soft_label")
    watch(SelfCorrection, "_save")
    watch(LastCheckpoint, "_take")
    watch(LastCheckpoint, "_publish")
    code = main(arguments)
    if counted is not None:
        Path(counted).write_text(json.dumps(events))
    sys.exit(code)


def in_a_process(arguments: list[str], fatal: int = -1, counted: str | None = None) -> int | None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gingham.cli.training", "gingham.methods.schp.recipe", "matplotlib.pyplot"])
    process = context.Process(target=fit_and_die, args=(arguments, fatal, counted))
    process.start()
    process.join(200)
    return process.exitcode


@pytest.mark.slow
def test_a_run_killed_at_any_moment_of_a_cycle_goes_on_exactly(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    assert in_a_process(words(whole, config(whole, refinement="offline")), counted=str(tmp_path / "events")) == 0
    events = json.loads((tmp_path / "events").read_text())
    first = events.index("before average_parameters")
    kinds = ["after average_parameters", "after estimate_batch_norm", "after _save", "after _take"]
    kinds += ["after training_step"]
    moments = [events.index(kind, first) + 1 for kind in kinds]
    moments.append(events.index("before write_label", events.index("before average_parameters", first + 1)) + 4)
    for fatal in moments:
        folder = tmp_path / f"killed_{fatal}"
        folder.mkdir()
        file = config(folder, refinement="offline")
        assert in_a_process(words(folder, file), fatal) == -signal.SIGKILL
        assert in_a_process(words(folder, file, "--ckpt_path=last")) == 0
        where = f"killed {events[fatal - 1]}"
        for name, value in state(whole, "last")["state_dict"].items():
            assert torch.equal(value, state(folder, "last")["state_dict"][name]), (where, name)
        assert correction(folder)["count"] == 3, where
        for name, value in correction(whole)["average"].items():
            assert torch.equal(value, correction(folder)["average"][name]), (where, name)
        for metric in ("loss", "val_miou", "val_average_miou"):
            assert columns(folder, metric) == columns(whole, metric), (where, metric)
        for label in (whole / "run").rglob("refined_labels/*/*.*"):
            assert (folder / label.relative_to(whole)).read_bytes() == label.read_bytes(), where


@pytest.mark.slow
def test_two_processes_share_the_labels_and_hold_one_average(tmp_path: Path) -> None:
    arguments = words(
        tmp_path, config(tmp_path), "--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=2"
    )
    command = [sys.executable, "-m", "gingham.cli", *arguments, "--trainer.max_epochs=3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert correction(tmp_path)["count"] == 2
    for cycle in (1, 2):
        assert len(list((tmp_path / "run").rglob(f"refined_labels/cycle_{cycle}/*.png"))) == 12
    assert len(columns(tmp_path, "val_average_miou")) == 2


def _average_in_a_process(rank: int, address: str, results: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    for average_weights in (True, False):
        recipe = schp()
        for buffer in recipe.network.buffers():
            buffer.fill_(rank + 1)  # as batch norms that saw the images of that process
        correction = SelfCorrection(average_weights=average_weights, estimate_batch_norm=False)
        results.put(
            {float(value) for buffer in correction._average_with(recipe).buffers() for value in buffer.unique()}
        )
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_average_to_the_same_batch_norms(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    address = f"file://{tmp_path}/rendezvous"
    workers = [context.Process(target=_average_in_a_process, args=(rank, address, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=200) for _ in range(4)] == [{1.0}] * 4
    for worker in workers:
        worker.join(timeout=30)
