"""SeeNet's recipe under Lightning's trainer: losses, rates, thresholds, checkpoints; and the road to segmentation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import DataLoader

pytest.importorskip("lightning", reason="training needs the extra: pip install gingham[train]")
import lightning

from gingham.cli import main
from gingham.cli.training import Pictures, config_file
from gingham.data import TagScenes, VOCSegmentation
from gingham.data.attention_maps import read_attention
from gingham.data.image_tags import read_tags
from gingham.data.transforms import EvaluationTransform
from gingham.data.wardrobe import TAG_SCENE_LABELS, write_voc_tags
from gingham.errors import DataError
from gingham.methods.seenet.attention import Attention
from gingham.methods.seenet.objective import branch_losses
from gingham.methods.seenet.recipe import SeeNetRecipe
from gingham.methods.seenet.seeds import confident_labels
from gingham.methods.segmentation_data import SegmentationData
from trainings import trainer

pytestmark = pytest.mark.usefixtures("one_thread")

NETWORK: dict[str, Any] = {
    "backbone": "small",
    "num_classes": 5,
    "output_stride": 4,
    "head_channels": 8,
    "head_std": None,
    "dropout": 0.0,
    "backbone_options": {"widths": [8, 8]},
}
SCORES = {"miou", "object_iou", "seed_iou", "precision", "recall", "leakage", "threshold", "tag_precision"}
SCORES |= {f"iou/{index:02d}" for index in range(6)}


def loader(split: str = "train", count: int = 8, batch: int = 4) -> DataLoader[Any]:
    return DataLoader(TagScenes(split, count, cache=True, transform=EvaluationTransform()), batch)  # type: ignore[arg-type]


def recipe(network: dict[str, Any] | None = None, **options: Any) -> SeeNetRecipe:
    torch.manual_seed(0)
    return SeeNetRecipe(NETWORK | (network or {}), **{"attention_size": None} | options)


class Steps(lightning.Callback):
    """What was logged, and the learning rates, at each step."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.rates: list[list[float]] = []

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.mark.filterwarnings("ignore")
def test_a_training_logs_its_losses_and_its_attention(tmp_path: Path) -> None:
    made = recipe()
    run = trainer(tmp_path, max_epochs=1, callbacks=[Pictures()])
    run.fit(made, loader(), loader("val", 6))
    terms = {"loss", "loss_attended", "loss_potential", "loss_background", "erased", "background", "unattended"}
    assert set(run.callback_metrics) == terms | {f"val_{name}" for name in SCORES}
    assert run.callback_metrics["val_threshold"] == made.threshold
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    (tested,) = run.test(made, loader("val", 6, batch=2), verbose=False)
    assert set(tested) == {f"test_{name}" for name in SCORES}
    for name in SCORES:  # the same images, in other batches
        assert tested[f"test_{name}"] == pytest.approx(logged[f"val_{name}"], nan_ok=True, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_the_loss_is_the_weighted_sum_of_the_branches_after_their_warm_up(tmp_path: Path) -> None:
    steps = Steps()
    made = recipe(loss_weights=(1.0, 2.0, 3.0), branch_warmup=3, learning_rate=1e-9)
    trainer(tmp_path, max_epochs=3, callbacks=[steps], limit_val_batches=0).fit(made, loader())
    assert len(steps.logged) == 6
    for step, terms in enumerate(steps.logged):
        others = 2 * terms["loss_potential"] + 3 * terms["loss_background"]
        assert terms["loss"] == pytest.approx(terms["loss_attended"] + (others if step >= 3 else 0), rel=1e-5)
        assert terms["loss_potential"] > 0 and 0 < terms["erased"] < 1
    batch = next(iter(loader()))
    expected = branch_losses(made.network.train()(batch["image"], batch["tags"]), batch["tags"])
    assert float(expected.attended) == pytest.approx(steps.logged[0]["loss_attended"], rel=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_rates_fall_at_milestones_and_biases_have_twice_the_rate(tmp_path: Path) -> None:
    steps = Steps()
    made = recipe(learning_rate=0.001, weight_decay=0.0002, milestones=(2, 5))
    trainer(tmp_path, max_epochs=3, callbacks=[steps], limit_val_batches=0).fit(made, loader())
    expected = [0.001, 0.001, 0.0001, 0.0001, 0.0001, 0.00001]
    assert [weights for weights, _ in steps.rates] == pytest.approx(expected)
    assert [biases for _, biases in steps.rates] == pytest.approx([2 * rate for rate in expected])
    weights, biases = made.trainer.optimizers[0].param_groups
    assert (weights["weight_decay"], biases["weight_decay"]) == (0.0002, 0.0)
    assert len(weights["params"]) + len(biases["params"]) == len(list(made.network.parameters()))
    assert all(parameter.dim() == 1 for parameter in biases["params"]) and len(biases["params"]) == 8


@pytest.mark.filterwarnings("ignore")
def test_a_training_repeats_and_lowers_its_loss(tmp_path: Path) -> None:
    losses = []
    for _ in range(2):
        steps = Steps()
        made = recipe(optimizer="adamw", learning_rate=0.01)
        trainer(tmp_path, max_epochs=15, callbacks=[steps], limit_val_batches=0).fit(made, loader())
        losses.append([terms["loss_attended"] for terms in steps.logged])
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0.9 * losses[0][0]


@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    def data() -> SegmentationData:
        return SegmentationData("wardrobe_tags", batch_size=4, crop=64, scales=None, lengths=(8, 2, 1))

    def made() -> SeeNetRecipe:
        return recipe({"dropout": 0.3}, branch_warmup=3)

    whole = made()
    trainer(tmp_path, max_epochs=4).fit(whole, data())

    class Stop(lightning.Callback):
        def on_train_epoch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    run = trainer(tmp_path, max_epochs=4, callbacks=[Stop()])
    run.fit(made(), data())
    run.save_checkpoint(tmp_path / "half.ckpt")
    second = made()
    trainer(tmp_path, max_epochs=4).fit(second, data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for (name, one), other in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, msg=name, atol=0, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_the_threshold_is_the_best_of_validation_and_kept_for_the_test(tmp_path: Path) -> None:
    made, fixed = recipe(), recipe(threshold=0.3)
    run = trainer(tmp_path)
    run.validate(made, loader("val"), verbose=False)
    found = made.attention_scores["val"]
    assert made.threshold == found.thresholds[found.best()] and made.scores["val"].miou == found.miou.max()
    (tested,) = run.test(made, loader("test"), verbose=False)
    assert tested["test_threshold"] == pytest.approx(float(made.threshold))
    again = recipe()
    again.load_state_dict(made.state_dict())
    assert again.threshold == made.threshold
    trainer(tmp_path).validate(fixed, loader("val"), verbose=False)
    assert float(fixed.threshold) == pytest.approx(0.3)


@pytest.mark.filterwarnings("ignore")
def test_one_class_is_enough(tmp_path: Path) -> None:
    made = recipe({"num_classes": 1})
    items: Any = [
        {**item, "tags": item["tags"][:1], "label": torch.where(item["label"] > 1, 0, item["label"])}
        for item in loader("val").dataset
    ]
    run = trainer(tmp_path, max_epochs=1)
    run.fit(made, DataLoader(items, 4), DataLoader(items, 4))
    assert 0 < run.callback_metrics["val_tag_precision"] <= 1 and made.scores["val"].iou.shape == (2,)


def test_tags_are_ranked_alike_in_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe({"num_classes": 1})
    for logit, tag in ((0.9, 0), (2.0, 1)):  # within 0 to 1, as if it were a probability, and not
        seen = Attention(torch.rand(1, 1, 2, 3), torch.tensor([[logit]]))
        monkeypatch.setattr(made, "attend", lambda *_, seen=seen: seen)
        label = torch.zeros(1, 2, 3, dtype=torch.int64)
        made.evaluate({"image": torch.zeros(1, 3, 2, 3), "label": label, "tags": torch.tensor([[tag]])}, "val")
    assert made.tag_meters["val"].compute() == 1  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore")
def test_tags_that_are_not_given_are_those_the_network_finds() -> None:
    made = recipe().eval()
    batch = next(iter(loader("val")))
    head = made.network.attended[-1]
    head.weight.data.zero_()
    head.bias.data = torch.tensor([1.0, -1.0, 0.5, -2.0, -3.0])
    assert made.predict_tags(batch["image"]).tolist() == [[1, 0, 1, 0, 0]] * 4
    head.bias.data -= 5
    assert made.predict_tags(batch["image"]).tolist() == [[1, 0, 0, 0, 0]] * 4
    item = TagScenes("val", 1, transform=EvaluationTransform())[0]
    views = made.views(item)
    assert views["attention"].shape == views["prediction"].shape == (64, 64)
    assert set(made.views({"image": item["image"]})["prediction"].unique().tolist()) <= {0, 1}


@pytest.mark.filterwarnings("ignore")
def test_pixels_have_the_class_of_the_strongest_map_above_the_threshold() -> None:
    attention = torch.tensor([[[[0.2, 0.6, 0.9]], [[0.1, 0.7, 0.3]]]])
    assert recipe({"num_classes": 2}, threshold=0.5).classes_of(attention).tolist() == [[[0, 2, 1]]]


@pytest.mark.filterwarnings("ignore")
def test_data_without_tags_or_masks_is_refused(tmp_path: Path) -> None:
    items = [{k: v for k, v in item.items() if k != "tags"} for item in loader("val", 2, 1).dataset]
    with pytest.raises(DataError, match="the batches have no tags: take a data set with image-level labels"):
        trainer(tmp_path, max_epochs=1).fit(recipe(), DataLoader(items))
    blind: Any = [{**item, "label": torch.full((64, 64), 255)} for item in loader("val", 2, 1).dataset]
    with pytest.raises(DataError, match="the val split has no masks to evaluate attention by"):
        trainer(tmp_path).validate(recipe(), DataLoader(blind), verbose=False)
    data = SegmentationData("wardrobe", batch_size=2, crop=64, scales=None, lengths=(2, 2, 2))
    with pytest.raises(
        DataError, match="the network has num_classes 5, the data set has 7 classes with the background"
    ):
        trainer(tmp_path, max_epochs=1).fit(recipe(), data)


@pytest.mark.filterwarnings("ignore")
def test_missing_masks_are_found_before_training(voc: Path, tmp_path: Path) -> None:
    for name in ("JPEGImages", "ImageSets"):
        (tmp_path / name).symlink_to(voc / name)
    (tmp_path / "SegmentationClass").mkdir()
    options: Any = {"root": str(tmp_path), "classes": "wardrobe_tags", "batch_size": 2, "crop": 64, "scales": None}
    made, run = recipe(), trainer(tmp_path / "run", max_epochs=1)
    with pytest.raises(DataError, match="the val split has no masks to evaluate attention by; train with"):
        run.fit(made, SegmentationData("voc_tags", **options))
    assert run.global_step == 0
    run = trainer(tmp_path / "run", max_steps=1, limit_val_batches=0)
    run.fit(made, SegmentationData("voc_tags", **options))
    assert run.global_step == 1


@pytest.mark.parametrize(
    "options",
    [
        {"loss_weights": (1.0, 1.0)},
        {"loss_weights": (1.0, -1.0, 0.0)},
        {"branch_warmup": -1},
        {"bias_rate": -1.0},
        {"milestones": (0,)},
        {"attention_size": 0},
        {"threshold": 0.0},
        {"learning_rate": 0.0},
    ],
    ids=str,
)
def test_options_outside_their_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must be"):
        recipe(**options)


@pytest.mark.parametrize("name", ["seenet_voc", "seenet_world"])
def test_packaged_configurations_fit_their_data(name: str) -> None:
    config = yaml.safe_load(Path(config_file(name)).read_text())
    with torch.device("meta"):
        made = SeeNetRecipe(**config["model"]["init_args"])  # reads no weights
    assert made.num_classes == SegmentationData(**config["data"]["init_args"]).label_space().num_classes - 1


# ------------------------------------------------------------------------------------------------ to segmentation


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world in VOC's layout, with saliency maps, and a checkpoint of a network that was not trained."""
    root = tmp_path_factory.mktemp("voc")
    for split, count in (("train", 6), ("val", 2), ("test", 2)):
        write_voc_tags(root, TagScenes(split, count))
    (root / "saliency").mkdir()
    for item in TagScenes("train", 6):
        salient = np.where(item["label"] > 0, 230, 10).astype(np.uint8)
        Image.fromarray(salient).save(root / "saliency" / f"{item['name']}.png")
    config = yaml.safe_load(Path(config_file("seenet_world")).read_text())
    config["model"]["init_args"]["network"] |= {"head_channels": 8, "backbone_options": {"widths": [8, 8]}}
    (root / "seenet.yaml").write_text(yaml.safe_dump(config))
    torch.manual_seed(0)
    torch.save({"state_dict": SeeNetRecipe(**config["model"]["init_args"]).state_dict()}, root / "seenet.ckpt")
    return root


def predict(voc: Path, out: Path, *words: str) -> int:
    given = ["--config", str(voc / "seenet.yaml"), "--ckpt_path", str(voc / "seenet.ckpt"), "--device", "cpu"]
    return main(["predict", *given, "--images", str(voc / "JPEGImages"), "--out", str(out), *words])


LIST = "ImageSets/Segmentation/train_cls.txt"


@pytest.mark.filterwarnings("ignore")
def test_attention_is_written_of_the_images_in_the_list(voc: Path, tmp_path: Path) -> None:
    assert predict(voc, tmp_path, "--tags", str(voc / LIST)) == 0
    tags = read_tags(voc / LIST, 5)
    assert {file.stem for file in (tmp_path / "maps").iterdir()} == set(tags)
    expected = {f"{name}_{kind}.png" for name, kinds in tags.items() for kind in kinds}
    assert {file.name for file in (tmp_path / "attention").iterdir()} == expected
    assert not (tmp_path / "seeds").exists()
    summary = json.loads((tmp_path / "attention.json").read_text())
    for file, shares in summary.items():
        assert list(shares) == [TAG_SCENE_LABELS.names[kind + 1] for kind in tags[Path(file).stem]]
    for name, kinds in tags.items():
        attention = read_attention(tmp_path / "maps" / f"{name}.npz", 5)
        for kind in kinds:
            with Image.open(tmp_path / "attention" / f"{name}_{kind}.png") as image:
                grey = torch.from_numpy(np.array(image)).float() / 255
            torch.testing.assert_close(grey, attention[kind], atol=5e-3, rtol=0)
        with Image.open(tmp_path / "overlays" / f"{name}.png") as picture:
            assert picture.width > 64 * (1 + len(kinds))


@pytest.mark.filterwarnings("ignore")
def test_without_a_list_all_images_have_the_classes_that_are_found(voc: Path, tmp_path: Path) -> None:
    assert predict(voc, tmp_path) == 0
    summary = json.loads((tmp_path / "attention.json").read_text())
    assert len(summary) == 10 and all(summary.values())


@pytest.mark.filterwarnings("ignore")
def test_images_of_the_list_that_are_not_there_are_named(
    voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("/JPEGImages/wardrobe_val_000000.png 0\nelsewhere 1\n")
    assert predict(voc, tmp_path / "out", "--tags", str(listed)) == 1
    printed = capsys.readouterr()
    assert f"skipped elsewhere: {listed} lists it" in printed.err and "1 images written" in printed.out
    assert (tmp_path / "out" / "attention" / "wardrobe_val_000000_0.png").is_file()
    one = str(voc / "JPEGImages" / "wardrobe_val_000000.png")
    assert predict(voc, tmp_path / "out", "--tags", str(listed), "--images", one) == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("orientation", [3, 5, 6, 8])
def test_seeds_lie_on_the_pixels_that_a_training_reads(voc: Path, tmp_path: Path, orientation: int) -> None:
    for name in ("straight", "turned"):
        (tmp_path / name / "JPEGImages").mkdir(parents=True)
        (tmp_path / name / "saliency").mkdir()
    item = TagScenes("val", 1)[0]
    stored = Image.fromarray(item["image"][:, :48].permute(1, 2, 0).numpy())
    salient = Image.fromarray(np.where(item["label"][:48] > 0, 230, 10).astype(np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored.save(tmp_path / "turned" / "JPEGImages" / "a.png", exif=exif)
    salient.save(tmp_path / "turned" / "saliency" / "a.png")
    how = {3: "ROTATE_180", 5: "TRANSPOSE", 6: "ROTATE_270", 8: "ROTATE_90"}[orientation]
    for picture, folder in ((stored, "JPEGImages"), (salient, "saliency")):
        picture.transpose(Image.Transpose[how]).save(tmp_path / "straight" / folder / "a.png")
    (tmp_path / "list.txt").write_text("a 0 1\n")
    found = {}
    for name in ("straight", "turned"):
        words = ["--tags", str(tmp_path / "list.txt"), "--seeds", "harmonic", "--saliency"]
        words += [str(tmp_path / name / "saliency"), "--images", str(tmp_path / name / "JPEGImages")]
        assert predict(voc, tmp_path / name, *words) == 0
        with Image.open(tmp_path / name / "seeds" / "a.png") as seeds:
            found[name] = np.array(seeds.copy() if name == "turned" else seeds.transpose(_BACK[how]))
    assert found["turned"].shape == (48, 64) and 0.05 < (found["turned"] > 0).mean() < 0.95
    assert (found["turned"] == found["straight"]).all()
    lists = tmp_path / "turned" / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\n")
    read = VOCSegmentation(tmp_path / "turned", "train", label_folder=tmp_path / "turned" / "seeds")[0]
    assert torch.equal(read["image"], item["image"][:, :48]) and read["label"].shape == (48, 64)
    assert read_attention(tmp_path / "turned" / "maps" / "a.npz", 5).shape == (5, 48, 64)


_BACK = {
    "ROTATE_180": Image.Transpose.ROTATE_180,
    "TRANSPOSE": Image.Transpose.TRANSPOSE,
    "ROTATE_270": Image.Transpose.ROTATE_90,
    "ROTATE_90": Image.Transpose.ROTATE_270,
}


@pytest.mark.filterwarnings("ignore")
def test_the_rule_of_seeds_can_be_changed(voc: Path, tmp_path: Path) -> None:
    def seeds(rule: str, *options: str) -> np.ndarray:
        words = ["--tags", str(voc / LIST), "--images", str(image), "--seeds", rule]
        words += ["--saliency", str(voc / "saliency")] if rule == "harmonic" else []
        assert predict(voc, tmp_path, *words, *(["--seed_options", *options] if options else [])) == 0
        with Image.open(tmp_path / "seeds" / f"{image.stem}.png") as found:
            return np.array(found)

    image = voc / "JPEGImages" / "wardrobe_train_000000.png"
    assert (seeds("confident", "least_share=0", "least=1", "attended=1", "salient=1") == 255).mean() < 0.2
    assert (seeds("confident", "least_share=1") == 255).all()
    assert (seeds("harmonic", "weight=0.1") != seeds("harmonic", "weight=20")).any()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_seeds_train_another_method(voc: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--tags", str(voc / LIST), "--seeds", "confident", "--saliency", str(voc / "saliency")]
    assert predict(voc, out, *words) == 0
    tags = read_tags(voc / LIST, 5)
    for item in TagScenes("train", 6):
        name = item["name"]
        attention = read_attention(out / "maps" / f"{name}.npz", 5)[None]
        saliency = torch.where(item["label"] > 0, 230, 10)[None] / 255
        expected = confident_labels(attention, item["tags"][None], saliency)[0]
        with Image.open(out / "seeds" / f"{name}.png") as image:
            seeds = torch.from_numpy(np.array(image)).long()
        assert (seeds == expected).float().mean() > 0.99  # maps are kept at half precision
        assert set(seeds.unique().tolist()) <= {0, 255, *(kind + 1 for kind in tags[name])}
    content = yaml.safe_load(Path(config_file("ccnet_voc")).read_text())
    content["model"]["init_args"]["network"] = {
        "backbone": "small",
        "output_stride": 4,
        "head_channels": 8,
        "num_classes": 6,
        "auxiliary": False,
    }
    content["data"]["init_args"] |= {
        "root": str(voc),
        "classes": "wardrobe_tags",
        "train_list": "train_cls",
        "label_folder": str(out / "seeds"),
        "batch_size": 3,
        "crop": 64,
        "workers": 0,
    }
    content["trainer"] = {"accelerator": "cpu", "devices": 1, "max_steps": 2, "enable_progress_bar": False}
    content["run_dir"] = str(tmp_path / "run")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    assert main(["fit", f"--config={file}"]) == 0
    data = SegmentationData(**content["data"]["init_args"])
    trained_on = data.open("train").read(0)["label"]
    with Image.open(out / "seeds" / "wardrobe_train_000000.png") as image:
        assert torch.equal(trained_on, torch.from_numpy(np.array(image)).long())
    assert set(data.open("val").read(0)["label"].unique().tolist()) <= {0, 255, 1, 2, 3, 4, 5}


@pytest.mark.filterwarnings("ignore")
def test_what_prediction_needs_is_named(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*words: str) -> str:
        assert predict(voc, tmp_path / "out", *words) == 2
        line = capsys.readouterr().err
        assert line.startswith("gingham: error: ") and line.count("\n") == 1
        return line

    assert "nowhere.txt: no such file" in error("--tags", "nowhere.txt")
    assert "--saliency nowhere: no such folder" in error("--seeds", "confident", "--saliency", "nowhere")
    assert "--saliency nowhere: needs --seeds" in error("--saliency", "nowhere")
    assert "--seed_options needs --seeds" in error("--seed_options", "sure=1")
    for rule, word, reason in (
        ("confident", "sure", "sure: expected NAME=NUMBER"),
        ("confident", "weight=1", "weight: confident has least, sure, attended, salient, least_share"),
        ("confident", "sure=2", "sure must be between 0 and 1, got 2.0"),
        ("harmonic", "sure=1", "sure: harmonic has weight"),
        ("harmonic", "weight=0", "weight must be above 0, got 0.0"),
    ):
        assert reason in error("--seeds", rule, "--seed_options", word)
    other = tmp_path / "other.txt"
    other.write_text("elsewhere 0\n")
    assert f"holds no image that is in {other}" in error("--tags", str(other))
    (tmp_path / "empty").mkdir()
    words = ["--tags", str(voc / LIST), "--seeds", "harmonic", "--saliency", str(tmp_path / "empty")]
    assert predict(voc, tmp_path / "out", *words) == 1
    assert "wardrobe_train_000000.png: no such file" in capsys.readouterr().err


def textures(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images of one class: a small bright mark on a large faint body, on texture that mostly hints at the class."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.5 * torch.randn(count, 3, 32, 32, generator=generator)
    tags, masks = torch.zeros(count, 2, dtype=torch.int64), torch.zeros(count, 32, 32, dtype=torch.int64)
    for index in range(count):
        kind = int(torch.randint(2, (), generator=generator))
        top, left = torch.randint(2, 14, (2,), generator=generator).tolist()
        if torch.rand((), generator=generator) < 0.9:
            images[index, kind] += 0.2
        images[index, kind, top : top + 16, left : left + 16] += 0.6
        images[index, kind, top : top + 5, left : left + 5] += 3.0
        masks[index, top : top + 16, left : left + 16] = kind + 1
        tags[index, kind] = 1
    return images, tags, masks


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_attention_covers_more_of_the_body_and_less_of_the_background() -> None:
    images, tags, _ = textures(64, seed=0)
    shown, asked, masks = textures(32, seed=1)
    covered, alone, leaked, leaked_plain = [], [], [], []
    for seed in range(3):
        for plain in (False, True):
            torch.manual_seed(seed)
            options = {"train_thresholds": (0.6, 0.0 if plain else 0.05)}
            options |= {"background_threshold": None if plain else 0.1}
            made = SeeNetRecipe(
                NETWORK | {"num_classes": 2, "head_convs": 1, "output_stride": 2} | options, attention_size=None
            )
            optimizer = torch.optim.AdamW(made.network.parameters(), lr=0.01)
            for step in range(80):
                batch = slice(16 * (step % 4), 16 * (step % 4) + 16)
                terms = branch_losses(made.network(images[batch], tags[batch]), tags[batch])
                loss = terms.attended if step < 20 else sum(terms)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            made.eval()
            strongest = made.attend(shown, asked).maps.amax(1)
            (leaked_plain if plain else leaked).append(float(strongest[masks == 0].mean()))
            if not plain:
                covered.append(float((strongest >= 0.5)[masks > 0].float().mean()))
                made.network.potential = None
                first = made.attend(shown, asked).maps.amax(1)
                alone.append(float((first >= 0.5)[masks > 0].float().mean()))
    assert sum(covered) > sum(alone) + 0.1
    assert sum(leaked) < sum(leaked_plain)
