"""DCR under Lightning's trainer and the command line: from files, resumed, in two processes, in bounded memory."""

import contextlib
import csv
import inspect
import io
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

pytest.importorskip("lightning", reason="training needs the extra: pip install gingham[train]")
import lightning
import numpy as np
from lightning.pytorch.strategies import SingleDeviceStrategy
from PIL import Image

from gingham.cli import main
from gingham.cli.options import config_file, instantiate, packaged_configs
from gingham.cli.pictures import draw_detections
from gingham.data import LookAlikeScenes
from gingham.data.detection import Detections
from gingham.data.wardrobe import write_coco, write_voc_detection
from gingham.errors import DataError
from gingham.methods.dcr.data import DetectionData, FilledUp
from gingham.methods.dcr.network import DCR, RefinementBranch
from gingham.methods.dcr.recipe import DCRRecipe
from gingham.metrics import voc_average_precision

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

NETWORK: dict[str, Any] = {
    "base": "small",
    "num_classes": 5,
    "pool_size": 8,
    "frozen_norm": False,
    "freeze_stem": False,
    "sampling": {"boxes": 8},
    "base_options": {
        "min_size": 96,
        "max_size": 96,
        "widths": [8, 8, 8],
        "channels": 8,
        "head_channels": 16,
        "rpn_post_nms_top_n_train": 20,
        "rpn_post_nms_top_n_test": 20,
        "box_batch_size_per_image": 12,
    },
}
LENGTHS = [8, 3, 2]


