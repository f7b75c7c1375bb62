"""The embedded world: its asset, its splits, and the task in which the cue decides the class of the trousers."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import gingham.data
from gingham.data import Cityscapes, CueScenes, check_dataset
from gingham.data.wardrobe import CUE_LABELS, Category, load_wardrobe, make_cue_scene, write_cityscapes
from gingham.data.wardrobe.assets import notices
from gingham.data.wardrobe.composition import Scene
from gingham.data.wardrobe.scale_scenes import SCALE_LABELS, SCALES, ScaleScenes, make_scale_scene
from gingham.errors import DataError

BAG, BOOT = Category.BAG, Category.ANKLE_BOOT
WITH_BAG, WITH_BOOT = CueScenes.trousers
ASSETS = Path(gingham.data.__file__).parent / "assets"


def digest(array: np.ndarray) -> bytes:
    return hashlib.sha256(array.tobytes()).digest()


# The asset


def test_asset_loads_without_pickle_and_is_small() -> None:
    asset = ASSETS / "wardrobe.npz"
    assert asset.stat().st_size < 2_500_000
    with np.load(asset, allow_pickle=False) as archive:
        assert all(not archive[name].dtype.hasobject for name in archive.files)


def test_asset_carries_its_licences() -> None:
    garments = (ASSETS / "LICENSE.fashion-mnist.txt").read_text()
    photographs = (ASSETS / "LICENSE.photographs.txt").read_text()
    assert "Copyright (c) 2017 Zalando SE" in garments and "The MIT License" in garments
    for name in ("brick", "gravel", "grass", "coffee", "chelsea", "rocket"):
        assert f"\n{name} " in photographs
    assert garments in notices() and photographs in notices()


@pytest.mark.parametrize(("split", "pieces", "photographs"), [("train", 240, 4), ("val", 60, 4), ("test", 100, 2)])
def test_wardrobe_sizes(split: str, pieces: int, photographs: int) -> None:
    wardrobe = load_wardrobe(split)
    assert wardrobe.garments.shape == wardrobe.masks.shape == (10, pieces, 28, 28)
    assert wardrobe.photographs.shape == (photographs, 192, 256, 3)
    assert wardrobe.masks.dtype == bool and wardrobe.garments.dtype == np.uint8


def test_every_mask_is_a_garment_and_fits_its_picture() -> None:
    for split in ("train", "val", "test"):
        wardrobe = load_wardrobe(split)
        assert wardrobe.masks.sum((2, 3)).min() >= 80
        inside = wardrobe.garments[wardrobe.masks].mean()
        outside = wardrobe.garments[~wardrobe.masks].mean()
        assert inside > 100 and outside < 2, "the masks would not fit if they were transposed or shifted"


def test_wardrobe_is_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        load_wardrobe("train").garments[0, 0, 0, 0] = 1


def test_splits_share_no_garment_and_test_has_its_own_photographs() -> None:
    wardrobes = {split: load_wardrobe(split) for split in ("train", "val", "test")}
    with np.load(ASSETS / "wardrobe.npz", allow_pickle=False) as archive:
        assert np.unique(archive["train_positions"]).size == 3000
    pieces = {
        split: {digest(piece) for piece in wardrobe.garments.reshape(-1, 784)} for split, wardrobe in wardrobes.items()
    }
    assert not pieces["train"] & pieces["val"]
    assert not pieces["test"] & (pieces["train"] | pieces["val"])
    training_photographs = {digest(photograph) for photograph in wardrobes["train"].photographs}
    assert not training_photographs & {digest(photograph) for photograph in wardrobes["test"].photographs}


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^split must be one of train, val, test, got 'training'$"):
        CueScenes("training", 1)


# The scenes


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_cue_scene("train", index) for index in range(400)]


def test_item_is_what_the_other_data_sets_yield() -> None:
    dataset = CueScenes("train", 3)
    item = dataset[2]
    assert item["image"].dtype == torch.uint8 and item["image"].shape == (3, 64, 64)
    assert item["label"].dtype == torch.int64 and item["label"].shape == (64, 64)
    assert item["name"] == "wardrobe_train_000002"
    assert dataset.num_classes == len(dataset.class_names) == len(dataset.palette) == 7
    assert dataset.ignore_index == 255
    assert [dataset.class_names[index] for index in dataset.trousers] == ["trousers with bag", "trousers with boot"]


def test_image_and_label_are_not_transposed() -> None:
    """The label of every garment is its mask, and trousers stand upright in picture and label."""
    for index in range(30):
        scene = make_cue_scene("val", index)
        item = CueScenes("val", 30)[index]
        np.testing.assert_array_equal(item["image"].permute(1, 2, 0).numpy(), scene.image)
        np.testing.assert_array_equal(item["label"].numpy(), scene.label)
        for instance in scene.instances:
            top, left, bottom, right = instance.box
            assert instance.mask.any() and not np.delete(instance.mask, np.s_[top:bottom], axis=0).any()
            assert (scene.label[instance.mask] == instance.label).all()
            if instance.category == Category.TROUSERS:
                assert bottom - top > right - left


def test_sample_depends_on_split_and_index_alone() -> None:
    long, short = CueScenes("train", 1000), CueScenes("train", 8)
    long.read(999)
    for index in (7, 0, 3):
        assert torch.equal(long[index]["image"], short[index]["image"])
        assert torch.equal(long[index]["label"], short[index]["label"])
    pictures = {
        digest(CueScenes(split, 20)[index]["image"].numpy()) for split in ("train", "val") for index in range(20)
    }
    assert len(pictures) == 40


def test_cache_changes_nothing_and_is_not_written_through() -> None:
    kept, made = CueScenes("val", 5, cache=True), CueScenes("val", 5)
    kept[1]["image"].zero_()
    for index in range(5):
        assert torch.equal(kept[index]["image"], made[index]["image"])
        assert torch.equal(kept[index]["label"], made[index]["label"])


def test_dataset_ends() -> None:
    dataset = CueScenes("val", 3)
    assert len(list(dataset)) == len(dataset) == 3
    with pytest.raises(IndexError, match="index 3 out of range for 3 items"):
        dataset[3]
    assert dataset[-1]["name"] == "wardrobe_val_000002"


@pytest.mark.parametrize(("size", "garments"), [(32, 10), (64, 4), (128, 10), (96, 8)])
def test_size_and_number_of_garments(size: int, garments: int) -> None:
    for index in range(5):
        scene = make_cue_scene("test", index, size=size, garments=garments)
        assert scene.image.shape == (size, size, 3) and len(scene.instances) == garments
        assert all(instance.mask.any() for instance in scene.instances)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"length": -1}, "length must be 0 or above, got -1"),
        ({"length": 1, "size": 16}, "size must be 32 or above, got 16"),
        ({"length": 1, "garments": 3}, "garments must be 4 to 10, got 3"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        CueScenes("train", **arguments)


# The cue


def test_exactly_one_cue_and_it_decides_the_class(scenes: list[Scene]) -> None:
    for scene in scenes:
        cues = [instance.category for instance in scene.instances if instance.category in (BAG, BOOT)]
        trousers = {instance.label for instance in scene.instances if instance.category == Category.TROUSERS}
        assert len(scene.instances) == 8
        assert len(cues) == 1
        assert trousers == {WITH_BAG if cues == [BAG] else WITH_BOOT}
        present = set(np.unique(scene.label))
        assert (CUE_LABELS.names.index("bag") in present) == (WITH_BAG in present)
        assert (CUE_LABELS.names.index("ankle boot") in present) == (WITH_BOOT in present)


def test_without_the_cue_the_class_is_undecidable() -> None:
    """Show the other cue in the same scene: nothing changes outside the cue's square but the name of the trousers."""
    for index in range(60):
        bag = make_cue_scene("train", index, cue=BAG)
        boot = make_cue_scene("train", index, cue=BOOT)
        drawn = make_cue_scene("train", index)
        twin = bag if drawn.instances[0].category == BAG else boot
        np.testing.assert_array_equal(drawn.image, twin.image)
        np.testing.assert_array_equal(drawn.label, twin.label)

        hidden = np.zeros((64, 64), bool)
        for scene in (bag, boot):
            top, left, bottom, right = scene.instances[0].box
            hidden[top:bottom, left:right] = True
        np.testing.assert_array_equal(bag.image[~hidden], boot.image[~hidden])
        assert (bag.image[hidden] != boot.image[hidden]).any()

        swapped = np.where(bag.label == WITH_BAG, WITH_BOOT, bag.label)
        np.testing.assert_array_equal(swapped[~hidden], boot.label[~hidden])
        assert not np.isin([bag.label[hidden], boot.label[hidden]], CueScenes.trousers).any()
        for one, other in zip(bag.instances[1:], boot.instances[1:], strict=True):
            assert one.box == other.box and one.category == other.category


