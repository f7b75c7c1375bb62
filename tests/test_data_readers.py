"""The Cityscapes, ADE20K, VOC and LIP readers: what they read, and what they say when the files are not right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gingham.data import ADE20K, IGNORE_INDEX, Cityscapes, LabelSpace, VOCSegmentation, check_dataset
from gingham.data.ade20k import ADE20K_LABELS
from gingham.data.atr import ATR_LABELS
from gingham.data.cityscapes import CITYSCAPES_LABELS
from gingham.data.lip import CIHP_LABELS, LIP, LIP_LABELS
from gingham.data.person_part import PERSON_PART_LABELS
from gingham.data.segmentation import FolderSegmentation
from gingham.data.voc import VOC_LABELS
from gingham.errors import DataError, GinghamError

HEIGHT, WIDTH = 6, 10


def picture(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def label_image(value: int, height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    values = np.full((height, width), value, np.uint8)
    values[0, -1] = 255  # the corner that only an untransposed reader leaves at the upper right
    return Image.fromarray(values)


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def make_cityscapes(root: Path) -> tuple[list[Path], list[Path]]:
    images, labels = [], []
    for number, (city, value) in enumerate([("aachen", 7), ("aachen", 26), ("bremen", 33)]):
        images.append(root / f"leftImg8bit/train/{city}/{city}_00000{number}_000019_leftImg8bit.png")
        labels.append(root / f"gtFine/train/{city}/{city}_00000{number}_000019_gtFine_labelIds.png")
        save(picture(number), images[-1])
        save(label_image(value), labels[-1])
    return images, labels


def make_ade20k(root: Path) -> tuple[list[Path], list[Path]]:
    images, labels = [], []
    for number, value in enumerate([1, 150, 0]):
        images.append(root / f"images/training/ADE_train_0000000{number}.jpg")
        labels.append(root / f"annotations/training/ADE_train_0000000{number}.png")
        save(picture(number), images[-1])
        save(label_image(value), labels[-1])
    return images, labels


def make_voc(root: Path) -> tuple[list[Path], list[Path]]:
    images, labels = [], []
    for number, value in enumerate([0, 15, 20]):
        images.append(root / f"JPEGImages/2007_00000{number}.jpg")
        labels.append(root / f"SegmentationClass/2007_00000{number}.png")
        save(picture(number), images[-1])
        label = label_image(value)
        label.putpalette([channel for colour in VOC_LABELS.palette for channel in colour])
        save(label, labels[-1])
    names = root / "ImageSets/Segmentation/train.txt"
    names.parent.mkdir(parents=True)
    names.write_text("".join(f"{path.stem}\n" for path in images))
    return images, labels


def make_lip(root: Path, split: str = "train", suffix: str = ".jpg") -> tuple[list[Path], list[Path]]:
    images, labels = [], []
    for number, value in enumerate([0, 14, 19]):
        images.append(root / f"{split}_images/{split}_10{number}{suffix}")
        labels.append(root / f"{split}_segmentations/{split}_10{number}.png")
        save(picture(number), images[-1])
        save(label_image(value), labels[-1])
    (root / f"{split}_id.txt").write_text("".join(f"{path.stem}\n" for path in images))
    return images, labels


Maker = Callable[[Path], tuple[list[Path], list[Path]]]
Reader = type[Cityscapes] | type[ADE20K] | type[VOCSegmentation] | type[LIP]
LAYOUTS = [
    pytest.param(make_cityscapes, Cityscapes, [0, 13, 18], id="cityscapes"),
    pytest.param(make_ade20k, ADE20K, [0, 149, 255], id="ade20k"),
    pytest.param(make_voc, VOCSegmentation, [0, 15, 20], id="voc"),
    pytest.param(make_lip, LIP, [0, 14, 19], id="lip"),
]
LISTED = [
    pytest.param(make_voc, VOCSegmentation, "ImageSets/Segmentation/train.txt", id="voc"),
    pytest.param(make_lip, LIP, "train_id.txt", id="lip"),
]
every_listed_layout = pytest.mark.parametrize(("make", "reader", "name_list"), LISTED)
every_layout = pytest.mark.parametrize(("make", "reader", "classes"), LAYOUTS)


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text and isinstance(caught.value, GinghamError)
    return text


# What is read


@every_layout
def test_reader_maps_file_values_to_classes(tmp_path: Path, make: Maker, reader: Reader, classes: list[int]) -> None:
    images, _ = make(tmp_path)
    dataset = reader(tmp_path, "train")
    assert len(dataset) == 3
    for item, path, index in zip(dataset, images, classes, strict=True):
        expected = torch.full((HEIGHT, WIDTH), index)
        expected[0, -1] = IGNORE_INDEX
        assert item["label"].dtype == torch.int64 and torch.equal(item["label"], expected)
        assert item["image"].dtype == torch.uint8 and item["image"].shape == (3, HEIGHT, WIDTH)
        with Image.open(path) as opened:
            assert torch.equal(item["image"], torch.from_numpy(np.array(opened)).permute(2, 0, 1))
        assert path.name.startswith(item["name"]) and "leftImg8bit" not in item["name"]


@every_layout
def test_a_clean_data_set_has_no_problems(tmp_path: Path, make: Maker, reader: Reader, classes: list[int]) -> None:
    make(tmp_path)
    assert check_dataset(reader(tmp_path, "train")) == []


@every_layout
def test_transform_is_applied_to_items(tmp_path: Path, make: Maker, reader: Reader, classes: list[int]) -> None:
    make(tmp_path)
    dataset = reader(tmp_path, "train", transform=lambda item: {**item, "image": item["image"].float() / 2})
    assert torch.equal(dataset[0]["image"], dataset.read(0)["image"].float() / 2)


@pytest.mark.parametrize(
    ("space", "count", "first", "last"),
    [
        (CITYSCAPES_LABELS, 19, "road", "bicycle"),
        (ADE20K_LABELS, 150, "wall", "flag"),
        (VOC_LABELS, 21, "background", "tv monitor"),
        (LIP_LABELS, 20, "background", "right shoe"),
        (CIHP_LABELS, 20, "background", "right shoe"),
        (ATR_LABELS, 18, "background", "scarf"),
        (PERSON_PART_LABELS, 7, "background", "lower legs"),
    ],
)
def test_classes_names_and_colours(space: LabelSpace, count: int, first: str, last: str) -> None:
    assert space.num_classes == len(space.names) == len(space.palette) == count
    assert (space.names[0], space.names[-1]) == (first, last)
    assert len(set(space.names)) == len(set(space.palette)) == count


def test_every_official_cityscapes_id_is_known() -> None:
    decoded = CITYSCAPES_LABELS.decode(np.arange(34, dtype=np.uint8)[None], "ids")
    assert sorted(decoded[decoded != IGNORE_INDEX].tolist()) == list(range(19))
    assert decoded[0, 7] == 0 and decoded[0, 26] == 13 and decoded[0, 33] == 18 and decoded[0, 0] == IGNORE_INDEX


def test_own_classes_pass_through_the_cityscapes_layout(tmp_path: Path) -> None:
    make_cityscapes(tmp_path)
    own = LabelSpace(("other", "car"), ((0, 0, 0), (0, 0, 142)), values=(7, 26), ignored=(33,))
    dataset = Cityscapes(tmp_path, "train", labels=own)
    assert [int(item["label"][0, 0]) for item in dataset] == [0, 1, 255]
    assert dataset.class_names == ("other", "car")


def test_label_space_encodes_what_it_decodes() -> None:
    values = np.array([[7, 33, 255], [8, 11, 7]], np.uint8)
    np.testing.assert_array_equal(CITYSCAPES_LABELS.encode(CITYSCAPES_LABELS.decode(values, "x")), values)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((1, 1), "file values must be distinct"),
        ((0, 255), "file values must be distinct"),
        ((0,), "names, palette and"),
    ],
)
def test_inconsistent_label_space_is_refused(values: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}"):
        LabelSpace(("a", "b"), ((0, 0, 0), (1, 1, 1)), values=values)


def test_voc_palette_is_that_of_the_development_kit() -> None:
    assert VOC_LABELS.palette[15] == (192, 128, 128) and VOC_LABELS.palette[20] == (0, 64, 128)


@pytest.mark.parametrize("space", [LIP_LABELS, CIHP_LABELS, ATR_LABELS, PERSON_PART_LABELS, VOC_LABELS])
def test_what_has_a_left_and_a_right_is_a_mirror_pair(space: LabelSpace) -> None:
    index_of = {name: index for index, name in enumerate(space.names)}
    expected = tuple(
        (index, index_of[name.replace("left", "right")]) for name, index in index_of.items() if "left" in name
    )
    assert space.mirror_pairs == expected
    assert sum("left" in name or "right" in name for name in space.names) == 2 * len(expected)


def test_mirror_pairs_are_those_of_the_specification() -> None:
    assert LIP_LABELS.mirror_pairs == CIHP_LABELS.mirror_pairs == ((14, 15), (16, 17), (18, 19))
    assert ATR_LABELS.mirror_pairs == ((9, 10), (12, 13), (14, 15))
    assert PERSON_PART_LABELS.mirror_pairs == ()


def test_cihp_has_torso_skin_where_lip_has_jumpsuits() -> None:
    differing = [(a, b) for a, b in zip(LIP_LABELS.names, CIHP_LABELS.names, strict=True) if a != b]
    assert differing == [("jumpsuits", "torso skin")] and LIP_LABELS.names[10] == "jumpsuits"


def test_human_parsing_has_the_colours_of_the_development_kit() -> None:
    assert LIP_LABELS.palette[9] == (192, 0, 0) and LIP_LABELS.palette[19] == (128, 192, 0)
    assert ATR_LABELS.palette == LIP_LABELS.palette[:18] and PERSON_PART_LABELS.palette == LIP_LABELS.palette[:7]


@pytest.mark.parametrize("space", [ATR_LABELS, PERSON_PART_LABELS])
def test_other_human_parsing_data_passes_through_the_layout_of_lip(tmp_path: Path, space: LabelSpace) -> None:
    _, labels = make_lip(tmp_path)
    for path, value in zip(labels, (0, 3, space.num_classes - 1), strict=True):
        save(label_image(value), path)
    dataset = LIP(tmp_path, "train", labels=space)
    assert dataset.class_names == space.names
    assert [int(item["label"][1, 0]) for item in dataset] == [0, 3, space.num_classes - 1]


def test_trainval_is_both_lists_one_after_the_other(tmp_path: Path) -> None:
    train, _ = make_lip(tmp_path, "train")
    val, val_labels = make_lip(tmp_path, "val")
    save(label_image(7), val_labels[0])
    dataset = LIP(tmp_path, "trainval")
    assert dataset.split == "trainval"
    assert [file.image for file in dataset.images] == train + val
    assert [int(item["label"][1, 0]) for item in dataset] == [0, 14, 19, 7, 14, 19]


def test_test_split_needs_no_labels(tmp_path: Path) -> None:
    _, labels = make_lip(tmp_path, "test")
    for path in labels:
        path.unlink()
    labels[0].parent.rmdir()
    dataset = LIP(tmp_path, "test", require_labels=False)
    assert [item["name"] for item in dataset] == ["test_100", "test_101", "test_102"]
    assert all((item["label"] == IGNORE_INDEX).all() for item in dataset)
    assert error_of(lambda: LIP(tmp_path, "test")) == (
        f"{tmp_path}/test_segmentations: no such folder, expected the labels, *.png"
    )


@every_listed_layout
@pytest.mark.parametrize("suffix", [".jpeg", ".png"])
def test_listed_images_may_have_other_endings(
    tmp_path: Path, make: Maker, reader: Reader, name_list: str, suffix: str
) -> None:
    images, _ = make(tmp_path)
    images[1].unlink()
    save(picture(9), images[1].with_suffix(suffix))
    dataset = reader(tmp_path, "train")
    assert [file.image for file in dataset.images] == [images[0], images[1].with_suffix(suffix), images[2]]
    assert dataset[1]["name"] == images[1].stem and check_dataset(dataset) == []


@every_listed_layout
def test_items_come_in_the_order_of_the_list(tmp_path: Path, make: Maker, reader: Reader, name_list: str) -> None:
    images, _ = make(tmp_path)
    (tmp_path / name_list).write_text(f"\n {images[2].stem}  \r\n\n{images[0].stem}")
    assert [item["name"] for item in reader(tmp_path, "train")] == [images[2].stem, images[0].stem]


def test_grey_images_are_read_as_rgb(tmp_path: Path) -> None:
    images, _ = make_ade20k(tmp_path)
    picture(5).convert("L").save(images[0])
    image = ADE20K(tmp_path, "train")[0]["image"]
    assert image.shape == (3, HEIGHT, WIDTH) and torch.equal(image[0], image[2])


# What is wrong with the folders


def test_missing_root_is_named(tmp_path: Path) -> None:
    root = tmp_path / "nowhere"
    assert error_of(lambda: Cityscapes(root, "train")) == (
        f"{root}: no such folder, expected the Cityscapes folder with leftImg8bit/ and gtFine/"
    )
    assert error_of(lambda: ADE20K(root, "train")) == (
        f"{root}: no such folder, expected the ADEChallengeData2016 folder with images/ and annotations/"
    )
    assert error_of(lambda: VOCSegmentation(root, "train")) == (
        f"{root}: no such folder, expected the VOC2012 folder with JPEGImages/, SegmentationClass/ "
        "and ImageSets/Segmentation/"
    )
    assert error_of(lambda: LIP(root, "train")) == (
        f"{root}: no such folder, expected the folder with train_images/, train_segmentations/ and train_id.txt"
    )


def test_missing_split_is_named(tmp_path: Path) -> None:
    make_cityscapes(tmp_path / "c")
    make_ade20k(tmp_path / "a")
    make_voc(tmp_path / "v")
    make_lip(tmp_path / "l")
    assert error_of(lambda: Cityscapes(tmp_path / "c", "val")) == (
        f"{tmp_path}/c/leftImg8bit/val: no such folder, expected one folder for each city with files *_leftImg8bit.png"
    )
    assert error_of(lambda: ADE20K(tmp_path / "a", "val")) == (
        f"{tmp_path}/a/images/validation: no such folder, expected the images, *.jpg"
    )
    assert error_of(lambda: VOCSegmentation(tmp_path / "v", "val")) == (
        f"{tmp_path}/v/ImageSets/Segmentation/val.txt: no such file, "
        "expected the names of the split's images, one a line"
    )
    for split in ("val", "trainval"):
        assert error_of(lambda split=split: LIP(tmp_path / "l", split)) == (
            f"{tmp_path}/l/val_images: no such folder, expected the images, *.jpg"
        )
    (tmp_path / "l" / "val_images").mkdir()
    assert error_of(lambda: LIP(tmp_path / "l", "val", require_labels=False)) == (
        f"{tmp_path}/l/val_id.txt: no such file, expected the names of the split's images, one a line"
    )


def test_missing_label_folder_is_named(tmp_path: Path) -> None:
    save(picture(), tmp_path / "leftImg8bit/train/aachen/aachen_0_0_leftImg8bit.png")
    assert error_of(lambda: Cityscapes(tmp_path, "train")) == (
        f"{tmp_path}/gtFine/train: no such folder, expected one folder for each city with files *_gtFine_labelIds.png"
    )


def test_folder_without_images_is_named(tmp_path: Path) -> None:
    for folder in ("leftImg8bit/train", "gtFine/train", "images/training", "annotations/training", "JPEGImages"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    names = tmp_path / "ImageSets/Segmentation/train.txt"
    names.write_text("\n")
    assert error_of(lambda: Cityscapes(tmp_path, "train")) == (
        f"{tmp_path}/leftImg8bit/train: no images found, expected <city>/*_leftImg8bit.png"
    )
    assert error_of(lambda: ADE20K(tmp_path, "train")) == f"{tmp_path}/images/training: no images found, expected *.jpg"
    assert error_of(lambda: VOCSegmentation(tmp_path, "train")) == (
        f"{names}: no images found, expected the names of the split's images, one a line"
    )
    for folder in ("train_images", "train_segmentations"):
        (tmp_path / folder).mkdir()
    (tmp_path / "train_id.txt").touch()
    assert error_of(lambda: LIP(tmp_path, "train")) == (
        f"{tmp_path}/train_id.txt: no images found, expected the names of the split's images, one a line"
    )


@every_listed_layout
def test_list_that_names_a_missing_image(tmp_path: Path, make: Maker, reader: Reader, name_list: str) -> None:
    images, labels = make(tmp_path)
    images[1].unlink()
    assert error_of(lambda: reader(tmp_path, "train")) == (
        f"{images[1]}: no such file, but {tmp_path / name_list} names it"
    )
    images[2].unlink()
    labels[0].unlink()
    dataset = reader(tmp_path, "train", require_labels=False)
    assert len(dataset) == 3 and error_of(lambda: dataset[1]) == f"{images[1]}: no such file"
    assert check_dataset(dataset) == [
        f"{images[0]}: no label file",
        f"{images[1]}: no such file",
        f"{images[2]}: no such file",
    ]


@every_listed_layout
def test_list_that_is_no_text(tmp_path: Path, make: Maker, reader: Reader, name_list: str) -> None:
    make(tmp_path)
    (tmp_path / name_list).write_bytes(b"\xff\xd8\xff\xe0")
    assert error_of(lambda: reader(tmp_path, "train")) == (
        f"{tmp_path / name_list}: not a text file, expected the names of the split's images, one a line"
    )


@every_layout
def test_image_without_label_file(tmp_path: Path, make: Maker, reader: Reader, classes: list[int]) -> None:
    images, labels = make(tmp_path)
    labels[1].unlink()
    assert error_of(lambda: reader(tmp_path, "train")) == f"{images[1]}: no label file, expected {labels[1]}"
    labels[2].unlink()
    assert error_of(lambda: reader(tmp_path, "train")) == (
        f"{images[1]}: no label file, expected {labels[1]} (1 more images have none)"
    )
    unlabelled = reader(tmp_path, "train", require_labels=False)
    assert torch.equal(unlabelled[1]["label"], torch.full((HEIGHT, WIDTH), IGNORE_INDEX))
    assert check_dataset(unlabelled) == [f"{images[1]}: no label file", f"{images[2]}: no label file"]


# What is wrong with the files


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@every_layout
@pytest.mark.parametrize("damage", [truncate, lambda path: path.write_bytes(b""), lambda path: path.write_text("no")])
@pytest.mark.parametrize("which", ["image", "label"])
def test_unreadable_file_is_named(
    tmp_path: Path, make: Maker, reader: Reader, classes: list[int], damage: Callable[[Path], object], which: str
) -> None:
    images, labels = make(tmp_path)
    path = (images if which == "image" else labels)[1]
    damage(path)
    dataset = reader(tmp_path, "train")
    text = f"{path}: cannot be read, truncated or not an image; replace the file"
    assert error_of(lambda: dataset[1]) == text
    assert check_dataset(dataset) == [text]


@pytest.mark.parametrize("keep", range(1, 60, 7))
def test_png_cut_anywhere_is_a_data_error(tmp_path: Path, keep: int) -> None:
    images, _ = make_cityscapes(tmp_path)
    images[0].write_bytes(images[0].read_bytes()[:keep])
    assert error_of(lambda: Cityscapes(tmp_path, "train")[0]).startswith(f"{images[0]}: cannot be read")


@every_layout
def test_label_of_another_size(tmp_path: Path, make: Maker, reader: Reader, classes: list[int]) -> None:
    images, labels = make(tmp_path)
    save(label_image(7, height=WIDTH, width=HEIGHT), labels[0])
    dataset: FolderSegmentation = reader(tmp_path, "train")
    assert error_of(lambda: dataset[0]) == (
        f"{labels[0]}: label is 6x10 pixels (width x height), its image {images[0].name} is 10x6"
    )


@pytest.mark.parametrize(
    ("make", "reader", "value", "expected"),
    [
        (make_cityscapes, Cityscapes, 34, "0-33, 255"),
        (make_ade20k, ADE20K, 151, "0-150, 255"),
        (make_voc, VOCSegmentation, 21, "0-20, 255"),
        (make_lip, LIP, 20, "0-19, 255"),
    ],
)
def test_label_value_outside_the_range(tmp_path: Path, make: Maker, reader: Reader, value: int, expected: str) -> None:
    _, labels = make(tmp_path)
    save(label_image(value), labels[2])
    dataset = reader(tmp_path, "train")
    assert (
        error_of(lambda: dataset[2]) == f"{labels[2]}: label value {value} outside the label space, expected {expected}"
    )


def test_several_wrong_label_values_are_listed_together(tmp_path: Path) -> None:
    _, labels = make_voc(tmp_path)
    save(Image.fromarray(np.arange(20, 80, dtype=np.uint8).reshape(HEIGHT, WIDTH)), labels[0])
    assert error_of(lambda: VOCSegmentation(tmp_path, "train")[0]) == (
        f"{labels[0]}: label values 21-79 outside the label space, expected 0-20, 255"
    )


def test_coloured_label_is_refused(tmp_path: Path) -> None:
    _, labels = make_cityscapes(tmp_path)
    save(picture(), labels[0])
    assert error_of(lambda: Cityscapes(tmp_path, "train")[0]) == (
        f"{labels[0]}: a label must be an 8-bit image of one channel (grey or palette), got mode RGB"
    )


def test_check_collects_all_problems_in_order(tmp_path: Path) -> None:
    images, labels = make_cityscapes(tmp_path)
    truncate(images[0])
    save(label_image(77), labels[1])
    labels[2].unlink()
    problems = check_dataset(Cityscapes(tmp_path, "train", require_labels=False))
    assert [problem.split(":")[0] for problem in problems] == [str(images[0]), str(labels[1]), str(images[2])]