def world(folder: Path, **data: Any) -> dict[str, Any]:
    """The packaged configuration, made so small that it trains in a second."""
    content: dict[str, Any] = yaml.safe_load(Path(config_file("dcr_world")).read_text())
    content["model"]["init_args"]["network"] = NETWORK
    content["data"]["init_args"] |= {"lengths": LENGTHS, "batch_size": 2, "evaluation_batch_size": 2, **data}
    content["trainer"] |= {
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    content["run_dir"] = str(folder)
    return content


def write(content: dict[str, Any], folder: Path) -> str:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    return f"--config={file}"


def trained(content: dict[str, Any]) -> tuple[dict[str, float], nn.Module]:
    """Logged values after training and a test, and the network."""
    warnings.filterwarnings("ignore")
    lightning.seed_everything(0, verbose=False)
    parts = instantiate(content, source="test")
    trainer = lightning.Trainer(
        **content["trainer"], logger=False, enable_checkpointing=False, use_distributed_sampler=False
    )
    trainer.fit(parts.model, parts.data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    (scores,) = trainer.test(parts.model, parts.data, verbose=False)
    return logged | dict(scores), parts.model.network


def written(layout: str, root: Path) -> dict[str, Any]:
    """The world in a published layout, and the options that read it."""
    for split, length in zip(("train", "val", "test"), LENGTHS, strict=True):
        scenes = LookAlikeScenes(split, length)
        (write_coco if layout == "coco" else write_voc_detection)(root, scenes)
    return {"name": layout, "root": str(root), "class_names": list(scenes.class_names)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that the command made."""
    folder = tmp_path_factory.mktemp("run")
    assert main(["fit", write(world(folder), folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def from_memory(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, float], nn.Module]:
    return trained(world(tmp_path_factory.mktemp("memory")))


@pytest.mark.parametrize("layout", ["coco", "voc"])
def test_training_from_files_gives_the_numbers_of_training_from_memory(
    layout: str, from_memory: tuple[dict[str, float], nn.Module], tmp_path: Path
) -> None:
    logged, network = from_memory
    again, other_network = trained(world(tmp_path, **written(layout, tmp_path / layout)))
    assert logged["loss"] > 0
    assert logged == pytest.approx(again, abs=0, nan_ok=True)
    for value, other in zip(network.parameters(), other_network.parameters(), strict=True):
        assert torch.equal(value, other)


def test_every_part_of_the_loss_and_every_score_is_logged(from_memory: tuple[dict[str, float], nn.Module]) -> None:
    logged, _ = from_memory
    scores = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "false_positives")
    expected = {f"{split}_{name}" for split in ("val", "test") for name in scores}
    expected |= {f"{split}_ap50/{label:02d}" for split in ("val", "test") for label in range(1, 6)}
    parts = ("objectness", "rpn_box_reg", "classifier", "box_reg", "refinement")
    assert set(logged) == expected | {"loss"} | {f"parts/loss_{name}" for name in parts}
    assert logged["loss"] == pytest.approx(sum(logged[f"parts/loss_{name}"] for name in parts), rel=1e-5)


def test_a_run_has_checkpoints_pictures_and_a_record(run: Path) -> None:
    names = {path.name for path in run.rglob("*") if path.is_file()}
    assert {"last.ckpt", "best.ckpt", "metrics.csv", "predictions.png", "curves.png"} <= names
    with Image.open(run / "tensorboard" / "predictions.png") as sheet:
        assert sheet.width > 4 * 192  # image, truth, refined, before


class Interruption(Exception):
    pass


@pytest.mark.parametrize("step", [1, 3])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    run: Path, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [write(world(tmp_path), tmp_path), "--checkpoint_every=1"]
    training_step = DCRRecipe.training_step

    def interrupted(recipe: DCRRecipe, batch: Any, index: int) -> torch.Tensor:
        if recipe.global_step == step:
            raise Interruption
        return training_step(recipe, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(DCRRecipe, "training_step", interrupted)
        with pytest.raises(Interruption):
            main(["fit", *words])
    torch.rand(7)
    assert main(["fit", *words, "--ckpt_path=last"]) == 0
    expected, resumed = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (run, tmp_path)
    )
    assert resumed["global_step"] == 4
    assert all(torch.equal(value, resumed["state_dict"][name]) for name, value in expected["state_dict"].items())


def test_validating_within_an_epoch_changes_nothing(run: Path, tmp_path: Path) -> None:
    """Nor is anything else where a run goes on from before a validation, which is not made again."""
    assert main(["fit", write(world(tmp_path), tmp_path), "--trainer.val_check_interval=2"]) == 0
    expected, found = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for folder in (run, tmp_path)
    )
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_the_command_writes_results_that_pycocotools_scores_alike(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    options = written("coco", tmp_path / "coco")
    file = tmp_path / "coco" / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    for index, one in enumerate(content["annotations"]):
        one["area"] = (100, 2000, 20000)[index % 3]  # the classes of size go by the area, which need not be the box's
    file.write_text(json.dumps(content))
    words = [f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}", "--model.voc_points=eleven"]
    assert main(["validate", write(world(tmp_path / "run", **options), tmp_path), *words]) == 0
    printed = capsys.readouterr().out
    scores = json.loads((tmp_path / "run" / "validate.json").read_text())
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(tmp_path / "coco" / "annotations" / "instances_val.json")
        evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "run" / "validate_detections.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    assert [scores[f"val_{name}"] for name in names] == pytest.approx(evaluation.stats[:6].tolist())
    assert min(evaluation.stats[3:6]) >= 0 and max(evaluation.stats[3:6]) > 0
    assert scores["val_ap50"] > 0
    keys = ("image_id", "category_id", "bbox", "area", "iscrowd")
    notes = [[note[key] for key in keys] for note in truth.dataset["annotations"]]
    found = json.loads((tmp_path / "run" / "validate_detections.json").read_text())
    voc = voc_average_precision(
        torch.tensor([[image, label, *box, area, crowd] for image, label, box, area, crowd in notes]),
        torch.tensor([[one["image_id"], *one["bbox"], one["score"], one["category_id"]] for one in found]),
        5,
        eleven_points=True,
    )
    assert scores["val_voc_ap50"] == pytest.approx(voc.nanmean().item(), abs=1e-6)
    with (tmp_path / "run" / "validate_classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [*options["class_names"], "mean"]
    assert rows[-1]["AP50"] == f"{100 * scores['val_ap50']:.2f}"
    assert rows[-1]["AP50"] in printed


def test_two_processes_give_the_metrics_of_one(run: Path) -> None:
    config = f"--config={run / 'config.yaml'}"
    words = ["validate", config, "--ckpt_path=last"]
    assert main(words) == 0

    def scores() -> dict[str, Any]:
        found = json.loads((run / "validate.json").read_text())
        return {name: math.nan if value is None else value for name, value in found.items()}

    alone = scores()
    (run / "validate.json").unlink()
    command = [sys.executable, "-m", "gingham.cli", *words, "--trainer.devices=2", "--trainer.strategy=ddp"]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    together = scores()
    assert together.pop("checkpoint") == alone.pop("checkpoint")
    assert together == pytest.approx(alone, rel=1e-6, nan_ok=True)


def test_a_process_without_an_image_counts_none() -> None:
    items = FilledUp(LookAlikeScenes("val", 1), 2)
    assert [items[index]["image_id"] for index in range(len(items))] == [0, -1]
    recipe = DCRRecipe(NETWORK).eval()
    recipe.evaluate([items[1]], "val")
    meter: Any = recipe.meters["val"]
    shapes = [list(state[0].shape) for state in (meter.images, meter.truth, meter.detections)]
    assert shapes == [[0], [0, 8], [0, 7]]  # what the other processes can be put together with


@pytest.mark.parametrize("layout", ["coco", "voc"])
def test_a_broken_data_set_is_refused_with_a_list_of_what_is_wrong(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    options = written(layout, root)
    folder = root / ("train" if layout == "coco" else "JPEGImages")
    torn, missing = (folder / f"wardrobe_train_00000{index}.png" for index in (0, 1))
    torn.write_bytes(torn.read_bytes()[:90])
    missing.unlink()
    if layout == "coco":
        file = root / "annotations" / "instances_train.json"
        content = json.loads(file.read_text())
        note = next(note for note in content["annotations"] if note["image_id"] == 2)
        note["bbox"] = [1, 2, 3]
        file.write_text(json.dumps(content))
        wrong = "annotation {} of instances_train.json has the bbox [1, 2, 3]".format(note["id"])
    else:
        file = root / "Annotations" / "wardrobe_train_000002.xml"
        file.write_text(file.read_text().replace("<xmax>", "<xmax>9"))
        wrong = "which is not within the picture"
    config = write(world(tmp_path / "run", **options), tmp_path)
    assert main(["check-data", config]) == 1
    listed = capsys.readouterr().out
    assert f"train: {torn}: cannot be read" in listed
    assert f"{missing.stem}" in listed and "no such file" in listed
    assert wrong in listed
    assert "train: 8 images, 3 problems" in listed
    assert "val: 3 images, nothing wrong" in listed
    assert main(["fit", config]) == 2
    assert "3 problems in" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_images_without_objects_are_an_error_only_if_there_are_no_others(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = written("coco", tmp_path / "coco")
    file = tmp_path / "coco" / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] > 1]  # the second batch's
    file.write_text(json.dumps(content))
    config = write(world(tmp_path / "run", **options), tmp_path)
    words = ["validate", config, f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"]
    assert main(words) == 0
    for option in ("limit_val_batches=1", "limit_val_batches=0.5", "fast_dev_run=1"):
        assert main([*words, f"--trainer.{option}"]) == 0
        assert json.loads((tmp_path / "run" / "validate.json").read_text())["val_ap50"] is None
    file.write_text(json.dumps(content | {"annotations": []}))
    assert main(words) == 2
    assert "the val split has no annotated objects" in capsys.readouterr().err


def test_predict_draws_boxes_before_and_after_refinement(run: Path, tmp_path: Path) -> None:
    scenes = LookAlikeScenes("test", 2)
    (tmp_path / "images").mkdir()
    for index in range(2):
        item = scenes.read(index)
        Image.fromarray(item["image"].permute(1, 2, 0).numpy()).save(tmp_path / "images" / f"{index}.png")
    (tmp_path / "images" / "torn.png").write_bytes(b"no image")
    Image.new("RGB", (600, 4)).save(tmp_path / "images" / "00.png")  # nothing is left of it at 96 pixels
    config = world(run)
    config["model"]["init_args"]["shown"] = 0.0
    words = ["--ckpt_path=last", f"--images={tmp_path / 'images'}", f"--out={tmp_path / 'out'}", "--device=cpu"]
    assert main(["predict", write(config, tmp_path), *words]) == 1
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert set(found) == {"0.png", "1.png"}
    assert found["0.png"]
    for row in found["0.png"]:
        assert row["class"] in scenes.class_names
        assert len(row["box"]) == 4
        assert 0 < row["score"] <= 1
    with Image.open(tmp_path / "out" / "boxes" / "0.png.png") as picture:
        assert picture.width > 2 * 4 * 96  # side by side, four times as large


def test_boxes_are_drawn_in_the_colour_of_their_class_around_what_they_hold() -> None:
    image = torch.zeros(3, 48, 96, dtype=torch.uint8)
    found = Detections(torch.tensor([[8.0, 4, 40, 44]]), torch.tensor([2]), torch.ones(1))
    colours = ((255, 0, 0), (0, 0, 255))
    sheet = draw_detections(image, {"one": found, "two": found.above(1.0)}, ("a", "b"), colours)
    left, right = (np.asarray(sheet)[20 : 20 + 4 * 48, x : x + 4 * 96] for x in (0, 4 * 96 + 6))
    rows, columns = np.nonzero((left == colours[1]).all(axis=2))
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (4 * 8, 4 * 4, 4 * 40, 4 * 44)
    assert not (left[20:170, 40:150] != 0).any()  # the box is not filled
    assert not (right != 0).any()


def test_predict_refuses_a_model_with_other_classes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (96, 96)).save(tmp_path / "a.png")
    config = write(world(run, name="voc"), tmp_path)
    words = ["--ckpt_path=last", f"--images={tmp_path / 'a.png'}", f"--out={tmp_path / 'out'}"]
    assert main(["predict", config, *words]) == 2
    assert "the model has 5 classes, its data set 20: mend --config" in capsys.readouterr().err


def test_the_learning_rate_falls_at_the_milestones_and_biases_do_not_decay() -> None:
    recipe = DCRRecipe(NETWORK, milestones=(0.5, 0.75), weight_decay=0.1)
    assert [recipe.rate_factor(step, 8) for step in (0, 3, 4, 5, 6, 7)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert DCRRecipe(NETWORK, milestones=(), power=1.0).rate_factor(2, 8) == pytest.approx(0.75)
    weights, biases = recipe.parameter_groups()
    assert all(p.dim() == 1 for p in biases["params"])
    assert biases["weight_decay"] == 0
    assert len(weights["params"]) + len(biases["params"]) == len(list(recipe.parameters()))


@pytest.mark.parametrize(
    "options",
    [
        {"refinement_weight": -1.0},
        {"milestones": (0.5, 0.5)},
        {"milestones": (1.5,)},
        {"shown": 2.0},
        {"recall": 0.0},
        {"voc_points": "ten"},
    ],
    ids=str,
)
def test_options_outside_their_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must"):
        DCRRecipe(NETWORK, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "moon"},
        {"lengths": (1, -1, 1)},
        {"lengths": (1, 1)},
        {"splits": ("a", "b")},
        {"batch_size": 0},
        {"flip": 2.0},
    ],
    ids=str,
)
def test_data_outside_its_range_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options)).removesuffix('s')}.* must be"):
        DetectionData(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"root": "x"},
        {"also_train": ("x",)},
        {"splits": ("train", "val", "val")},
        {"class_names": ("a", "b")},
        {"whole_pixels": True},
        {"only_annotated": False},
        {"whole_pixels": True, "name": "voc"},
        {"only_annotated": False, "name": "voc"},
    ],
    ids=str,
)
def test_options_that_do_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} is an option of .*; leave it out"):
        DetectionData(**options)


def test_data_says_what_is_missing_or_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root is not set: give the folder of coco"):
        DetectionData("coco").dataset("val")
    options = written("coco", tmp_path)
    with pytest.raises(DataError, match=r"its categories are T-shirt, .*; name them with --data.class_names"):
        DetectionData("coco", str(tmp_path)).dataset("val")
    assert len(DetectionData(**options).dataset("val")) == 3
    assert len(DetectionData(**options, also_train=(str(tmp_path),)).dataset("train")) == 16
    assert DetectionData(**options, splits=("train", "val", "val")).splits() == ("train", "val")


@pytest.mark.parametrize("name", [name for name in packaged_configs() if name.startswith("dcr_")])
def test_packaged_configurations_fit_their_data(name: str) -> None:
    config = yaml.safe_load(Path(config_file(name)).read_text())
    with torch.device("meta"):
        recipe = DCRRecipe(**config["model"]["init_args"])  # reads no weights
    data = DetectionData(**config["data"]["init_args"])
    assert recipe.num_classes == len(data.class_names)
    assert data.has_validation == (name == "dcr_world")  # the others' is what their scores are reported of


def test_voc_has_the_numbers_of_the_official_codes_faster_rcnn() -> None:
    options = yaml.safe_load(Path(config_file("dcr_voc")).read_text())["model"]["init_args"]
    assert options["warmup_steps"] == 1000
    proposals = {name: value for name, value in options["network"]["base_options"].items() if "top_n" in name}
    expected = {"pre_nms": 6000, "post_nms": 300}
    assert proposals == {
        f"rpn_{when}_top_n_{mode}": number for when, number in expected.items() for mode in ("train", "test")
    }


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_boxes_are_not_rounded_to_16_bits(precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", write(world(tmp_path), tmp_path), f"--trainer.precision={precision}"]) == 2
    assert f"trainer.precision is {precision}, which rounds the coordinates of boxes" in capsys.readouterr().err


@pytest.mark.parametrize(("test", "kept"), [("val", {"last"}), ("test", {"last", "best"})])
def test_no_state_is_chosen_by_the_test(
    test: str, kept: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = world(tmp_path / "run", **written("coco", tmp_path / "coco"), splits=["train", "val", test])
    assert main(["fit", write(content, tmp_path), "--trainer.max_steps=1", "--trainer.val_check_interval=1"]) == 0
    assert {path.stem for path in (tmp_path / "run" / "checkpoints").iterdir()} == kept
    said = "gingham: validation is the test (data.splits), no state is the best"
    assert (said in capsys.readouterr().out) == (kept == {"last"})


def test_processes_begin_with_equal_weights_where_pretrained_ones_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the file does not have is random, and made equal by the strategy before the file is read."""
    torch.manual_seed(1)
    body = DCRRecipe(NETWORK).network.detector.model.backbone.body.state_dict()
    torch.save(body, tmp_path / "body.pth")

    def sent(strategy: SingleDeviceStrategy, value: Any, src: int = 0) -> Any:
        return torch.full_like(value, 0.25) if isinstance(value, torch.Tensor) else value

    monkeypatch.setattr(SingleDeviceStrategy, "broadcast", sent)
    recipe = DCRRecipe(NETWORK | {"backbone_weights": str(tmp_path / "body.pth")}, learning_rate=1e-30)
    before = {name: value.clone() for name, value in recipe.network.state_dict().items()}
    options = world(tmp_path)["trainer"] | {"max_epochs": -1, "max_steps": 1, "limit_val_batches": 0}
    trainer = lightning.Trainer(**options, logger=False, enable_checkpointing=False, use_distributed_sampler=False)
    trainer.fit(recipe, DetectionData(lengths=(2, 1, 0)))
    after = dict(recipe.network.named_parameters())
    new = [name for name in after if not name.startswith(("detector.model.backbone.body.", "branch.stages."))]
    assert any(name.startswith("branch.classifier") for name in new)
    assert any(name.startswith("detector.model.rpn") for name in new)
    for name in new:
        fresh = "box_predictor" in name  # detectors with other classes have a new one, which the first process sends
        torch.testing.assert_close(after[name], torch.full_like(before[name], 0.25) if fresh else before[name])
    for name, value in body.items():
        if f"detector.model.backbone.body.{name}" in after:
            torch.testing.assert_close(after[f"detector.model.backbone.body.{name}"], value)
            assert not torch.equal(value, before[f"detector.model.backbone.body.{name}"]) or value.dim() == 1


def status(name: str) -> float:
    """MiB of a line in the process's status."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


measured = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="memory is measured on Linux")
#: The README's bound, in MiB, and the default of max_mib in bytes.
BOUND, PART = 256, inspect.signature(DCR).parameters["max_mib"].default * 2**20


def boxes_and_features(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[count, 4] of all sizes, and what a picture of 672x400 pixels has after the first stage."""
    corner = torch.rand(count, 2) * torch.tensor([500.0, 300])
    return torch.cat([corner, corner + 20 + 150 * torch.rand(count, 2)], dim=1), torch.rand(1, 256, 100, 168)


def peak(run: Callable[[], object]) -> float:
    """MiB that the process has at most while something runs, beyond what it has before."""
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    run()
    return status("VmHWM") - before


@measured
def test_the_branch_of_a_resnet_classifies_in_bounded_memory() -> None:
    """The real stages at 56x56, frozen norms as by default: what they make of a part counts, too."""
    with torch.device("meta"):
        model = DCR("resnet101", 80)
    branch = model.branch
    assert branch is not None
    branch.to_empty(device="cpu").eval()
    for value in branch.state_dict().values():
        value.zero_()
    boxes, features = boxes_and_features(2 * (PART // (4 * 256 * 56 * 56)) + 1)  # three parts, the last of one box
    with torch.inference_mode():
        branch.probabilities(features, [boxes[:1]], max_bytes=PART)
        assert peak(lambda: branch.probabilities(features, [boxes], max_bytes=PART)) < BOUND


@measured
def test_a_thousand_boxes_take_no_more_memory_than_a_part() -> None:
    """With 56x56 bins of 256 channels they take 3.0 GiB at once."""
    branch = RefinementBranch(nn.Conv2d(256, 16, 1, stride=4), 80, stride=4, channels=256).eval()
    boxes, features = boxes_and_features(1000)
    with torch.inference_mode():
        branch.probabilities(features, [boxes[:40]], max_bytes=PART)
        assert peak(lambda: branch.probabilities(features, [boxes], max_bytes=PART)) < 2 * PART / 2**20
        assert peak(lambda: branch(features, [boxes[:100]])) > BOUND  # at once


@measured
def test_a_part_is_let_go_before_the_next_is_made() -> None:
    """Two at a time would be twice what is asked for."""
    branch = RefinementBranch(nn.Identity(), 2, stride=4, channels=256, pool_size=56)
    boxes, features = boxes_and_features(120)
    with torch.inference_mode():
        assert peak(lambda: branch.probabilities(features, [boxes], max_bytes=96 * 2**20)) < 1.5 * 96