def test_the_two_classes_are_equally_frequent_whatever_else_is_in_the_scene(scenes: list[Scene]) -> None:
    """Nothing that can be counted in a scene tells the cue: its place, the number of trousers, what lies beside."""
    with_bag = np.array([scene.instances[0].category == BAG for scene in scenes], float)
    assert abs(with_bag.mean() - 0.5) < 3 * 0.5 / np.sqrt(len(scenes))

    def count(scene: Scene, category: Category) -> int:
        return sum(instance.category == category for instance in scene.instances)

    statistics = {
        "rows of the cue": [sum(scene.instances[0].box[::2]) for scene in scenes],
        "columns of the cue": [sum(scene.instances[0].box[1::2]) for scene in scenes],
        "trousers": [count(scene, Category.TROUSERS) for scene in scenes],
        "trousers' area": [np.isin(scene.label, CueScenes.trousers).sum() for scene in scenes],
        "coats": [count(scene, Category.COAT) for scene in scenes],
        "dresses": [count(scene, Category.DRESS) for scene in scenes],
        "brightness": [scene.image[scene.label == 0].mean() for scene in scenes],
    }
    for name, values in statistics.items():
        correlation = np.corrcoef(with_bag, np.array(values, float))[0, 1]
        assert abs(correlation) < 3.5 / np.sqrt(len(scenes)), name


