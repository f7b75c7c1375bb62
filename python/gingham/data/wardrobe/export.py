"""Scenes written to disk in the published layouts, so that methods train on them through the readers of users' data.

Pictures are written as PNG even where the layout has JPEG, which would change their pixels; the readers take both.
Labels are written as the file values of the data set's label space. Given that label space, the reader of the layout
yields the same items in the same order.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from gingham.data.cityscapes import IMAGE_SUFFIX, LABEL_SUFFIX
from gingham.data.image_tags import tags_of, write_tags
from gingham.data.labels import LabelSpace
from gingham.data.name_list import IMAGE_SUFFIXES, read_names
from gingham.data.segmentation import SegmentationDataset, SegmentationItem
from gingham.data.voc import name_list_of
from gingham.errors import DataError

_CITY = "wardrobe"


def write_cityscapes(root: str | Path, scenes: SegmentationDataset) -> None:
    """Write a split in the layout that `gingham.data.cityscapes.Cityscapes` reads.

    Args:
        root: the folder to hold ``leftImg8bit`` and ``gtFine``, made where missing. Other splits in it stay.
        scenes: what to write.

    Raises:
        DataError: the split's folder holds images that are not of these scenes.

    Example:
        >>> import tempfile
        >>> from gingham.data import Cityscapes, CueScenes
        >>> with tempfile.TemporaryDirectory() as root:
        ...     write_cityscapes(root, CueScenes("val", 2))
        ...     [item["name"] for item in Cityscapes(root, "val")]
        ['wardrobe_val_000000', 'wardrobe_val_000001']
    """
    images = Path(root) / "leftImg8bit" / scenes.split / _CITY
    labels = Path(root) / "gtFine" / scenes.split / _CITY
    items = _read_all(scenes)
    _refuse_others(images, (IMAGE_SUFFIX,), {item["name"] + IMAGE_SUFFIX for item in items})
    _write_pairs(items, scenes.labels, images, labels, IMAGE_SUFFIX, LABEL_SUFFIX)


def write_lip(root: str | Path, scenes: SegmentationDataset) -> None:
    """Write a split in the layout that `gingham.data.lip.LIP` reads.

    Args:
        root: the folder to hold ``<split>_images``, ``<split>_segmentations`` and ``<split>_id.txt``, made where
            missing. Other splits in it stay.
        scenes: what to write.

    Raises:
        DataError: the split's folder holds images that are not of these scenes.

    Example:
        >>> import tempfile
        >>> from gingham.data.lip import LIP
        >>> from gingham.data.wardrobe.dolls import DOLL_LABELS, Dolls
        >>> with tempfile.TemporaryDirectory() as root:
        ...     write_lip(root, Dolls("val", 2))
        ...     [item["name"] for item in LIP(root, "val", labels=DOLL_LABELS)]
        ['doll_val_000000', 'doll_val_000001']
    """
    images = Path(root) / f"{scenes.split}_images"
    labels = Path(root) / f"{scenes.split}_segmentations"
    items = _read_all(scenes)
    _refuse_others(images, IMAGE_SUFFIXES, {f"{item['name']}.png" for item in items})
    _write_pairs(items, scenes.labels, images, labels)
    _write_names(Path(root) / f"{scenes.split}_id.txt", items)


def write_voc(root: str | Path, scenes: SegmentationDataset) -> None:
    """Write a split in the layout that `gingham.data.voc.VOCSegmentation` reads.

    Args:
        root: the folder to hold ``JPEGImages``, ``SegmentationClass`` and ``ImageSets/Segmentation``, made where
            missing. Other splits in it stay.
        scenes: what to write.

    Raises:
        DataError: the split's list names other images, or that of another split one of these scenes: files would be
            overwritten.

    Example:
        >>> import tempfile
        >>> from gingham.data import CueScenes, VOCSegmentation
        >>> with tempfile.TemporaryDirectory() as root:
        ...     write_voc(root, CueScenes("val", 2))
        ...     [item["name"] for item in VOCSegmentation(root, "val", labels=CueScenes("val", 0).labels)]
        ['wardrobe_val_000000', 'wardrobe_val_000001']
    """
    _write_devkit(root, scenes, "")


def write_voc_tags(root: str | Path, scenes: SegmentationDataset) -> None:
    """Write a split in the layout that `gingham.data.voc.VOCImageTags` reads: `write_voc`, and the list with tags.

    Args:
        root: the folder, as there; the list is ``ImageSets/Segmentation/<split>_cls.txt``.
        scenes: what to write; tags are the classes in the masks.

    Raises:
        DataError: as there.

    Example:
        >>> import tempfile
        >>> from gingham.data import TagScenes, VOCImageTags
        >>> with tempfile.TemporaryDirectory() as root:
        ...     write_voc_tags(root, TagScenes("train", 1))
        ...     VOCImageTags(root, "train", labels=TagScenes("train", 0).labels)[0]["tags"]
        tensor([0, 0, 0, 1, 0])
    """
    write_voc(root, scenes)
    tags = {item["name"]: tags_of(item["label"]) for item in _read_all(scenes)}
    write_tags(name_list_of(Path(root), f"{scenes.split}_cls"), tags)


def write_pascal_context(root: str | Path, scenes: SegmentationDataset) -> None:
    """Write a split in the layout that `gingham.data.pascal_context.PascalContext` reads.

    Points are written by `gingham.data.points.write_points`.

    Args:
        root: the folder to hold ``JPEGImages``, ``SegmentationClassContext`` and ``ImageSets/SegmentationContext``,
            made where missing. Other splits in it stay.
        scenes: what to write.

    Raises:
        DataError: the split's list names other images, or that of another split one of these scenes: files would be
            overwritten.

    Example:
        >>> import tempfile
        >>> from gingham.data import PascalContext, PointScenes
        >>> with tempfile.TemporaryDirectory() as root:
        ...     write_pascal_context(root, PointScenes("val", 2))
        ...     [item["name"] for item in PascalContext(root, "val", labels=PointScenes("val", 0).labels)]
        ['wardrobe_val_000000', 'wardrobe_val_000001']
    """
    _write_devkit(root, scenes, "Context")


def _write_devkit(root: str | Path, scenes: SegmentationDataset, kind: str) -> None:
    images, labels = Path(root) / "JPEGImages", Path(root) / f"SegmentationClass{kind}"
    name_list = name_list_of(Path(root), scenes.split, kind)
    items = _read_all(scenes)
    names = {item["name"] for item in items}
    if name_list.is_file() and (strangers := set(read_names(name_list)) - names):
        raise DataError(
            f"{name_list}: names {len(strangers)} other images, such as {min(strangers)}; choose an empty folder"
        )
    for other in sorted(set(name_list.parent.glob("*.txt")) - {name_list}):  # the splits share the folder of images
        taken = names.intersection(other.read_text(encoding="utf-8").splitlines())
        if taken:
            raise DataError(f"{other}: names {min(taken)} too, which would be overwritten; choose an empty folder")
    _write_pairs(items, scenes.labels, images, labels)
    _write_names(name_list, items)


def _read_all(scenes: SegmentationDataset) -> list[SegmentationItem]:
    return [scenes.read(index) for index in range(len(scenes))]


def _refuse_others(folder: Path, suffixes: tuple[str, ...], ours: set[str]) -> None:
    """Refuse a folder with images that are not ours: a reader may take them for ours."""
    strangers = {path.name for suffix in suffixes for path in folder.glob(f"*{suffix}")} - ours
    if strangers:
        raise DataError(
            f"{folder}: holds {len(strangers)} other images, such as {min(strangers)}; choose an empty folder"
        )


def _write_pairs(
    items: list[SegmentationItem],
    space: LabelSpace,
    images: Path,
    labels: Path,
    image_suffix: str = ".png",
    label_suffix: str = ".png",
) -> None:
    images.mkdir(parents=True, exist_ok=True)
    labels.mkdir(parents=True, exist_ok=True)
    for item in items:
        Image.fromarray(item["image"].permute(1, 2, 0).numpy()).save(images / f"{item['name']}{image_suffix}")
        Image.fromarray(space.encode(item["label"])).save(labels / f"{item['name']}{label_suffix}")


def _write_names(path: Path, items: list[SegmentationItem]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{item['name']}\n" for item in items), encoding="utf-8")
