"""What the recipes of re-identification share under Lightning's trainer: batches, features, scores, continuing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

pytest.importorskip("lightning", reason="training needs the extra: pip install gingham[train]")
import lightning

from gingham.cli import main
from gingham.data.wardrobe import write_market1501, write_mars
from gingham.errors import DataError
from gingham.methods.reid_data import PersonData, TrackletData, collate_sightings
from gingham.methods.reid_recipe import ReidRecipe
from gingham.metrics.retrieval import rank
from gingham.nn.triplet_loss import triplet_loss
from trainings import trainer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


class Colours(nn.Module):
    """Features of the mean colours of four bands, mirror images told apart."""

    def __init__(self, dimension: int = 8, backbone_weights: str | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 4 * 2, dimension)
        self.dropout = nn.Dropout(0.1)

    def forward(self, pixels: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(pixels.flatten(0, -4), (4, 2)).flatten(1)
        found: Tensor = self.linear(self.dropout(pooled))
        return found if pixels.dim() == 4 else found.reshape(*pixels.shape[:2], -1).mean(dim=1)


class ColourRecipe(ReidRecipe):
    """Learns `Colours` by triplets."""

    def __init__(self, network: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__(Colours, network or {}, optimizer="adam", learning_rate=0.01, **options)

    def pretrained_parts(self, network: Any) -> list[nn.Module]:
        return []

    def embed(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.network(pixels)
        return found

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        pixels = batch["image"] if "image" in batch else batch["frames"]
        loss = triplet_loss(self.embed(pixels), batch["person"], margin="soft")
        self.log("loss", loss, batch_size=len(pixels))
        return loss


def recipe(**options: Any) -> ColourRecipe:
    torch.manual_seed(0)
    return ColourRecipe(**options)


def persons(**options: Any) -> PersonData:
    given: dict[str, Any] = {"persons_per_batch": 4, "items_per_person": 2, "size": (64, 32), "lengths": (9, 5, 6)}
    return PersonData(**given | options)


def tracklets(**options: Any) -> TrackletData:
    given: dict[str, Any] = {
        "persons_per_batch": 3,
        "items_per_person": 2,
        "size": (64, 32),
        "lengths": (6, 3, 4),
        "frames": 2,
        "tracklet_frames": 5,
    }
    return TrackletData(**given | options)


# ------------------------------------------------------------------------------------------------ batches


def test_training_batches_are_of_persons_and_know_their_places() -> None:
    data = persons()
    (batch, *others) = list(data.train_dataloader())
    assert len(others) == 1 and data.num_persons == 9
    assert batch["image"].shape == (8, 3, 64, 32) and batch["image"].dtype == torch.float32
    groups = batch["person"].reshape(4, 2)
    assert (groups[:, 0] == groups[:, 1]).all() and len(set(groups[:, 0].tolist())) == 4
    train = data.opened("train")
    assert batch["person"].tolist() == train.persons[batch["index"]].tolist()
    assert batch["camera"].tolist() == train.cameras[batch["index"]].tolist()
    clips = next(iter(tracklets().train_dataloader()))
    assert clips["frames"].shape == (6, 2, 3, 64, 32) and clips["occluded"].shape == (6, 2, 64, 32)


def test_an_epoch_can_be_of_all_items() -> None:
    assert len(persons(epoch="items").train_dataloader()) == 9 * 4 // 4
    assert len(persons().train_dataloader()) == 2


def test_evaluation_gives_queries_and_then_the_gallery_once_each() -> None:
    data = persons(evaluation_batch_size=7)
    batches = list(data.val_dataloader())
    query = torch.cat([batch["query"] for batch in batches])
    assert query.tolist() == [True] * 10 + [False] * 30
    assert [len(batch["image"]) for batch in batches] == [7] * 5 + [5]
    names = [name for batch in batches for name in batch["name"]]
    assert names == [*data.opened("val_query").names, *data.opened("val_gallery").names]
    data = tracklets(evaluation_batch_size=2)
    batch = next(iter(data.test_dataloader()))
    assert [tuple(x.shape) for x in batch["clips"]] == [(3, 2, 3, 64, 32)] * 2
    assert [tuple(x.shape) for x in batch["occluded"]] == [(3, 2, 64, 32)] * 2
    whole = next(iter(tracklets(test_sample="all").test_dataloader()))
    assert whole["clips"][0].shape == (1, 5, 3, 64, 32)


def test_too_few_persons_for_a_batch_are_named() -> None:
    with pytest.raises(DataError, match="the train split has 9 persons, but a batch of all processes needs 10"):
        persons(persons_per_batch=10).train_dataloader()
    data = persons(lengths=(9, 1, 1))
    data.process = lambda: (0, 9)  # type: ignore[method-assign]
    with pytest.raises(DataError, match="the val split has 8 items, fewer than the 9 processes need"):
        data.val_dataloader()
    with pytest.raises(DataError, match=r"data\.root is not set: give the folder of market1501"):
        persons(name="market1501").dataset("train")


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (persons, {"name": "wardrobe_tracklets"}),
        (tracklets, {"name": "market1501"}),
        (persons, {"persons_per_batch": 0}),
        (persons, {"items_per_person": 0}),
        (persons, {"epoch": "all"}),
        (persons, {"size": (0, 32)}),
        (persons, {"flip": 1.5}),
        (persons, {"erasing": -1.0}),
        (persons, {"validation_persons": -1}),
        (persons, {"validation_persons": 3}),
        (persons, {"lengths": (4, -1, 4)}),
        (persons, {"lengths": (4, 4)}),
        (persons, {"domain": "moon"}),
        (persons, {"images": 1}),
        (persons, {"evaluation_batch_size": 0}),
        (tracklets, {"protocol": "matlab"}),
        (tracklets, {"frames": 0}),
        (tracklets, {"test_sample": "some"}),
        (tracklets, {"tracklets": 1}),
        (tracklets, {"occlusion": 2.0}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
def test_data_that_cannot_be_is_named(make: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        make(**options)


# ------------------------------------------------------------------------------------------------ features


def test_features_of_a_tracklet_are_the_mean_over_its_clips() -> None:
    made = recipe(clips_at_once=2).eval()
    generator = torch.Generator().manual_seed(0)
    clips = [torch.randn(n, 2, 3, 8, 4, generator=generator) for n in (3, 1, 4)]
    found = made.features({"clips": clips})
    expected = torch.stack([made.embed(each).mean(dim=0) for each in clips])
    torch.testing.assert_close(found, expected)
    assert found.shape == (3, 8) and not torch.allclose(found[0], found[1])
    of_all_lengths = [clips[0][:1], torch.randn(1, 7, 3, 8, 4, generator=generator)]
    assert made.features({"clips": of_all_lengths}).shape == (2, 8)


def test_mirror_images_are_added_and_lengths_are_one_where_asked_for() -> None:
    image = torch.randn(3, 3, 8, 4, generator=torch.Generator().manual_seed(0))
    plain, mirrored, unit = (
        recipe(**options).eval() for options in ({}, {"flip_test": True}, {"flip_test": True, "normalize": True})
    )
    both = plain.embed(image) + plain.embed(image.flip(-1))
    assert torch.equal(plain.features({"image": image}), plain.embed(image))
    torch.testing.assert_close(mirrored.features({"image": image}), both)
    torch.testing.assert_close(unit.features({"image": image}), nn.functional.normalize(both))
    assert not torch.allclose(both, 2 * plain.embed(image))


# ------------------------------------------------------------------------------------------------ training


def test_scores_of_an_evaluation_are_those_of_its_features(tmp_path: Path) -> None:
    made, data = recipe(rerank={"k1": 4, "k2": 2}, metric="cosine"), persons(evaluation_batch_size=7)
    run = trainer(tmp_path, max_epochs=1, num_sanity_val_steps=2)
    run.fit(made, data)
    ranks = {f"rank{r}" for r in (1, 5, 10, 20)} | {"map", "minp"}
    assert set(run.callback_metrics) == {
        "loss",
        "val_queries",
        *(f"val_{name}" for name in ranks),
        *(f"val_reranked_{name}" for name in ranks),
    }
    (tested,) = run.test(made, data, verbose=False)
    made.eval()
    with torch.no_grad():
        batch = collate_sightings(list(map(data.dataset("test").__getitem__, range(len(data.dataset("test"))))))
        features = nn.functional.normalize(made.features(batch))
    query = batch["query"]
    expected = rank(
        torch.cdist(features[query], features[~query]),
        batch["person"][query],
        batch["camera"][query],
        batch["person"][~query],
        batch["camera"][~query],
    )
    assert tested["test_map"] == pytest.approx(expected.mean_ap.item(), abs=1e-5)
    assert tested["test_rank1"] == pytest.approx(expected.cmc[0].item())
    assert tested["test_queries"] == 12 and made.scores["test"].skipped == 0
    assert 0 < tested["test_rank1"] <= tested["test_rank5"] <= tested["test_rank10"]
    assert data.describe("test") == "wardrobe_persons: 12 queries of 6 persons, 36 in the gallery"
    assert made.scores["test"].galleries is not None


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    class Save(lightning.Callback):
        def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "third.ckpt")

    options: dict[str, Any] = {"max_epochs": 2, "limit_val_batches": 0}
    for make in (persons, tracklets):
        varied: dict[str, Any] = {"crop": True, "erasing": 0.5, "epoch": "items"}
        whole, again = recipe(), recipe()
        trainer(tmp_path, callbacks=[Save()], **options).fit(whole, make(**varied))
        run = trainer(tmp_path, **options)
        run.fit(again, make(**varied), ckpt_path=tmp_path / "third.ckpt", weights_only=True)
        assert run.global_step == 2 * len(make(**varied).train_dataloader())
        for (name, one), other in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
            assert torch.equal(one, other), name
        assert not torch.equal(whole.network.linear.weight, recipe().network.linear.weight)


def test_training_raises_the_scores(tmp_path: Path) -> None:
    data, made = persons(lengths=(24, 5, 20), persons_per_batch=8, items_per_person=4, flip=0.0), recipe()
    run = trainer(tmp_path, max_epochs=12, limit_val_batches=0)
    (before,) = run.test(made, data, verbose=False)
    run.fit(made, data)
    (after,) = run.test(made, data, verbose=False)
    assert after["test_map"] > before["test_map"] + 0.2


def test_recipes_that_cannot_be_are_named() -> None:
    for options in ({"clips_at_once": 0}, {"metric": "dot"}, {"ap": "some"}, {"rerank": {"k": 2}}):
        with pytest.raises(ValueError, match=next(iter(options))):
            recipe(**options)


# ------------------------------------------------------------------------------------------------ files, processes


@pytest.mark.parametrize("kind", ["market1501", "mars"])
def test_training_from_files_gives_the_numbers_of_training_from_memory(kind: str, tmp_path: Path) -> None:
    make = persons if kind == "market1501" else tracklets
    memory = make()
    splits = [memory.opened(split) for split in memory.splits()]
    if kind == "market1501":
        for split in splits:
            write_market1501(tmp_path, split)
    else:
        write_mars(tmp_path, splits)
    held = memory.lengths["val"]
    files = make(name=kind, root=str(tmp_path), validation_persons=held, complete=False)
    found = []
    for data in (memory, files):
        made, run = recipe(), trainer(tmp_path, max_epochs=2)
        torch.manual_seed(1)
        run.fit(made, data)
        logged = {name: float(value) for name, value in run.callback_metrics.items()}
        (tested,) = run.test(made, data, verbose=False)
        found.append((logged, tested, made.network.linear.weight.detach()))
    assert found[0][:2] == found[1][:2] and torch.equal(found[0][2], found[1][2])
    assert found[0][1]["test_map"] > 0


def test_the_official_protocol_of_mars_has_the_queries_in_the_gallery(tmp_path: Path) -> None:
    memory = tracklets()
    write_mars(tmp_path, [memory.opened(split) for split in ("train", "query", "gallery")])
    scores = {}
    for protocol, gallery in (("torchreid", 8), ("official", 16)):
        data = tracklets(name="mars", root=str(tmp_path), complete=False, protocol=protocol)
        assert data.splits() == ("train", "query", "gallery")
        assert data.describe("val") == data.describe("test")  # nobody is held back
        assert data.describe("test") == (
            f"mars: 8 queries of 4 persons, {gallery} in the gallery, protocol {protocol}; clips dense of 2 frames"
        )
        made = recipe()
        (tested,) = trainer(tmp_path).test(made, data, verbose=False)
        assert tested["test_queries"] == 8
        scores[protocol] = made.scores["test"]
    assert len(scores["torchreid"].cmc) == 8 and len(scores["official"].cmc) == 16
    assert not torch.equal(scores["torchreid"].average_precisions, scores["official"].average_precisions)


def configuration(folder: Path, **data: Any) -> Path:
    """A configuration of a short training on the world."""
    given: dict[str, Any] = {"persons_per_batch": 4, "items_per_person": 2, "size": [64, 32], "lengths": [9, 5, 7]}
    content = {
        "model": {"class_path": "test_reid_recipe.ColourRecipe", "init_args": {"network": {"dimension": 8}}},
        "data": {"class_path": "gingham.methods.reid_data.PersonData", "init_args": given | data},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "run_dir": str(folder / "run"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was trained, with its configuration beside it."""
    folder = tmp_path_factory.mktemp("reid")
    file = configuration(folder)
    assert main(["fit", f"--config={file}"]) == 0
    return folder / "run"