def test_most_trousers_share_neither_rows_nor_columns_with_the_cue(scenes: list[Scene]) -> None:
    """A single criss-cross step must not suffice."""
    apart = []
    for scene in scenes:
        top, left, bottom, right = scene.instances[0].box
        for instance in scene.instances:
            if instance.category == Category.TROUSERS:
                other_top, other_left, other_bottom, other_right = instance.box
                rows = other_top < bottom and top < other_bottom
                columns = other_left < right and left < other_right
                apart.append(not rows and not columns)
    assert np.mean(apart) > 0.3


def test_the_cue_is_never_covered(scenes: list[Scene]) -> None:
    for scene in scenes:
        cue = scene.instances[0]
        assert (scene.label[cue.mask] == cue.label).all() and cue.mask.sum() >= 30


# To disk and back


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("wardrobe")
    write_cityscapes(root, CueScenes("train", 6))
    write_cityscapes(root, CueScenes("test", 4))
    return root


@pytest.mark.parametrize(("split", "length"), [("train", 6), ("test", 4)])
@pytest.mark.parametrize("own_names", [True, False])
def test_files_read_back_as_the_same_items(written: Path, split: str, length: int, own_names: bool) -> None:
    memory = CueScenes(split, length)
    disk = Cityscapes(written, split, labels=CUE_LABELS) if own_names else Cityscapes(written, split)
    assert len(disk) == length
    for expected, item in zip(memory, disk, strict=True):
        assert torch.equal(item["image"], expected["image"]) and item["image"].dtype == expected["image"].dtype
        assert torch.equal(item["label"], expected["label"]) and item["label"].dtype == expected["label"].dtype
        assert item["image"].is_contiguous() and item["name"] == expected["name"]
    assert (disk.class_names == memory.class_names) is own_names
    assert check_dataset(disk) == []


