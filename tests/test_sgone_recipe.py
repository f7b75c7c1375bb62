"""SG-One's recipe under Lightning's trainer: rates, shots, episodes of its data, continuing, and what it refuses."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

pytest.importorskip("lightning", reason="training needs the extra: pip install gingham[train]")
import lightning

from gingham.cli import main
from gingham.cli.training import Pictures, config_file
from gingham.data.episodes import Protocol, collate_episodes, read_episodes
from gingham.data.wardrobe import GarmentScenes, write_voc
from gingham.data.wardrobe.episode_scenes import GARMENT_CLASSES
from gingham.errors import DataError
from gingham.methods.sgone.data import EpisodeData
from gingham.methods.sgone.objective import combine_masks
from gingham.methods.sgone.recipe import SGOneRecipe
from trainings import trainer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

NETWORK: dict[str, Any] = {
    "backbone": "small",
    "output_stride": 4,
    "guidance_channels": 8,
    "side_channels": 8,
    "backbone_options": {"widths": [8, 8, 8, 8]},
}


def recipe(network: dict[str, Any] | None = None, **options: Any) -> SGOneRecipe:
    torch.manual_seed(0)
    return SGOneRecipe(NETWORK | (network or {}), **options)


def data(**options: Any) -> EpisodeData:
    given: dict[str, Any] = {
        "name": "wardrobe_garments",
        "images": "any",
        "protocol": Protocol(episodes=6, small_objects=True),
        "validation_episodes": 6,
        "episodes_per_epoch": 8,
        "batch_size": 4,
        "evaluation_batch_size": 3,
        "lengths": (12, 8, 8),
    }
    return EpisodeData(**given | options)


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images in VOC's layout: a square of one class each, three classes, its border 255, on another's strip."""
    root = tmp_path_factory.mktemp("voc")
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    names = [f"2007_{index:06d}" for index in range(12)]
    for index, name in enumerate(names):
        label = torch.zeros(100 + index, 110, dtype=torch.uint8)
        label[8:88, 8:102] = 255
        label[10:86, 10:100] = 1 + index % 3 if index < 9 else 6
        image = Image.fromarray((10 * label).numpy()).convert("RGB")
        image.save(root / "JPEGImages" / f"{name}.jpg")
        for folder in ("SegmentationClass", "SegmentationClassAug"):
            Image.fromarray(label.numpy()).save(root / folder / f"{name}.png")
    (root / "ImageSets/Segmentation/trainaug.txt").write_text("".join(f"{name}\n" for name in names))
    (root / "ImageSets/Segmentation/val.txt").write_text("".join(f"{name}\n" for name in names[:8]))
    return root


# ------------------------------------------------------------------------------------------------ training


def test_a_training_logs_its_scores_and_shows_episodes(tmp_path: Path) -> None:
    made = recipe(optimizer="adamw", learning_rate=0.01)
    run = trainer(tmp_path, max_epochs=1, callbacks=[Pictures(2)])
    run.fit(made, data())
    classes = {f"val_iou/{index:02d}" for index in GARMENT_CLASSES["val"]}
    assert set(run.callback_metrics) == {"loss", "val_miou", "val_fb_iou", "val_all_foreground"} | classes
    with Image.open(tmp_path / "predictions.png") as sheet:
        assert sheet.width > 5 * 128  # query, support, truth, prediction, similarity
    (tested,) = run.test(made, data(), verbose=False)
    assert {f"test_iou/{index:02d}" for index in GARMENT_CLASSES["test"]} <= set(tested)
    assert made.scores["test"].episodes.sum() == 6
    assert 0 < tested["test_all_foreground"] < 0.2
    (again,) = run.test(made, data(evaluation_batch_size=1), verbose=False)
    assert again == pytest.approx(tested, abs=1e-5)


