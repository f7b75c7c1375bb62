"""Which images a training sees, in which order, and how they are shared out."""

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image

from gingham.cli import main
from gingham.data import CueScenes, TagScenes
from gingham.data.points import PointSet, write_points
from gingham.data.wardrobe import Dolls, write_cityscapes, write_lip, write_pascal_context, write_voc_tags
from gingham.data.wardrobe.point_scenes import PointScenes
from gingham.errors import DataError
from gingham.methods.ccnet.recipe import CCNetRecipe
from gingham.methods.resumable_data import EpochBatches, SeededItems, ShareOfItems
from gingham.methods.segmentation_data import FilledUp, SegmentationData


def small(**options: object) -> SegmentationData:
    return SegmentationData(crop=64, scales=None, lengths=(7, 3, 2), **options)  # type: ignore[arg-type]


def trained(batches: int) -> SimpleNamespace:
    """What `SegmentationData` asks a trainer for."""
    progress = SimpleNamespace(total=SimpleNamespace(processed=batches))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    return SimpleNamespace(fit_loop=loop, global_rank=0, world_size=1)


def test_an_epoch_is_a_permutation_and_the_next_another() -> None:
    batches = EpochBatches(12, 3, seed=5)
    first = [position for batch in batches for position in batch]
    assert {epoch for epoch, _ in first} == {0}
    assert sorted(index for _, index in first) == list(range(12))
    assert list(batches) == list(EpochBatches(12, 3, seed=5))
    second = [index for batch in EpochBatches(12, 3, 5, trained=lambda: 4) for _, index in batch]
    assert sorted(second) == list(range(12))
    assert second != [index for _, index in first]
    assert [index for batch in EpochBatches(12, 3, seed=6) for _, index in batch] != [index for _, index in first]


def test_a_pass_begins_after_the_batches_that_were_trained() -> None:
    epochs = [list(EpochBatches(10, 3, 1, trained=lambda e=e: 3 * e)) for e in range(3)]  # type: ignore[misc]
    run = [batch for epoch in epochs for batch in epoch]
    for done in range(7):
        assert list(EpochBatches(10, 3, 1, trained=lambda done=done: done)) == run[done : done + 3]  # type: ignore[misc]


def test_items_leave_the_random_numbers_of_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    _ = SeededItems(CueScenes("train", 2), 0)[0, 1]
    assert not seeded and torch.equal(torch.get_rng_state(), before)


