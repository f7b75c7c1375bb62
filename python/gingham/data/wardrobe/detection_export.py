"""Scenes with boxes written to disk as COCO and as VOC, so that methods train on them through the same readers.

Pictures are written as PNG even where the layout has JPEG, which would change their pixels. The reader of the layout
yields the same items in the same order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PIL import Image

from gingham.data.detection import DetectionDataset, DetectionItem
from gingham.data.name_list import read_names
from gingham.errors import DataError


def write_coco(root: str | Path, scenes: DetectionDataset) -> None:
    """Write a split in the layout that `gingham.data.coco_detection.CocoDetection` reads.

    Args:
        root: the folder to hold ``annotations`` and a folder of pictures for the split, made where missing. Other
            splits in it stay; a file of this split's annotations is replaced.
        scenes: what to write.

    Example:
        >>> import tempfile
        >>> from gingham.data.coco_detection import CocoDetection
        >>> from gingham.data.wardrobe import LookAlikeScenes
        >>> with tempfile.TemporaryDirectory() as root:
        ...     write_coco(root, LookAlikeScenes("val", 2))
        ...     [item["name"] for item in map(CocoDetection(root, "val").read, range(2))]
        ['wardrobe_val_000000', 'wardrobe_val_000001']
    """
    root = Path(root)
    images: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    for item in _write_images(root / scenes.split, scenes):
        height, width = item["image"].shape[-2:]
        entry = {"id": item["image_id"], "file_name": f"{item['name']}.png", "width": width, "height": height}
        images.append(entry)
        for label, *box, area, ignored in item["truth"].tolist():
            notes.append(
                {
                    "id": len(notes) + 1,
                    "image_id": item["image_id"],
                    "category_id": int(label),
                    "bbox": box,
                    "area": area,
                    "iscrowd": int(ignored),
                }
            )
    categories = [{"id": label, "name": name} for label, name in enumerate(scenes.class_names, 1)]
    file = root / "annotations" / f"instances_{scenes.split}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"images": images, "annotations": notes, "categories": categories}) + "\n")


def write_voc_detection(root: str | Path, scenes: DetectionDataset) -> None:
    """Write a split in the layout that `gingham.data.voc_detection.VOCDetection` reads.

    Args:
        root: the folder to hold ``JPEGImages``, ``Annotations`` and ``ImageSets/Main``, made where missing. Other
            splits in it stay.
        scenes: what to write; its boxes have to be whole pixels.

    Raises:
        DataError: a box is not whole pixels, or the split's list names other images.

    Example:
        >>> import tempfile
        >>> from gingham.data.voc_detection import VOCDetection
        >>> from gingham.data.wardrobe import LookAlikeScenes
        >>> scenes = LookAlikeScenes("val", 2)
        >>> with tempfile.TemporaryDirectory() as root:
        ...     write_voc_detection(root, scenes)
        ...     VOCDetection(root, "val", class_names=scenes.class_names).read(1)["name"]
        'wardrobe_val_000001'
    """
    root = Path(root)
    name_list = root / "ImageSets" / "Main" / f"{scenes.split}.txt"
    names = [scenes.read(index)["name"] for index in range(len(scenes))]
    if name_list.is_file() and (strangers := set(read_names(name_list)) - set(names)):
        raise DataError(f"{name_list}: names other images, such as {min(strangers)}; choose an empty folder")
    annotations = root / "Annotations"
    annotations.mkdir(parents=True, exist_ok=True)
    for item in _write_images(root / "JPEGImages", scenes):
        tree = _annotation(item, scenes.class_names)
        ElementTree.indent(tree)
        tree.write(annotations / f"{item['name']}.xml")
    name_list.parent.mkdir(parents=True, exist_ok=True)
    name_list.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def _write_images(folder: Path, scenes: DetectionDataset) -> list[DetectionItem]:
    folder.mkdir(parents=True, exist_ok=True)
    items = [scenes.read(index) for index in range(len(scenes))]
    for item in items:
        Image.fromarray(item["image"].permute(1, 2, 0).numpy()).save(folder / f"{item['name']}.png")
    return items


def _annotation(item: DetectionItem, class_names: tuple[str, ...]) -> ElementTree.ElementTree[ElementTree.Element]:
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = f"{item['name']}.png"
    size = ElementTree.SubElement(root, "size")
    for name, value in zip(("depth", "height", "width"), item["image"].shape, strict=True):
        ElementTree.SubElement(size, name).text = str(value)
    for label, x, y, width, height, _, ignored in item["truth"].tolist():
        if not all(value.is_integer() for value in (x, y, width, height)):
            raise DataError(f"{item['name']}: a box of {width}x{height} pixels at {x}, {y} is not of whole pixels")
        entry = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(entry, "name").text = class_names[int(label) - 1]
        ElementTree.SubElement(entry, "difficult").text = str(int(ignored))
        box = ElementTree.SubElement(entry, "bndbox")
        edges = {"xmin": x + 1, "ymin": y + 1, "xmax": x + width, "ymax": y + height}  # 1-based, both ends included
        for name, value in edges.items():
            ElementTree.SubElement(box, name).text = str(int(value))
    return ElementTree.ElementTree(root)
