"""The scenes of episodes: which garments are classes of which split, and that they come back in other scenes."""

import numpy as np
import pytest
import torch

from gingham.data.episodes import find_items, images_by_class
from gingham.data.wardrobe.episode_scenes import (
    CATEGORY_CLASSES,
    CATEGORY_LABELS,
    GARMENT_CLASSES,
    GARMENT_LABELS,
    CategoryScenes,
    GarmentScenes,
    _pieces,
    make_category_scene,
    make_garment_scene,
)
from gingham.data.wardrobe.garments import Category


def test_no_garment_is_in_two_splits() -> None:
    classes = [index for split in ("train", "val", "test") for index in GARMENT_CLASSES[split]]
    assert classes == list(range(1, 255)) == list(range(1, GARMENT_LABELS.num_classes))
    for split, indices in GARMENT_CLASSES.items():
        pieces = _pieces(split)
        assert set(pieces) == set(indices)
        assert len({(piece.category, piece.position) for piece in pieces.values()}) == len(indices)
        assert {piece.category for piece in pieces.values()} == set(Category)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_scenes_hold_different_garments_of_their_split(split: str) -> None:
    for index in range(6):
        scene = make_garment_scene(split, index)
        labels = [instance.label for instance in scene.instances]
        assert len(set(labels)) == 3 and set(labels) <= set(GARMENT_CLASSES[split])
        assert set(np.unique(scene.label)) == {0, *labels}
        for instance in scene.instances:
            np.testing.assert_array_equal(scene.label == instance.label, instance.mask)
            assert instance.category == _pieces(split)[instance.label].category


def test_a_garment_looks_alike_in_all_its_scenes_but_lies_elsewhere() -> None:
    scenes = [make_garment_scene("test", index) for index in range(60)]
    seen: dict[int, list[tuple[np.ndarray, tuple[int, ...]]]] = {}
    for scene in scenes:
        for instance in scene.instances:
            inner = scene.image[instance.mask].astype(float).mean(axis=0)
            seen.setdefault(instance.label, []).append((inner, instance.box))
    often = [found for found in seen.values() if len(found) >= 3]
    assert len(often) > 20
    for found in often:
        colours = np.stack([colour for colour, _ in found])
        assert (np.abs(colours - colours.mean(axis=0)) < 30).all()  # its edges show some of the photograph
        assert len({box for _, box in found}) == len(found)


def test_neighbours_share_a_garment_so_that_few_scenes_make_episodes() -> None:
    scenes = GarmentScenes("val", 8)
    images = images_by_class(find_items(scenes, GARMENT_CLASSES["val"]))
    for first in range(0, 8, 2):
        assert any({first, first + 1} <= set(places) for places in images.values())


def test_scenes_depend_on_their_split_and_index_alone() -> None:
    few, many = GarmentScenes("train", 2), GarmentScenes("train", 9, cache=True)
    assert torch.equal(few[1]["image"], many[1]["image"]) and torch.equal(few[1]["label"], many[1]["label"])
    assert not torch.equal(many[1]["image"], many[2]["image"])
    assert not torch.equal(GarmentScenes("val", 1)[0]["image"], few[0]["image"])
    assert make_garment_scene("train", 3, size=96, garments=5).image.shape == (96, 96, 3)


def test_novel_categories_are_in_test_scenes_only() -> None:
    novel = set(CATEGORY_CLASSES["test"])
    assert [CATEGORY_LABELS.names[index] for index in sorted(novel)] == ["dress", "sneaker", "bag"]
    assert novel.isdisjoint(CATEGORY_CLASSES["train"]) and CATEGORY_CLASSES["train"] == CATEGORY_CLASSES["val"]
    assert novel | set(CATEGORY_CLASSES["train"]) == set(range(1, 11))
    for split in ("train", "val", "test"):
        shown = [{instance.label for instance in make_category_scene(split, index).instances} for index in range(12)]
        assert all(len(labels) == 3 for labels in shown)
        assert all(bool(labels & novel) == (split == "test") for labels in shown)
    labels = CategoryScenes("test", 1).read_label(0).unique().tolist()
    assert labels == sorted({0, *(instance.label for instance in make_category_scene("test", 0).instances)})


@pytest.mark.parametrize(("scenes", "most"), [(GarmentScenes, 10), (CategoryScenes, 7)])
def test_numbers_of_garments_outside_their_range_are_named(scenes: type[GarmentScenes], most: int) -> None:
    for garments in (1, most + 1):
        with pytest.raises(ValueError, match=f"garments must be 2 to {most}, got {garments}"):
            scenes("train", 1, garments=garments)
