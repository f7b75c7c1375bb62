"""Dolls: persons of part-labelled garments, the noise in their labels, and their way to disk and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gingham.data import CueScenes, SegmentationDataset, VOCSegmentation, check_dataset
from gingham.data.lip import LIP
from gingham.data.segmentation import FolderSegmentation
from gingham.data.wardrobe import CUE_LABELS, Category, load_wardrobe
from gingham.data.wardrobe.assets import sample_generator
from gingham.data.wardrobe.dolls import (
    BACKGROUND,
    BAG,
    COAT,
    CONFUSIONS,
    DOLL_LABELS,
    DRESS,
    HEAD,
    SHOES,
    TROUSERS,
    UPPER,
    Confusion,
    Doll,
    Dolls,
    corrupt_labels,
    draw_identity,
    make_doll,
    paint_doll,
)
from gingham.data.wardrobe.export import write_lip, write_voc
from gingham.errors import DataError
from gingham.metrics.segmentation import SegmentationMeter

TOPS = (UPPER, COAT, DRESS)


@pytest.fixture(scope="module")
def dolls() -> list[Doll]:
    return [make_doll("train", index) for index in range(500)]


def miou(labels: np.ndarray, truth: np.ndarray) -> float:
    meter = SegmentationMeter(DOLL_LABELS.num_classes)
    meter.update(torch.from_numpy(labels), torch.from_numpy(truth))
    return 100 * float(meter.compute().miou)


# The pictures


def test_item_is_what_the_other_data_sets_yield() -> None:
    dataset = Dolls("train", 3)
    item = dataset[2]
    assert item["image"].dtype == torch.uint8 and item["image"].shape == (3, 64, 32)
    assert item["label"].dtype == torch.int64 and item["label"].shape == (64, 32)
    assert item["name"] == "doll_train_000002" and len(list(dataset)) == len(dataset) == 3
    assert dataset.class_names == ("background", "head", "upper", "coat", "dress", "trousers", "shoes", "bag")
    assert len(set(dataset.palette)) == 8 and dataset.labels.mirror_pairs == ()


def test_dolls_stand_upright(dolls: list[Doll]) -> None:
    """Head over garments over shoes, and nobody lies: that would be image and label transposed."""
    for doll in dolls[:100]:
        middle = {part: np.argwhere(doll.label == part).mean(0) for part in np.unique(doll.label)}
        (top,) = set(middle) & set(TOPS)
        order = [middle[part][0] for part in (HEAD, top, TROUSERS, SHOES)]
        assert order == sorted(order) and order[0] < 14 and order[-1] > 54
        assert all(12 < middle[part][1] < 20 for part in (HEAD, top, TROUSERS, SHOES))


def test_top_is_labelled_as_what_it_is(dolls: list[Doll]) -> None:
    part_of = {Category.COAT: COAT, Category.DRESS: DRESS}
    for doll in dolls:
        assert set(np.unique(doll.label)) & set(TOPS) == {part_of.get(doll.identity.top.category, UPPER)}
    worn = [doll.identity.top.category for doll in dolls]
    assert 0.24 < worn.count(Category.COAT) / 500 < 0.36 and 0.24 < worn.count(Category.DRESS) / 500 < 0.36


def test_bag_hangs_on_its_side_or_is_not_there(dolls: list[Doll]) -> None:
    sides = []
    for doll in dolls:
        assert (BAG in doll.label) == (doll.identity.bag is not None)
        if doll.identity.bag is not None:
            sides.append(doll.identity.bag_side)
            assert np.sign(np.argwhere(doll.label == BAG)[:, 1].mean() - 15.5) == doll.identity.bag_side
    assert 0.6 < len(sides) / 500 < 0.73 and abs(np.mean(sides)) < 0.2


@pytest.mark.parametrize(("field", "part"), [("top", None), ("trousers", TROUSERS), ("shoes", SHOES), ("bag", BAG)])
def test_label_is_where_the_garment_is_painted(dolls: list[Doll], field: str, part: int | None) -> None:
    """Dye one piece: the picture changes where its label is, but for blended edges, and the label does not change."""
    wardrobe = load_wardrobe("train")
    inside, outside, area = 0, 0, 0
    for doll in dolls[:40]:
        piece = getattr(doll.identity, field)
        if piece is None:
            continue
        canvases, labels = np.zeros((2, 64, 32, 3), np.float32), []
        for canvas, shade in zip(canvases, (0.0, 1.0), strict=True):
            identity = replace(doll.identity, **{field: replace(piece, tint=(shade, shade, shade))})
            labels.append(paint_doll(canvas, wardrobe, identity, np.random.default_rng(1)))
        np.testing.assert_array_equal(*labels)
        changed = (canvases[1] - canvases[0] > 8).any(-1)
        labelled = np.isin(labels[0], TOPS if part is None else (part,))
        inside += (changed & labelled).sum()
        outside += (changed & ~labelled).sum()
        area += labelled.sum()
    assert inside > 0.85 * area  # what is black in the photograph, as between trouser legs, stays black
    assert outside < 0.3 * area


def test_colours_of_hair_and_skin_are_on_the_head_only(dolls: list[Doll]) -> None:
    wardrobe = load_wardrobe("train")
    for doll in dolls[:10]:
        other = replace(doll.identity, hair=(0.0, 1.0, 0.0), skin=(0.0, 0.0, 1.0))
        canvases = np.zeros((2, 64, 32, 3), np.float32)
        for canvas, identity in zip(canvases, (doll.identity, other), strict=True):
            label = paint_doll(canvas, wardrobe, identity, np.random.default_rng(1))
        changed = (canvases[0] != canvases[1]).any(-1)
        assert changed[label == HEAD].all() and changed.sum() < 2 * (label == HEAD).sum()
        assert not changed[24:].any()


# Identities


def test_same_person_is_painted_again_elsewhere() -> None:
    wardrobe = load_wardrobe("val")
    identity = draw_identity(sample_generator("val", 5), wardrobe)
    assert identity == draw_identity(sample_generator("val", 5), wardrobe)
    assert len({identity, *(draw_identity(sample_generator("val", number), wardrobe) for number in range(50))}) == 50
    dark, light = np.zeros((64, 32, 3), np.float32), np.full((64, 32, 3), 255, np.float32)
    first, second = (
        paint_doll(canvas, wardrobe, identity, np.random.default_rng(seed), jitter=0.0)
        for seed, canvas in enumerate((dark, light))
    )
    np.testing.assert_array_equal(first, second)
    assert (dark[first == BACKGROUND] < 128).all() and (light[first == BACKGROUND] > 127).all()
    inside = (first != BACKGROUND) & (dark == light).all(-1)
    assert inside.sum() > 0.7 * (first != BACKGROUND).sum(), "the person must not depend on the background"


def test_jitter_moves_parts_a_little() -> None:
    wardrobe = load_wardrobe("train")
    identity = draw_identity(sample_generator("train", 1), wardrobe)

    def painted(seed: int, jitter: float) -> np.ndarray:
        return paint_doll(
            np.zeros((64, 32, 3), np.float32), wardrobe, identity, np.random.default_rng(seed), jitter=jitter
        )

    still = painted(0, 0.0)
    moved = np.stack([painted(seed, 0.6) for seed in range(20)])
    assert len({label.tobytes() for label in moved}) > 10
    assert 0.85 < (moved == still).mean() < 0.99


def test_larger_canvas_shows_the_same_person() -> None:
    wardrobe = load_wardrobe("train")
    for number in range(10):
        identity = draw_identity(sample_generator("train", number), wardrobe)
        small, large = (
            paint_doll(
                np.zeros((rows, rows // 2, 3), np.float32), wardrobe, identity, np.random.default_rng(0), jitter=0.0
            )
            for rows in (64, 128)
        )
        assert large.shape == (128, 64) and (large[1::2, 1::2] == small).mean() > 0.9


@pytest.mark.parametrize("shape", [(32, 64, 3), (64, 64, 3), (30, 15, 3)])
def test_canvas_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    wardrobe, rng = load_wardrobe("train"), np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"^canvas must be \[2n, n, 3\] with n 16 or above, got "):
        paint_doll(np.zeros(shape, np.float32), wardrobe, draw_identity(rng, wardrobe), rng)


# Samples


@pytest.mark.parametrize("noise", [False, True])
def test_sample_depends_on_split_and_index_alone(noise: bool) -> None:
    long, short = Dolls("train", 1000, noise=noise), Dolls("train", 8, noise=noise)
    long.read(999)
    for index in (7, 0, 3):
        assert torch.equal(long[index]["image"], short[index]["image"])
        assert torch.equal(long[index]["label"], short[index]["label"])
    pictures = {Dolls(split, 20)[index]["image"].numpy().tobytes() for split in ("train", "val") for index in range(20)}
    assert len(pictures) == 40


@pytest.mark.parametrize("noise", [False, True])
def test_cache_changes_nothing_and_is_not_written_through(noise: bool) -> None:
    kept, made = Dolls("val", 5, noise=noise, cache=True), Dolls("val", 5, noise=noise)
    kept[1]["image"].zero_()
    kept[1]["label"].zero_()
    for index in range(5):
        assert torch.equal(kept[index]["image"], made[index]["image"])
        assert torch.equal(kept[index]["label"], made[index]["label"])


def test_noise_is_in_the_labels_only_and_only_when_asked_for() -> None:
    for split in ("train", "val", "test"):
        clean, noisy = Dolls(split, 20), Dolls(split, 20, noise=True)
        for index in range(20):
            doll = make_doll(split, index)
            assert torch.equal(clean[index]["label"], torch.from_numpy(doll.label).long())
            assert torch.equal(clean[index]["image"], noisy[index]["image"])
            assert not torch.equal(clean[index]["label"], noisy[index]["label"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("train", -1), "length must be 0 or above, got -1"),
        (("training", 1), "split must be one of train, val, test, got 'training'"),
    ],
)
def test_wrong_arguments_are_named(arguments: Any, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        Dolls(*arguments)


# The noise


def test_noisy_training_labels_score_about_54(dolls: list[Doll]) -> None:
    noisy = Dolls("train", 500, noise=True)
    labels = np.stack([noisy.read(index)["label"].numpy() for index in range(500)])
    assert 53.2 < miou(labels, np.stack([doll.label for doll in dolls]).astype(np.int64)) < 55.2


def test_parts_are_misnamed_as_a_whole_at_the_documented_rates(dolls: list[Doll]) -> None:
    rng = np.random.default_rng(0)
    seen: dict[int, list[int]] = {part: [] for part in CONFUSIONS}
    for doll in dolls:
        noisy = corrupt_labels(doll.label, rng, wander=0.0)
        for part in np.unique(doll.label):
            (name,) = np.unique(noisy[doll.label == part])  # one name for the whole part
            if part != BACKGROUND:
                seen[part].append(name)
            else:
                assert name == BACKGROUND
    for part, names in seen.items():
        rate, others = CONFUSIONS[part]
        wrong = np.mean([name != part for name in names])
        assert 0.25 <= rate <= 0.35 and abs(wrong - rate) < 3.5 * np.sqrt(rate * (1 - rate) / len(names))
        assert set(names) == {part, *others}


def test_parts_are_misnamed_independently(dolls: list[Doll]) -> None:
    rng = np.random.default_rng(0)
    wrong = np.array(
        [
            [(noisy != doll.label)[doll.label == part].any() for part in (HEAD, TROUSERS, SHOES)]
            for doll in dolls
            for noisy in [corrupt_labels(doll.label, rng, wander=0.0)]
        ],
        float,
    )
    correlations = np.corrcoef(wrong.T)[np.triu_indices(3, 1)]
    assert (abs(correlations) < 3.5 / np.sqrt(len(dolls))).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_boundaries_wander_smoothly_by_the_given_way(axis: int) -> None:
    label = np.zeros((64, 32), np.uint8)
    label[(slice(32, None), slice(None)) if axis == 0 else (slice(None), slice(16, None))] = 1
    rng = np.random.default_rng(0)
    ways = []
    for _ in range(200):
        noisy = corrupt_labels(label, rng, confusions={}, wander=1.5)
        boundary = (noisy == 0).sum(axis)
        ways.append(boundary - (32, 16)[axis])
        assert abs(np.diff(boundary)).max() <= 3
    # Between knots the field is a mean of draws, which shrinks it by a third of its variance along each axis.
    assert 0.7 < np.std(ways) < 1.5 and abs(np.mean(ways)) < 0.3
    at_corner = np.array(ways)[:, 0]
    assert abs(np.corrcoef(at_corner, np.array(ways)[:, -1])[0, 1]) < 0.25, "far ends wander on their own"
    assert np.corrcoef(at_corner, np.array(ways)[:, 2])[0, 1] > 0.7, "neighbours wander together"


def test_wandering_makes_no_new_names(dolls: list[Doll]) -> None:
    rng = np.random.default_rng(0)
    clean = np.stack([doll.label for doll in dolls[:100]])
    noisy = np.stack([corrupt_labels(label, rng, confusions={}) for label in clean])
    for before, after in zip(clean, noisy, strict=True):
        assert set(np.unique(after)) <= set(np.unique(before))
    assert 70 < miou(noisy.astype(np.int64), clean.astype(np.int64)) < 90


def test_without_confusions_and_wandering_nothing_happens(dolls: list[Doll]) -> None:
    label = dolls[0].label
    same = corrupt_labels(label, np.random.default_rng(0), confusions={}, wander=0.0)
    np.testing.assert_array_equal(same, label)


def test_corruption_follows_from_the_generator_and_leaves_its_input_alone(dolls: list[Doll]) -> None:
    label = dolls[0].label.copy()
    label[:3] = 255
    before = label.copy()
    one, other, third = (corrupt_labels(label, np.random.default_rng(seed)) for seed in (4, 4, 5))
    np.testing.assert_array_equal(label, before)
    np.testing.assert_array_equal(one, other)
    assert (one != third).any() and (one[0, 10:20] == 255).all(), "ignored pixels get no name"


def test_swapped_names_do_not_chain() -> None:
    """Names are exchanged at once: what is called trousers for shoes is not called dress for trousers."""
    label = np.repeat(np.array([SHOES, TROUSERS], np.uint8), 2)[:, None] * np.ones((1, 3), np.uint8)
    both = {SHOES: Confusion(1.0, (TROUSERS,)), TROUSERS: Confusion(1.0, (DRESS,))}
    noisy = corrupt_labels(label, np.random.default_rng(0), confusions=both, wander=0.0)
    np.testing.assert_array_equal(noisy[:, 0], [TROUSERS, TROUSERS, DRESS, DRESS])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"wander": -1.0}, "wander must be 0 or above, got -1.0"),
        ({"confusions": {HEAD: Confusion(1.5, (BAG,))}}, "confusions must have rates of 0 to 1 and a name or more"),
        ({"confusions": {HEAD: Confusion(0.5, ())}}, "confusions must have rates of 0 to 1 and a name or more"),
    ],
)
def test_wrong_noise_is_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}"):
        corrupt_labels(np.zeros((8, 8), np.uint8), np.random.default_rng(0), **options)


# To disk and back

Writer = Callable[[Path, SegmentationDataset], None]
Reader = type[LIP] | type[VOCSegmentation]
every_layout = pytest.mark.parametrize(("write", "reader"), [(write_lip, LIP), (write_voc, VOCSegmentation)])


def assert_same_items(disk: FolderSegmentation, memory: SegmentationDataset) -> None:
    assert len(disk) == len(memory)
    for expected, item in zip(memory, disk, strict=True):
        assert torch.equal(item["image"], expected["image"]) and item["image"].dtype == expected["image"].dtype
        assert torch.equal(item["label"], expected["label"]) and item["label"].dtype == expected["label"].dtype
        assert item["image"].is_contiguous() and item["name"] == expected["name"]
    assert check_dataset(disk) == []


@every_layout
def test_files_read_back_as_the_same_items(tmp_path: Path, write: Writer, reader: Reader) -> None:
    splits = [Dolls("train", 6, noise=True), Dolls("val", 3), Dolls("test", 4)]
    for dataset in splits:
        write(tmp_path, dataset)
    for dataset in splits:
        assert_same_items(reader(tmp_path, dataset.split, labels=DOLL_LABELS), dataset)


@every_layout
def test_classes_with_file_values_of_their_own_read_back(tmp_path: Path, write: Writer, reader: Reader) -> None:
    write(tmp_path, CueScenes("val", 3))
    assert_same_items(reader(tmp_path, "val", labels=CUE_LABELS), CueScenes("val", 3))


def test_written_training_and_validation_read_as_trainval(tmp_path: Path) -> None:
    for split in ("val", "train"):
        write_lip(tmp_path, Dolls(split, 2))
    names = [item["name"] for item in LIP(tmp_path, "trainval", labels=DOLL_LABELS)]
    assert names == ["doll_train_000000", "doll_train_000001", "doll_val_000000", "doll_val_000001"]


def test_written_layouts_are_the_published_ones(tmp_path: Path) -> None:
    write_lip(tmp_path / "lip", Dolls("train", 1))
    write_voc(tmp_path / "voc", Dolls("train", 1))

    def files(root: Path) -> list[str]:
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())

    assert files(tmp_path / "lip") == [
        "train_id.txt",
        "train_images/doll_train_000000.png",
        "train_segmentations/doll_train_000000.png",
    ]
    assert files(tmp_path / "voc") == [
        "ImageSets/Segmentation/train.txt",
        "JPEGImages/doll_train_000000.png",
        "SegmentationClass/doll_train_000000.png",
    ]
    assert (tmp_path / "lip" / "train_id.txt").read_text() == "doll_train_000000\n"
    with Image.open(tmp_path / "lip" / "train_segmentations" / "doll_train_000000.png") as opened:
        assert opened.mode == "L" and opened.size == (32, 64)
        np.testing.assert_array_equal(np.array(opened), make_doll("train", 0).label)


def test_writing_again_replaces_and_never_mixes(tmp_path: Path) -> None:
    for _ in range(2):
        write_lip(tmp_path / "lip", Dolls("val", 3))
        write_voc(tmp_path / "voc", Dolls("val", 3))
    with pytest.raises(DataError) as caught:
        write_lip(tmp_path / "lip", Dolls("val", 2))
    folder = tmp_path / "lip" / "val_images"
    assert str(caught.value) == (f"{folder}: holds 1 other images, such as doll_val_000002.png; choose an empty folder")
    (folder / "doll_val_000001.png").rename(folder / "doll_val_000001.jpg")
    with pytest.raises(DataError, match=r"holds 1 other images, such as doll_val_000001.jpg"):
        write_lip(tmp_path / "lip", Dolls("val", 3))
    assert len(VOCSegmentation(tmp_path / "voc", "val", labels=DOLL_LABELS)) == 3


def test_a_split_is_not_written_over_another(tmp_path: Path) -> None:
    """VOC keeps the images of all splits in one folder."""
    write_voc(tmp_path, Dolls("val", 3))
    renamed = VOCSegmentation(tmp_path, "val", labels=DOLL_LABELS)
    renamed.split = "train"
    with pytest.raises(DataError) as caught:
        write_voc(tmp_path, renamed)
    assert str(caught.value) == (
        f"{tmp_path}/ImageSets/Segmentation/val.txt: names doll_val_000000 too, which would be overwritten; "
        "choose an empty folder"
    )