def test_data_is_not_shared_among_processes_twice() -> None:
    data = small()
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=0, world_size=2, _accelerator_connector=SimpleNamespace(use_distributed_sampler=True)
    )
    with pytest.raises(MisconfigurationException, match="use_distributed_sampler of the trainer must be False"):
        data.val_dataloader()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_every_process_drops_out_something_else(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CCNetRecipe, "trainer", SimpleNamespace(global_rank=rank))
    recipe = CCNetRecipe({"backbone": "small", "num_classes": 7, "head_channels": 8})
    torch.manual_seed(3)
    first = torch.rand(())
    torch.manual_seed(3)
    recipe.on_train_start()
    assert bool(torch.rand(()) == first) == (rank == 0)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_every_batch_without_overlap(world_size: int) -> None:
    shares = [list(EpochBatches(25, 4, 3, rank, world_size)) for rank in range(world_size)]
    assert {len(share) for share in shares} == {25 // (4 * world_size)}
    together = [[position for share in shares for position in share[batch]] for batch in range(len(shares[0]))]
    assert together == list(EpochBatches(25, 4 * world_size, 3))


@pytest.mark.parametrize(("length", "world_size"), [(9, 2), (5, 5), (2, 4), (7, 1)])
def test_every_item_is_evaluated_once_and_no_process_goes_empty(length: int, world_size: int) -> None:
    items = FilledUp(CueScenes("val", length), world_size)
    shares = [list(ShareOfItems(len(items), rank, world_size)) for rank in range(world_size)]
    assert all(shares)
    counted = [i for share in shares for i in share if (items[i]["label"] != 255).any()]
    assert sorted(counted) == list(range(length))


@pytest.mark.parametrize("seed", [0, 20240101, 2**62, -3])
def test_augmentation_follows_from_seed_epoch_and_index(seed: int) -> None:
    data = SegmentationData(crop=32, scales=(0.5, 2.0, 0.1), lengths=(2, 1, 1), seed=seed)
    items = SeededItems(data.dataset("train"), seed)
    torch.manual_seed(1)
    first = items[(3, 1)]["image"]
    before = torch.get_rng_state()
    again = items[(3, 1)]["image"]
    assert torch.equal(torch.get_rng_state(), before)  # the run's own generator is left alone
    assert torch.equal(first, again)
    others = [items[(4, 1)], SeededItems(data.dataset("train"), seed + 1)[(3, 1)]]
    assert not any(torch.equal(first, other["image"]) for other in others)
    assert len(list(EpochBatches(6, 2, seed, trained=lambda: 10))) == 3


def test_a_checkpoint_holds_how_many_batches_were_trained() -> None:
    data = small(batch_size=2)
    data.trainer = trained(4)  # type: ignore[assignment]
    state = data.state_dict()
    assert state == {"trained": 4, "batch": 2}
    resumed = small(batch_size=2)
    resumed.trainer = trained(0)  # type: ignore[assignment]  # Lightning restores its own count later
    resumed.load_state_dict(state)
    rest = [batch["name"] for batch in resumed.train_dataloader()]
    assert rest == [batch["name"] for batch in data.train_dataloader()]
    assert rest != [batch["name"] for batch in small(batch_size=2).train_dataloader()]


def test_a_training_batch_is_augmented_and_an_evaluation_batch_is_whole() -> None:
    data = SegmentationData(batch_size=2, crop=(32, 48), scales=(0.5, 1.0, 0.5), lengths=(4, 3, 2))
    (batch,) = islice(data.train_dataloader(), 1)
    assert batch["image"].shape == (2, 3, 32, 48)
    assert batch["label"].shape == (2, 32, 48)
    assert [item["image"].shape for item in data.val_dataloader()] == [(1, 3, 64, 64)] * 3
    assert len(data.test_dataloader()) == 2


def test_every_world_has_its_splits_and_classes(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        write_cityscapes(tmp_path, CueScenes(split, count))
    world = SegmentationData("cityscapes", str(tmp_path), classes="wardrobe")
    assert [len(world.dataset(split)) for split in ("train", "val", "test")] == [3, 2, 1]
    assert world.dataset("val") is world.dataset("val")
    assert world.label_space() == small().label_space() == world.dataset("train").labels
    names = ("wardrobe", "cityscapes", "ade20k", "voc")
    assert [SegmentationData(name).label_space().num_classes for name in names] == [7, 19, 150, 21]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["cityscapes", "ade20k", "voc"])
def test_a_missing_folder_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--data\.root DIR"):
        SegmentationData(name).dataset("train")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="nowhere"):
        SegmentationData(name, str(tmp_path / "nowhere")).dataset("val")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"evaluation_batch_size": 0}, {"workers": -1}, {"lengths": (1, 1, -1)}]
)
def test_numbers_outside_their_range_are_named(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must be "):
        SegmentationData(**options)  # type: ignore[arg-type]


def test_too_few_images_for_a_batch() -> None:
    with pytest.raises(DataError, match="the train split has 7 images, fewer than one batch"):
        small(batch_size=8).train_dataloader()
    with pytest.raises(DataError, match="the val split of wardrobe has no images"):
        SegmentationData(lengths=(1, 0, 0)).setup("fit")


def test_points_that_lie_on_other_classes_are_refused(tmp_path: Path) -> None:
    scenes = PointScenes("train", 8)
    points = tmp_path / "points.txt"
    options = {"name": "wardrobe_points", "lengths": (8, 2, 2), "points": str(points), "crop": 64, "scales": None}
    write_points(points, scenes.points)
    data = SegmentationData(**options)  # type: ignore[arg-type]
    data.setup("fit")
    assert {"image", "label", "name", "points"} == data.dataset("train")[0].keys()
    assert "points" not in data.dataset("val")[0]
    swapped = {name: rows[:, [0, 2, 1]] for name, rows in scenes.points.points.items()}
    write_points(points, PointSet(scenes.num_classes, swapped, source="swapped"))
    with pytest.raises(DataError, match=r"points\.txt: only \d+ of 72 points looked at lie on their own class"):
        SegmentationData(**options).setup("fit")  # type: ignore[arg-type]


@pytest.fixture
def clicks(tmp_path: Path) -> list[str]:
    """The options that name a data set with a point file, whose training images have no masks."""
    for split, count in (("train", 4), ("val", 2)):
        write_pascal_context(tmp_path / "data", PointScenes(split, count))
    for file in tmp_path.glob("data/SegmentationClassContext/*_train_*.png"):
        file.unlink()
    write_points(tmp_path / "clicks.txt", PointScenes("train", 4).points)
    options = {"name": "pascal_context", "root": tmp_path / "data", "points": tmp_path / "clicks.txt"}
    return [f"--data.{name}={value}" for name, value in (options | {"classes": "wardrobe_points"}).items()]


@pytest.mark.filterwarnings("ignore")
def test_a_training_from_clicks_needs_no_masks(
    clicks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--config=pdml_world", *clicks, f"--run_dir={tmp_path / 'run'}", "--data.batch_size=2"]
    options += ["--model.extension.begin=0", "--trainer.max_steps=1", "--trainer.check_val_every_n_epoch=1"]
    options += ["--trainer.enable_progress_bar=false"]
    assert main(["check-data", *options]) == 0
    assert main(["fit", *options]) == 0
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    capsys.readouterr()
    next(tmp_path.glob("data/SegmentationClassContext/*_val_*.png")).unlink()
    assert main(["check-data", *options]) == 1
    assert ".png: no label file\nval: 2 images, 1 problem\n" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["masks", "labels"])
def test_masks_are_needed_where_points_or_labels_come_from_them(
    clicks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    option = {"masks": "--data.points=per_class", "labels": "--model.supervision=labels"}[what]
    options = ["--config=pdml_world", *clicks, option, f"--run_dir={tmp_path / 'run'}", "--check_data=false"]
    assert main(["fit", *options, "--model.extension=null", "--data.batch_size=2"]) == 2
    assert "no label file, expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"classes": "lip"}, "classes is an option of the data sets on disk, not of wardrobe; leave it out"),
        ({"root": "/data"}, "root is an option of the data sets on disk, not of wardrobe"),
        ({"name": "wardrobe_scales", "noise": False}, "noise is an option of wardrobe_dolls, not of wardrobe_scales"),
        ({"name": "lip", "noise": False}, "noise is an option of wardrobe_dolls, not of lip"),
        ({"point_crop": True}, "point_crop is an option of trainings from points"),
        ({"augmentation": "person", "scales": (0.5, 2.0, 0.1)}, "scales is an option of the augmentation 'crop'"),
    ],
    ids=str,
)
def test_options_that_would_do_nothing_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SegmentationData(**options)  # type: ignore[arg-type]