def test_written_layout_is_that_of_cityscapes(written: Path) -> None:
    image = written / "leftImg8bit" / "train" / "wardrobe" / "wardrobe_train_000000_leftImg8bit.png"
    label = written / "gtFine" / "train" / "wardrobe" / "wardrobe_train_000000_gtFine_labelIds.png"
    with Image.open(image) as opened:
        assert opened.mode == "RGB" and opened.size == (64, 64)
    with Image.open(label) as opened:
        assert opened.mode == "L" and set(np.unique(np.array(opened))) <= set(CUE_LABELS.values)


def test_writing_again_replaces_and_never_mixes(tmp_path: Path) -> None:
    write_cityscapes(tmp_path, CueScenes("val", 3))
    write_cityscapes(tmp_path, CueScenes("val", 3))
    folder = tmp_path / "leftImg8bit" / "val" / "wardrobe"
    with pytest.raises(DataError) as caught:
        write_cityscapes(tmp_path, CueScenes("val", 2))
    assert str(caught.value) == (
        f"{folder}: holds 1 other images, such as wardrobe_val_000002_leftImg8bit.png; choose an empty folder"
    )
    assert len(Cityscapes(tmp_path, "val")) == 3


# Three scales and a coloured bag


def test_cue_scenes_are_what_they_have_always_been() -> None:
    """Results that were published on them stay comparable."""
    total = hashlib.sha256()
    for split in ("train", "val", "test"):
        for index in range(10):
            scene = make_cue_scene(split, index)
            total.update(scene.image.tobytes() + scene.label.tobytes())
    assert total.hexdigest() == "ae1292b7d414cb9d070a7f1a20f19293357995c7fd289488d799223f76bc1e36"


@pytest.fixture(scope="module")
def scale_scenes() -> list[Scene]:
    return [make_scale_scene("train", index) for index in range(400)]


def test_scale_scene_is_an_item_like_any_other() -> None:
    dataset = ScaleScenes("train", 3)
    item = dataset[2]
    assert item["image"].dtype == torch.uint8 and item["image"].shape == (3, 64, 64)
    assert item["label"].dtype == torch.int64 and item["label"].shape == (64, 64)
    assert [dataset.class_names[index] for index in dataset.trousers] == [
        "trousers with red bag",
        "trousers with blue bag",
    ]
    np.testing.assert_array_equal(item["image"].permute(1, 2, 0).numpy(), make_scale_scene("train", 2).image)
    np.testing.assert_array_equal(item["label"].numpy(), make_scale_scene("train", 2).label)


def test_scale_scene_depends_on_split_and_index_alone() -> None:
    long, short = ScaleScenes("train", 1000), ScaleScenes("train", 8, cache=True)
    long.read(999)
    for index in (7, 0, 3):
        assert torch.equal(long[index]["image"], short[index]["image"])
        assert torch.equal(long[index]["label"], short[index]["label"])
    pictures = {
        digest(make_scale_scene(split, index).image) for split in ("train", "val", "test") for index in range(9)
    }
    assert len(pictures) == 27


def test_garments_come_at_three_scales(scale_scenes: list[Scene]) -> None:
    sides = np.array(
        [
            max(instance.box[2] - instance.box[0], instance.box[3] - instance.box[1])
            for scene in scale_scenes
            for instance in scene.instances[1:]
        ]
    )
    shares = [np.mean((low * 64 <= sides) & (sides <= high * 64)) for low, high in SCALES]
    assert min(shares) > 0.25 and sum(shares) > 0.9, "few garments had to shrink"
    bags = [max(scene.instances[0].box[2:]) - min(scene.instances[0].box[:2]) for scene in scale_scenes]
    assert min(bags) >= 15