def test_a_run_leaves_pictures_of_galleries_and_is_judged_by_its_mean_average_precision(run_dir: Path) -> None:
    with Image.open(run_dir / "tensorboard" / "predictions.png") as sheet:
        assert sheet.width > 11 * 64 and sheet.height > 8 * 128
    assert (run_dir / "checkpoints" / "best.ckpt").is_file()
    assert "val_map" in (run_dir / "csv" / "metrics.csv").read_text().splitlines()[0]


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_dir.parent / "config.yaml"
    words = ["test", f"--config={config}", "--ckpt_path=last", "--model.rerank={k1: 6, k2: 3, lambda_value: 0.3}"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "wardrobe_persons: 14 queries of 7 persons, 42 in the gallery; euclidean distance" in printed
    assert "14 queries scored, 0 skipped" in printed and "\nre-ranked: mAP" in printed
    alone = json.loads((run_dir / "test.json").read_text())
    assert len(alone["cmc"]) == 42 and alone["cmc"][-1] == 1 and alone["skipped"] == 0
    (run_dir / "test.json").unlink()
    command = [sys.executable, "-m", "gingham.cli", *words, "--trainer.devices=2", "--trainer.strategy=ddp"]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((run_dir / "test.json").read_text()) == alone


def sightings(folder: Path, names: tuple[str, ...] = ("b", "a")) -> Path:
    folder.mkdir()
    for index, name in enumerate(names):
        Image.effect_noise((30 + index, 60), 80).convert("RGB").save(folder / f"{name}.png")
    return folder


def test_galleries_are_predicted(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    query, gallery = sightings(tmp_path / "query"), sightings(tmp_path / "gallery", tuple("zyxwvutsrqponm"))
    (gallery / "torn.jpg").write_bytes(b"x")
    (query / "copy.png").write_bytes((gallery / "r.png").read_bytes())
    given = [
        "predict",
        f"--config={run_dir.parent / 'config.yaml'}",
        "--ckpt_path=last",
        f"--images={query}",
        f"--out={tmp_path / 'out'}",
        "--device=cpu",
    ]
    assert main([*given, f"--gallery={gallery}"]) == 1
    assert f"gingham: left out {gallery / 'torn.jpg'}" in (said := capsys.readouterr()).err
    assert f"3 images written to {tmp_path / 'out'}, 1 skipped" in said.out
    (gallery / "torn.jpg").unlink()
    assert main([*given, f"--gallery={gallery}"]) == 0
    capsys.readouterr()
    found = json.loads((tmp_path / "out" / "galleries.json").read_text())
    assert sorted(found) == ["a.png", "b.png", "copy.png"] and all(len(rows) == 10 for rows in found.values())
    assert found["copy.png"][0] == {"name": "r.png", "distance": 0.0}
    distances = [row["distance"] for row in found["a.png"]]
    assert distances == sorted(distances) and distances[0] > 0
    with Image.open(tmp_path / "out" / "galleries" / "a.png.png") as sheet:
        assert sheet.width > 10 * 64
    for more, reason in (
        ([], "give --gallery"),
        ([f"--gallery={tmp_path / 'nowhere'}"], "no such image or folder"),
        ([f"--gallery={tmp_path}"], "this configuration retrieves images"),
    ):
        assert main([*given, *more]) == 2
        assert reason in capsys.readouterr().err


def test_galleries_of_tracklets_are_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gingham.cli.galleries import GalleryWriter

    for side, names in (("query", "ab"), ("gallery", "cdefg")):
        (tmp_path / side).mkdir()
        for index, name in enumerate(names):
            sightings(tmp_path / side / name, ("1", "2", "3")[: index + 1])
    (tmp_path / "galleries").mkdir()
    made = recipe().eval()
    writer = GalleryWriter(made, tracklets(), tmp_path, tmp_path / "gallery")
    rows = writer.write("b", writer.read(tmp_path / "query" / "b"))
    assert sorted(row["name"] for row in rows) == list("cdefg") and (tmp_path / "galleries" / "b.png").is_file()
    (tmp_path / "gallery" / "h").mkdir()
    (tmp_path / "gallery" / ".thumbnails").mkdir()
    assert GalleryWriter(made, tracklets(), tmp_path, tmp_path / "gallery").left_out == 1
    left_out = f"gingham: left out {tmp_path / 'gallery' / 'h'}: --gallery {tmp_path / 'gallery' / 'h'}: no image in it"
    assert left_out in capsys.readouterr().err
    made.network.linear.bias.data[0] = torch.nan
    with pytest.raises(DataError, match="its features are NaN or infinite"):
        writer.write("b", writer.read(tmp_path / "query" / "b"))


def test_a_gallery_of_large_pictures_is_kept_as_small_as_it_is_shown(tmp_path: Path) -> None:
    from gingham.cli.galleries import GalleryWriter, Shown, draw_galleries

    (tmp_path / "gallery").mkdir()
    (tmp_path / "galleries").mkdir()
    Image.effect_noise((300, 500), 80).convert("RGB").save(tmp_path / "gallery" / "a.png")
    writer = GalleryWriter(recipe().eval(), persons(), tmp_path, tmp_path / "gallery")
    (large,) = writer.read(tmp_path / "gallery" / "a.png")
    assert writer.images[0].shape == (3, 128, 77)
    kept, whole = (draw_galleries([(Shown(image), [])]).tobytes() for image in (writer.images[0], large))
    assert kept == whole


def test_files_that_are_wrong_are_listed_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory = persons()
    for split in memory.splits():
        write_market1501(tmp_path, memory.opened(split))
    torn = tmp_path / "bounding_box_train" / f"{memory.opened('train').names[3]}.png"
    torn.write_bytes(torn.read_bytes()[:90])
    file = configuration(tmp_path, name="market1501", root=str(tmp_path), complete=False, validation_persons=5)
    assert main(["check-data", f"--config={file}"]) == 1
    listed = capsys.readouterr().out
    assert f"train: {torn}: cannot be read" in listed and "train: 72 images, 1 problem\n" in listed
    assert "val_query: 10 images, nothing wrong" in listed and "gallery: 36 images, nothing wrong" in listed
    assert main(["fit", f"--config={file}"]) == 2
    assert "1 problem in" in capsys.readouterr().err


def test_no_state_is_chosen_by_the_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory = persons()
    for split in memory.splits():
        write_market1501(tmp_path, memory.opened(split))
    file = configuration(tmp_path, name="market1501", root=str(tmp_path), complete=False)
    assert main(["fit", f"--config={file}", "--trainer.max_steps=1"]) == 0
    assert "nobody is held back" in capsys.readouterr().out
    assert [each.name for each in (tmp_path / "run" / "checkpoints").iterdir()] == ["last.ckpt"]