def test_own_classes_are_read_in_a_published_layout(tmp_path: Path) -> None:
    write_lip(tmp_path, Dolls("train", 2))
    names = ("background", "left a", "right a", "b", "c", "d", "e", "f")
    data = SegmentationData("lip", str(tmp_path), classes=names)
    assert data.label_space().names == names
    assert data.label_space().mirror_pairs == ((1, 2),)
    assert torch.equal(data.dataset("train").read(0)["label"], Dolls("train", 1)[0]["label"])
    for options, text in (
        ({"name": "moon"}, "name must be one of wardrobe"),
        ({"classes": "moon"}, "classes must be names"),
        ({"points": "instances"}, "points 'instances' are those of wardrobe_points"),
        ({"points": "per_class", "augmentation": "person"}, "points cannot be augmented"),
        ({"augmentation": "both"}, "augmentation must be"),
        ({"normalization": "both"}, "normalization must be"),
    ):
        with pytest.raises(ValueError, match=text):
            SegmentationData(**options)  # type: ignore[arg-type]


def test_training_takes_another_list_and_other_labels(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        write_voc_tags(tmp_path, TagScenes(split, count))
    (tmp_path / "ImageSets" / "Segmentation" / "few_cls.txt").write_text("wardrobe_train_000002 0 3\n")
    (tmp_path / "seeds").mkdir()
    Image.new("L", (64, 64), 3).save(tmp_path / "seeds" / "wardrobe_train_000002.png")
    options: dict[str, Any] = {"root": str(tmp_path), "classes": "wardrobe_tags"}
    data = SegmentationData("voc", train_list="few_cls", label_folder="seeds", **options)
    assert [item["name"] for item in data.open("train")] == ["wardrobe_train_000002"]
    assert (data.open("train").read(0)["label"] == 3).all()
    assert torch.equal(data.open("val").read(0)["label"], TagScenes("val", 1).read(0)["label"])


def test_tags_go_with_the_items_and_copies_that_fill_up_have_none(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        write_voc_tags(tmp_path, TagScenes(split, count))
    data = SegmentationData("voc_tags", str(tmp_path), 2, classes="wardrobe_tags", crop=48, scales=None, short_side=64)
    (batch,) = data.train_dataloader()
    assert batch["image"].shape == (2, 3, 48, 48) and batch["tags"].shape == (2, 5)
    assert data.splits() == ("train", "val")
    filled = FilledUp(data.dataset("val"), 3)
    assert torch.equal(filled[0]["tags"], TagScenes("val", 1)[0]["tags"]) and (filled[2]["tags"] == -1).all()


def test_the_shorter_side_is_resized_before_the_crop(tmp_path: Path) -> None:
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "ImageSets" / "Segmentation" / "train_cls.txt").write_text("a 0\n")
    Image.new("RGB", (100, 50)).save(tmp_path / "JPEGImages" / "a.jpg")
    data = SegmentationData("voc_tags", str(tmp_path), crop=(30, 999), scales=None, short_side=25)
    image = data.open("train")[0]["image"]
    assert image.shape == (3, 30, 999)
    assert (image[:, :25, :50] != 0).all() and not image[:, 25:].any() and not image[:, :, 50:].any()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"short_side": 64}, "short_side must be 1 or more, with neither scales"),
        ({"short_side": 0, "scales": None}, "short_side must be 1 or more"),
        ({"short_side": 8, "scales": None, "points": "per_class"}, "short_side must be 1 or more, with neither scales"),
        ({"train_list": "train_cls", "name": "lip"}, "train_list is an option of voc, not of lip"),
        ({"label_folder": "seeds", "name": "voc_tags"}, "label_folder is an option of voc, not of voc_tags"),
    ],
)
def test_options_that_do_not_go_together_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SegmentationData(**options)