def test_one_bag_whose_colour_decides_the_class(scale_scenes: list[Scene]) -> None:
    red_bags = 0
    for scene in scale_scenes:
        bags = [instance for instance in scene.instances if instance.category == BAG]
        assert bags == [scene.instances[0]] and len(scene.instances) == 8
        red, _, blue = scene.image[bags[0].mask].mean(0)
        trousers = {instance.label for instance in scene.instances if instance.category == Category.TROUSERS}
        assert trousers == {ScaleScenes.trousers[0 if red > blue else 1]}
        red_bags += red > blue
    assert abs(red_bags / len(scale_scenes) - 0.5) < 3 * 0.5 / np.sqrt(len(scale_scenes))


def test_without_the_bag_the_class_is_undecidable() -> None:
    for index in range(40):
        red, blue = (make_scale_scene("train", index, colour=colour) for colour in ("red", "blue"))
        drawn = make_scale_scene("train", index)
        twin = red if ScaleScenes.trousers[0] in drawn.label else blue
        np.testing.assert_array_equal(drawn.image, twin.image)
        np.testing.assert_array_equal(drawn.label, twin.label)
        top, left, bottom, right = red.instances[0].box
        assert red.instances[0].box == blue.instances[0].box
        hidden = np.zeros((64, 64), bool)
        hidden[top:bottom, left:right] = True
        np.testing.assert_array_equal(red.image[~hidden], blue.image[~hidden])
        swapped = np.where(red.label == ScaleScenes.trousers[0], ScaleScenes.trousers[1], red.label)
        np.testing.assert_array_equal(swapped, blue.label)


def test_decoys_come_in_the_colours_of_bags() -> None:
    """Red and blue garments beside the bag: all of them, none, or the share that is asked for."""

    def share(decoys: float) -> float:
        coloured = []
        for index in range(60):
            for instance in make_scale_scene("val", index, decoys=decoys).instances[1:]:
                red, green, blue = make_scale_scene("val", index, decoys=decoys).image[instance.mask].mean(0)
                coloured.append(min(red, blue) < 0.2 * max(red, blue) and green < 0.35 * max(red, blue))
        return float(np.mean(coloured))

    shares = [share(decoys) for decoys in (0.0, 0.2, 1.0)]
    assert shares[0] < 0.02
    assert 0.1 < shares[1] < 0.3
    assert shares[2] > 0.8


@pytest.mark.parametrize(("size", "garments"), [(32, 10), (64, 4), (128, 10)])
def test_scale_scenes_of_other_sizes(size: int, garments: int) -> None:
    for index in range(3):
        scene = make_scale_scene("test", index, size=size, garments=garments)
        assert scene.image.shape == (size, size, 3) and len(scene.instances) == garments
        assert all(instance.mask.any() for instance in scene.instances)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"length": -1}, "length must be 0 or above, got -1"),
        ({"length": 1, "size": 16}, "size must be 32 or above, got 16"),
        ({"length": 1, "garments": 3}, "garments must be 4 to 10, got 3"),
        ({"length": 1, "decoys": 1.5}, "decoys must be 0 to 1, got 1.5"),
    ],
)
def test_wrong_arguments_of_scale_scenes_are_named(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        ScaleScenes("train", **arguments)


def test_scale_scenes_go_to_disk_and_back(tmp_path: Path) -> None:
    write_cityscapes(tmp_path, ScaleScenes("val", 3))
    for expected, item in zip(ScaleScenes("val", 3), Cityscapes(tmp_path, "val", labels=SCALE_LABELS), strict=True):
        assert torch.equal(item["image"], expected["image"]) and torch.equal(item["label"], expected["label"])
