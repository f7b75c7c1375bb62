"""Scenes written in the layout of PASCAL-Context, so that its reader and the point files are used on the world too."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from gingham.data.segmentation import SegmentationDataset
from gingham.errors import DataError


def write_pascal_context(root: str | Path, scenes: SegmentationDataset) -> None:
    """Write a split in the layout that `gingham.data.pascal_context.PascalContext` reads.

    Images are written without loss, as PNG. Labels are written as the file values of the data set's label space; give
    that label space to the reader. Points are written by `gingham.data.points.write_points`.

    Args:
        root: the folder to hold ``JPEGImages``, ``SegmentationClassContext`` and ``ImageSets``, made where missing.
            Other splits in it stay.
        scenes: what to write.

    Raises:
        DataError: the split's list is there already and names other images.

    Example:
        >>> import tempfile
        >>> from gingham.data.pascal_context import PascalContext
        >>> from gingham.data.wardrobe.point_scenes import POINT_SCENE_LABELS, PointScenes
        >>> with tempfile.TemporaryDirectory() as root:
        ...     write_pascal_context(root, PointScenes("val", 2))
        ...     [item["name"] for item in PascalContext(root, "val", labels=POINT_SCENE_LABELS)]
        ['wardrobe_val_000000', 'wardrobe_val_000001']
    """
    root = Path(root)
    folders = images, labels, lists = (
        root / "JPEGImages",
        root / "SegmentationClassContext",
        root / "ImageSets" / "SegmentationContext",
    )
    items = [scenes.read(index) for index in range(len(scenes))]
    name_list = lists / f"{scenes.split}.txt"
    names = [item["name"] for item in items]
    if name_list.is_file() and (strangers := sorted(set(name_list.read_text().split()) - set(names))):
        raise DataError(
            f"{name_list}: names {len(strangers)} other images, such as {strangers[0]}; choose an empty folder"
        )
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for item in items:
        Image.fromarray(item["image"].permute(1, 2, 0).numpy()).save(images / f"{item['name']}.png")
        Image.fromarray(scenes.labels.encode(item["label"])).save(labels / f"{item['name']}.png")
    name_list.write_text("".join(f"{name}\n" for name in names))