def test_only_the_guidance_layer_learns_ten_times_as_fast() -> None:
    with torch.device("meta"):
        made = SGOneRecipe({})
    groups = {group["lr"]: group["params"] for group in made.parameter_groups()}
    assert sorted(groups) == pytest.approx([1e-5, 2e-5, 1e-4, 2e-4])
    assert [len(groups[rate]) for rate in sorted(groups)] == [18, 18, 1, 1]
    assert groups[max(groups)][0] is made.network.guidance_layer.bias
    assert groups[sorted(groups)[2]][0] is made.network.guidance_layer.weight
    assert sum(len(group) for group in groups.values()) == len(list(made.network.parameters()))


def test_the_optimiser_is_the_official_one(tmp_path: Path) -> None:
    made = recipe()
    run = trainer(tmp_path, max_steps=2, limit_val_batches=0)
    run.fit(made, data())
    (optimizer,) = run.optimizers
    assert isinstance(optimizer, torch.optim.SGD)
    assert {(group["momentum"], group["weight_decay"]) for group in optimizer.param_groups} == {(0.99, 5e-4)}
    assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx([1e-5, 2e-5, 1e-4, 2e-4])


def test_null_of_the_command_line_means_no_weights(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--config=sgone_voc", "--model.network.backbone_weights=null", "--print_config"]
    with pytest.raises(SystemExit):
        main(["fit", *given])
    assert "backbone_weights: null\n" in capsys.readouterr().out


def test_the_backbone_has_a_rate_of_its_own() -> None:
    made = recipe(bias_rate=1.0, guidance_rate=1.0, backbone_rate=0.5, learning_rate=0.2)
    slow, fast = made.parameter_groups()
    assert (slow["lr"], fast["lr"]) == pytest.approx((0.1, 0.2))
    assert len(slow["params"]) == len(list(made.network.backbone.parameters()))


def test_training_lowers_the_loss_and_repeats(tmp_path: Path) -> None:
    losses = []

    class Losses(lightning.Callback):
        def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
            losses[-1].append(float(trainer.callback_metrics["loss"]))

    for _ in range(2):
        losses.append([])
        made = recipe(optimizer="adamw", learning_rate=0.01)
        trainer(tmp_path, max_epochs=5, callbacks=[Losses()], limit_val_batches=0).fit(made, data())
    assert losses[0] == losses[1] and len(losses[0]) == 10
    assert losses[0][-1] < 0.8 * losses[0][0]


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    def made() -> SGOneRecipe:
        return recipe({"guidance_norm": True}, optimizer="adamw", learning_rate=0.01)

    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 2

    options: dict[str, Any] = {"max_epochs": 2, "limit_val_batches": 0}
    whole, first, second = made(), made(), made()
    trainer(tmp_path, **options).fit(whole, data(flip=0.5))
    run = trainer(tmp_path, callbacks=[Stop()], **options)
    run.fit(first, data(flip=0.5))
    assert run.global_step == 2
    run.save_checkpoint(tmp_path / "half.ckpt")
    again = data(flip=0.5)
    trainer(tmp_path, **options).fit(second, again, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for (name, one), other in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def tones(count: int, seed: int, colours: Tensor) -> Iterator[dict[str, Any]]:
    """Batches of episodes: two squares of different colours on noise, the object being that of the support's colour."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        pictures, labels = [], []
        kinds = torch.stack([torch.randperm(len(colours), generator=generator)[:3] for _ in range(16)])
        for other in (1, 2):  # the support, and the query with another second square
            image = 0.3 * torch.randn(16, 3, 24, 24, generator=generator)
            label = torch.zeros(16, 24, 24, dtype=torch.int64)
            for index in range(16):
                sides = torch.randperm(2, generator=generator).tolist()
                for place, kind in zip(sides, (kinds[index, 0], kinds[index, other]), strict=True):
                    top = int(torch.randint(13, (), generator=generator))
                    box = (slice(top, top + 11), slice(12 * place, 12 * place + 11))
                    image[index][:, *box] = colours[kind][:, None, None]
                    if kind == kinds[index, 0]:
                        label[index][box] = 1
            pictures.append(image)
            labels.append(label)
        yield {
            "image": pictures[1],
            "label": labels[1],
            "support": [pictures[0]],
            "support_mask": [(labels[0] == 1)[:, None]],
        }


@pytest.mark.slow
def test_novel_classes_are_found_by_their_support() -> None:
    colours = 1.5 * torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    scores = {}
    for guidance in ("masked", "none"):
        made = recipe({"guidance": guidance, "guidance_norm": True, "output_stride": 2})
        optimizer = torch.optim.AdamW(made.network.parameters(), lr=0.005)
        for batch in tones(60, 1, colours[:30]):
            output = made.network(batch["image"], batch["support"], batch["support_mask"])
            loss = torch.nn.functional.cross_entropy(
                torch.nn.functional.interpolate(output.logits, size=(24, 24), mode="bilinear"), batch["label"]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        made.eval()
        with torch.no_grad():
            (batch,) = tones(1, 2, colours[30:])
            seen, truth = made.predict_objects(batch), batch["label"] == 1
        scores[guidance] = ((seen & truth).sum() / (seen | truth).sum()).item()
        everything = truth.float().mean().item()
    assert scores["masked"] > everything + 0.1 and scores["masked"] > scores["none"] + 0.1, scores


# ------------------------------------------------------------------------------------------------ shots


def shots_batch(shots: int = 3) -> dict[str, Any]:
    protocol = Protocol(shots=shots, episodes=4, small_objects=True)
    return collate_episodes(list(data(protocol=protocol, lengths=(0, 0, 40)).dataset("test")))


def undecided(batch: dict[str, Any], combination: Any = "average") -> SGOneRecipe:
    """A recipe that was not trained, and calls about half of the pixels object."""
    made = recipe(combination=combination).eval()
    with torch.no_grad():
        logits = made.network(batch["image"], batch["support"], batch["support_mask"]).logits
        made.network.exit.bias[0] += (logits[:, 1] - logits[:, 0]).median()
    return made


def test_copies_of_a_shot_are_one_shot_however_they_are_combined() -> None:
    batch = shots_batch(1)
    copies = batch | {"support": batch["support"] * 2, "support_mask": batch["support_mask"] * 2}
    for combination in ("average", "union", "vote"):
        made = undecided(batch, combination)
        assert made.predict_objects(copies).equal(made.predict_objects(batch))
        assert 0.2 < made.predict_objects(batch).float().mean() < 0.8


def test_a_union_is_a_superset_of_its_shots_and_an_average_need_not_be() -> None:
    batch = shots_batch(3)
    union, average = undecided(batch, "union"), undecided(batch)
    singles = []
    for shot in range(3):
        one = batch | {name: batch[name][shot : shot + 1] for name in ("support", "support_mask")}
        singles.append(average.predict_objects(one))
    found = union.predict_objects(batch)
    assert found.equal(combine_masks(torch.stack(singles), "union"))
    vote = undecided(batch, "vote").predict_objects(batch)
    assert vote.equal(combine_masks(torch.stack(singles), "vote"))
    assert not average.predict_objects(batch).equal(found)


def test_supports_of_a_folder_are_encoded_once() -> None:
    made, batch = recipe().eval(), shots_batch(2)
    calls: list[int] = []
    made.network.guidance_layer.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        segment = made.with_support(batch["support"], batch["support_mask"])
        assert len(calls) == 2
        logits = [segment(batch["image"]), segment(batch["image"])]
    assert len(calls) == 4
    assert logits[0].shape == (4, 2, 64, 64) and logits[0].equal(logits[1])
    expected = made.network(batch["image"], batch["support"], batch["support_mask"]).logits
    assert (logits[0].argmax(1) == 1).equal(
        torch.nn.functional.interpolate(expected, size=(64, 64), mode="bilinear").argmax(1) == 1
    )


# ------------------------------------------------------------------------------------------------ data


def test_training_excludes_novel_classes_and_evaluated_images(voc: Path) -> None:
    made = EpisodeData(root=str(voc), fold=0, protocol=Protocol(episodes=3))
    assert made.classes_of("test") == (1, 2, 3, 4, 5) and made.classes_of("train") == tuple(range(6, 21))
    assert [file.name[-2:] for file in made.open("train").images] == ["08", "09", "10", "11"]
    train = made.dataset("train")
    assert train.images == {6: [1, 2, 3]}  # image 8 is of a novel class
    assert made.splits() == ("train", "val") and made.label_space().names == ("background", "object")
    episodes = made.episodes_of("test")
    assert [(x.fold, x.protocol, x.seed) for x in episodes] == [(0, "oslsm", 1385)] * 3
    assert all(int(x.query[-2:]) % 3 + 1 == x.class_index for x in episodes)
    with pytest.raises(DataError, match="the val split of voc: no class has the 2 images"):
        made.dataset("val")


def test_the_border_is_what_the_protocol_and_the_legacy_switch_say(voc: Path) -> None:
    def border(split: str, **options: Any) -> tuple[int, int]:
        made = EpisodeData(root=str(voc), fold=0, **options)
        torch.manual_seed(0)
        item = made.dataset(split)[0]
        return int((item["label"] == 255).sum()), int((item["label"] == 1).sum())

    inner, edge = 76 * 90, 80 * 94 - 76 * 90
    assert border("test", protocol=Protocol(episodes=1)) == (0, inner)
    assert border("test", protocol=Protocol("hsnet", episodes=1, size="original")) == (edge, inner)
    assert border("train") == (edge, inner)
    assert border("train", train_border="object") == (0, inner + edge)


def test_the_official_training_sees_red_and_blue_exchanged(voc: Path) -> None:
    items = []
    for legacy in (False, True):
        made = EpisodeData(root=str(voc), fold=0, legacy_bgr_train=legacy, protocol=Protocol(episodes=1))
        torch.manual_seed(0)
        items.append((made.dataset("train")[0]["image"], made.dataset("test")[0]["image"]))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    raw = items[0][0] * std + mean
    torch.testing.assert_close(items[1][0], (raw.flip(0) - mean) / std, atol=1e-4, rtol=0)
    assert items[0][1].equal(items[1][1])


def test_training_pictures_of_one_size_make_batches(voc: Path) -> None:
    options: dict[str, Any] = {"root": str(voc), "fold": 0, "batch_size": 4, "episodes_per_epoch": 8}
    (batch, _) = EpisodeData(**options, train_shots=2, train_size=(32, 48)).train_dataloader()
    assert batch["image"].shape == (4, 3, 32, 48) and [x.shape for x in batch["support"]] == [(4, 3, 32, 48)] * 2
    with pytest.raises(DataError, match=r"differ in size .*: resize them \(data.train_size"):
        list(EpisodeData(**options).train_dataloader())


def test_protocols_decide_size_and_runs(voc: Path) -> None:
    made = EpisodeData(root=str(voc), fold=0, protocol=Protocol("panet", episodes=2, runs=3, size=(32, 48)))
    found = list(made.dataset("test"))
    assert [item["run"] for item in found] == [0, 0, 1, 1, 2, 2]
    assert all(item["image"].shape == (3, 32, 48) and item["label"].shape == (32, 48) for item in found)
    assert made.describe("test").startswith("fold 0, novel classes aeroplane, bicycle, bird, boat, bottle; panet (cha")
    assert made.protocol_of("val").seeds == range(1234, 1235)


@pytest.mark.parametrize(
    ("shots", "few"), [(1, "boat has 0, bottle has 0"), (2, "bird has 2, boat has 0, bottle has 0")]
)
def test_novel_classes_with_too_few_images_are_named(voc: Path, shots: int, few: str) -> None:
    protocol = Protocol("hsnet", shots=shots, episodes=4)
    made = EpisodeData(root=str(voc), fold=0, protocol=protocol)
    with pytest.warns(UserWarning, match=f"needs {shots + 1} images of its class, and {few}"):
        made.dataset("test")


def test_episodes_of_a_file_and_items_of_a_list_are_evaluated(voc: Path, tmp_path: Path) -> None:
    drawn = EpisodeData(root=str(voc), fold=0, protocol=Protocol("hsnet", shots=2, episodes=4, size="original"))
    from gingham.data.episodes import write_episodes

    write_episodes(tmp_path / "pairs.jsonl", drawn.episodes_of("test"))
    read = EpisodeData(root=str(voc), fold=0, episodes=str(tmp_path / "pairs.jsonl"))
    assert [draw[:3] for draw in read._drawn("test")] == [draw[:3] for draw in drawn._drawn("test")]
    assert read.episodes_of("test") == drawn.episodes_of("test") and read.seeds_of("test") == [0]
    assert read.describe("test").endswith(
        f"; 2-shot: 4 episodes of {tmp_path / 'pairs.jsonl'}, drawn as hsnet; "
        "scored at original size, pixels 255 counted as background; images of val, labels of SegmentationClass"
    )
    (tmp_path / "items.txt").write_text("2007_000004__02\n2007_000001__02\n2007_000003__01\n2007_000000__01\n")
    listed = EpisodeData(
        root=str(voc), fold=0, items=str(tmp_path / "items.txt"), protocol=Protocol("hsnet", episodes=4)
    )
    assert [x.query[-1] for x in listed.episodes_of("test")] == ["4", "1", "3", "0"]
    assert f", items of {tmp_path / 'items.txt'}; scored" in listed.describe("test")
    for change, reason in (
        ({"query": "2007_000099"}, "episode 1 has '2007_000099', which is not in the list"),
        ({"class": 9}, "episode 1 is of class 9, novel are 1, 2, 3, 4, 5"),
        ({"class": 4}, "episode 1 is of class 4, which is not in its image '2007_00000"),
    ):
        first = json.loads((tmp_path / "pairs.jsonl").read_text().splitlines()[0])
        (tmp_path / "wrong.jsonl").write_text(json.dumps(first | change))
        with pytest.raises(DataError, match=reason):
            EpisodeData(root=str(voc), fold=0, episodes=str(tmp_path / "wrong.jsonl")).dataset("test")


@pytest.mark.parametrize(
    ("options", "stated"),
    [
        ({}, "; images of val, labels of SegmentationClass"),
        ({"lists": ("trainaug", "val", "trainaug")}, "; images of trainaug, labels of SegmentationClass"),
        ({"evaluation_labels": "SegmentationClassAug"}, "; images of val, labels of SegmentationClassAug"),
        ({"legacy_support_size": True}, ", supports at the size of the first; images of val,"),
        ({"items": "list.txt"}, ", items of list.txt; scored"),
    ],
    ids=str,
)
def test_a_report_states_the_images_and_whether_they_are_the_protocol_s(options: Any, stated: str) -> None:
    line = EpisodeData(fold=0, protocol=Protocol("oslsm"), **options).describe("test")
    assert stated in line and ("oslsm (changed)" in line) == bool(options)
    assert ("small objects" in line) == ("items" not in options)


def test_what_the_code_of_a_protocol_reads_is_no_change() -> None:
    for name, options in (
        ("hsnet", {"items": "list.txt", "evaluation_labels": "SegmentationClassAug"}),
        ("panet", {"lists": ("trainaug", "val", "trainaug"), "evaluation_labels": "SegmentationClassAug"}),
    ):
        given: Any = options
        assert "(changed)" not in EpisodeData(fold=0, protocol=Protocol(name), **given).describe("test")  # type: ignore[arg-type]


def test_files_that_are_wrong_are_listed_before_training(
    voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "voc"
    shutil.copytree(voc, root)
    Image.new("L", (110, 108), 99).save(root / "SegmentationClassAug" / "2007_000008.png")
    (root / "SegmentationClass" / "2007_000002.png").unlink()
    given = ["--config=sgone_voc", f"--data.root={root}", "--trainer.accelerator=cpu", f"--run_dir={tmp_path / 'run'}"]
    assert main(["check-data", *given]) == 1
    listed = capsys.readouterr().out
    assert f"train: {root}/SegmentationClassAug/2007_000008.png: label value 99 outside the label space" in listed
    assert f"val: {root}/JPEGImages/2007_000002.jpg: no label file" in listed
    assert "train: 4 images, 1 problem\n" in listed and "val: 8 images, 1 problem\n" in listed


def test_own_classes_in_the_layout_of_voc(voc: Path) -> None:
    names = ("background", "a", "b", "c", "d", "e", "f")
    made = EpisodeData(root=str(voc), classes=names, novel=("c", "a"), protocol=Protocol(episodes=2))
    assert made.classes_of("test") == (1, 3) and made.classes_of("train") == (2, 4, 5, 6)
    assert {x.class_index for x in made.episodes_of("test")} <= {1, 3}
    assert made.episodes_of("test")[0].fold is None


@pytest.mark.parametrize(
    "options",
    [
        {"name": "coco"},
        {"fold": None},
        {"fold": 4},
        {"novel": ("cat",)},
        {"classes": "moon"},
        {"fold": 0, "classes": "wardrobe_garments"},
        {"novel": ("x",), "classes": ("background", "a", "b")},
        {"novel": ("a", "b"), "classes": ("background", "a", "b")},
        {"fold": 0, "name": "wardrobe_garments"},
        {"images": "some", "fold": 0},
        {"train_border": "some", "fold": 0},
        {"validation_episodes": 0, "fold": 0},
        {"train_shots": 0, "fold": 0},
        {"episodes_per_epoch": 0, "fold": 0},
        {"episodes": "a", "items": "b", "fold": 0},
        {"flip": 1.5, "fold": 0},
        {"batch_size": 0, "fold": 0},
        {"root": "a", "name": "wardrobe_garments"},
        {"lists": ("a", "b", "c"), "name": "wardrobe_garments"},
        {"train_labels": "a", "name": "wardrobe_garments"},
        {"evaluation_labels": "a", "name": "wardrobe_garments"},
        {"protocol": Protocol(runs=2), "episodes": "a", "fold": 0},
        {"protocol": Protocol(episodes=2), "episodes": "a", "fold": 0},
    ],
    ids=str,
)
def test_data_that_cannot_be_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        EpisodeData(**options)


@pytest.mark.parametrize(
    "options",
    [{"combination": "mean"}, {"bias_rate": -1.0}, {"guidance_rate": -1.0}, {"backbone_rate": -1.0}, {"momentum": 1.0}],
    ids=str,
)
def test_recipes_that_cannot_be_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must be"):
        recipe(**options)


def test_other_data_than_episodes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="SG-One is trained on episodes: take"):
        trainer(tmp_path, max_epochs=1).fit(recipe(), torch.utils.data.DataLoader([{}]))


@pytest.mark.parametrize("name", ["sgone_world", "sgone_voc"])
def test_packaged_configurations_are_of_this_recipe(name: str) -> None:
    from gingham.cli.options import instantiate

    content = yaml.safe_load(Path(config_file(name)).read_text())
    content["model"]["init_args"]["network"] |= {"backbone_weights": None}
    parts = instantiate(content, source=name)
    assert isinstance(parts.model, SGOneRecipe) and isinstance(parts.data, EpisodeData)
    if name == "sgone_voc":
        assert sum(p.numel() for p in parts.model.network.parameters()) == 18_992_194
        assert not parts.data.protocol.changed and parts.data.protocol.name == "oslsm"


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, with the checkpoint of a recipe that was not trained, and its configuration."""
    folder = tmp_path_factory.mktemp("run")
    content = yaml.safe_load(Path(config_file("sgone_world")).read_text())
    content["model"]["init_args"] |= {"network": NETWORK}
    content["data"]["init_args"] |= {"lengths": [4, 4, 12], "protocol": {"name": "oslsm", "episodes": 7}}
    content["data"]["init_args"]["protocol"]["small_objects"] = True
    content["run_dir"] = str(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    (folder / "checkpoints").mkdir()
    made = recipe()
    checkpoint = {"state_dict": made.state_dict(), "global_step": 0, "pytorch-lightning_version": "2.6.4", "epoch": 0}
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    return folder


def test_a_report_states_its_protocol_and_keeps_its_episodes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", f"--config={run / 'config.yaml'}", "--ckpt_path=last"]) == 0
    report = json.loads((run / "test.json").read_text())
    stated = "novel classes 50 classes, garment 205 to garment 254; oslsm (changed), 1-shot: 7 episodes, seed 1385, "
    assert report["protocol"].startswith(stated) and report["protocol"] in capsys.readouterr().out
    assert torch.tensor(report["counts"]).shape == (1, 50, 4)
    episodes = read_episodes(run / "test_episodes.jsonl")
    assert len(episodes) == 7 and all(x.query.startswith("wardrobe_test_") for x in episodes)
    table = (run / "test_classes.csv").read_text().splitlines()
    assert table[0] == "class,IoU,episodes" and table[-2].startswith("mean,") and table[-2].endswith(",7")
    assert table[-1].startswith("foreground and background,")


def words(run: Path, out: Path, *more: str) -> list[str]:
    images = out.parent / "images"
    images.mkdir(exist_ok=True)
    for index, size in enumerate(((70, 50), (40, 60))):
        Image.effect_noise(size, 80).convert("RGB").save(images / f"{index}.png")
    given = ["--config", str(run / "config.yaml"), "--ckpt_path", "last", "--images", str(images), "--out", str(out)]
    return ["predict", *given, "--device", "cpu", *more]


def test_predictions_are_of_what_the_supports_show(run: Path, tmp_path: Path) -> None:
    support, masks = tmp_path / "support", tmp_path / "masks"
    support.mkdir()
    masks.mkdir()
    for name, size in (("a", (64, 48)), ("b", (30, 40))):
        Image.effect_noise(size, 80).convert("RGB").save(support / f"{name}.jpg")
        mask = Image.new("L", size)
        mask.paste(255, (5, 5, 25, 20))
        mask.save(masks / f"{name}.png")
    more = ("--support", str(support), "--support_masks", str(masks))
    assert main(words(run, tmp_path / "out", *more)) == 0
    assert sorted(json.loads((tmp_path / "out" / "shares.json").read_text())) == ["0.png", "1.png"]
    with Image.open(tmp_path / "out" / "masks" / "1.png.png") as mask:
        assert mask.size == (40, 60) and set(mask.getdata()) <= {0, 1}
    one = ("--support", str(support / "a.jpg"), "--support_masks", str(masks / "a.png"), "--support_value", "255")
    assert main(words(run, tmp_path / "one", *one)) == 0


def test_supports_that_cannot_be_used_are_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    Image.new("L", (30, 20)).save(tmp_path / "empty.png")
    Image.new("L", (20, 30), 1).save(tmp_path / "turned.png")
    (tmp_path / "folder").mkdir()
    for name in ("x", "y"):
        Image.new("RGB", (30, 20)).save(tmp_path / "folder" / f"{name}.png")
    Image.new("L", (30, 20), 1).save(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("no image")
    image = str(tmp_path / "a.png")
    for more, reason in (
        ((), "give --support and --support_masks"),
        (("--support", image), "--support and --support_masks go together"),
        (("--support", str(tmp_path / "no.png"), "--support_masks", image), "no such image or folder"),
        (("--support", image, "--support_masks", str(tmp_path / "no.png")), "no such file, expected the mask"),
        (("--support", image, "--support_masks", str(tmp_path / "empty.png")), "no pixel but 0"),
        (("--support", image, "--support_masks", str(tmp_path / "turned.png")), "the mask is 20x30 pixels"),
        (("--support", image, "--support_masks", str(tmp_path / "good.png"), "--support_value", "7"), "of value 7"),
        (
            ("--support", str(tmp_path / "folder"), "--support_masks", str(tmp_path / "good.png")),
            "one mask for 2 images",
        ),
        (("--support", str(tmp_path / "folder"), "--support_masks", str(tmp_path / "folder")), "a folder of their own"),
        (("--support", image, "--support_masks", str(tmp_path / "text.png")), "text.png: cannot be read, truncated or"),
    ):
        assert main(words(run, tmp_path / "out", *more)) == 2
        line = capsys.readouterr().err
        assert reason in line and line.startswith("gingham: error: ") and line.count("\n") == 1


def test_the_border_of_a_mask_is_left_out_where_there_are_other_values(tmp_path: Path) -> None:
    from gingham.cli.support import read_support

    Image.new("RGB", (3, 1)).save(tmp_path / "a.png")
    for values, value, expected in (
        ((0, 255, 255), None, [False, True, True]),
        ((0, 5, 255), None, [False, True, False]),
        ((3, 5, 255), None, [True, True, False]),
        ((3, 5, 255), 3, [True, False, False]),
    ):
        mask = Image.frombytes("P", (3, 1), bytes(values))
        mask.putpalette(list(range(256)) * 3)
        mask.save(tmp_path / "mask.png")
        (found,) = read_support(tmp_path / "a.png", tmp_path / "mask.png", value)
        assert found.mask.tolist() == [expected]


def test_of_a_soft_mask_the_inside_is_the_object(tmp_path: Path) -> None:
    from gingham.cli.support import read_support

    disc = Image.new("L", (80, 60))
    ImageDraw.Draw(disc).ellipse((15, 8, 64, 51), fill=255)
    truth = torch.from_numpy(np.array(disc)) > 0
    disc.save(tmp_path / "disc.jpg", quality=75)
    with Image.open(tmp_path / "disc.jpg") as lossy:
        soft = {"jpeg": lossy.copy(), "blurred": disc.filter(ImageFilter.GaussianBlur(1))}
    Image.new("RGB", disc.size).save(tmp_path / "a.png")
    for mask in soft.values():
        mask.save(tmp_path / "mask.png")
        (found,) = read_support(tmp_path / "a.png", tmp_path / "mask.png")
        assert (found.mask == truth).float().mean() > 0.98 and found.mask[30, 40]


def test_a_grey_mask_that_leaves_open_what_255_is_has_to_be_explained(tmp_path: Path) -> None:
    from gingham.cli.support import read_support

    Image.new("RGB", (3, 1)).save(tmp_path / "a.png")
    Image.frombytes("L", (3, 1), bytes((0, 15, 255))).save(tmp_path / "mask.png")
    with pytest.raises(DataError, match="the values 15 and 255: say with --support_value which is the object"):
        read_support(tmp_path / "a.png", tmp_path / "mask.png")
    (found,) = read_support(tmp_path / "a.png", tmp_path / "mask.png", 15)
    assert found.mask.tolist() == [[False, True, False]]


def test_training_from_files_gives_the_numbers_of_training_from_memory(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        write_voc(tmp_path, GarmentScenes(split, 6))
    from_memory = data(lengths=(6, 6, 6))
    on_disk = data(
        name="voc",
        classes="wardrobe_garments",
        root=str(tmp_path),
        lists=("train", "val", "test"),
        train_labels="SegmentationClass",
    )
    for split in ("val", "test"):
        assert on_disk.episodes_of(split) == from_memory.episodes_of(split)
    results = []
    for source in (from_memory, on_disk):
        made = recipe(optimizer="adamw", learning_rate=0.01)
        run = trainer(tmp_path, max_epochs=1)
        run.fit(made, source)
        logged = dict(run.callback_metrics)
        results.append((logged, run.test(made, source, verbose=False), list(made.network.parameters())))
    (logged, tested, weights), (logged_again, tested_again, weights_again) = results
    assert logged == logged_again and tested == tested_again and tested[0]["test_fb_iou"] > 0
    assert all(one.equal(other) for one, other in zip(weights, weights_again, strict=True))
