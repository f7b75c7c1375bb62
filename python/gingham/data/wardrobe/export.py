"""Scenes written to disk in the published layouts, so that methods train on them through the readers of users' data."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from gingham.data.cityscapes import IMAGE_SUFFIX, LABEL_SUFFIX
from gingham.data.segmentation import SegmentationDataset
from gingham.errors import DataError

_CITY = "wardrobe"


def write_cityscapes(root: str | Path, scenes: SegmentationDataset) -> None:
    """Write a split in the Cityscapes layout.

    Labels are written as the file values of the data set's label space. `gingham.data.cityscapes.Cityscapes` then
    yields the same items in the same order, given that label space for the names of the classes.

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
    items = [scenes.read(index) for index in range(len(scenes))]
    strangers = {path.name for path in images.glob(f"*{IMAGE_SUFFIX}")} - {
        item["name"] + IMAGE_SUFFIX for item in items
    }
    if strangers:
        raise DataError(
            f"{images}: holds {len(strangers)} other images, such as {min(strangers)}; choose an empty folder"
        )
    images.mkdir(parents=True, exist_ok=True)
    labels.mkdir(parents=True, exist_ok=True)
    for item in items:
        Image.fromarray(item["image"].permute(1, 2, 0).numpy()).save(images / f"{item['name']}{IMAGE_SUFFIX}")
        Image.fromarray(scenes.labels.encode(item["label"])).save(labels / f"{item['name']}{LABEL_SUFFIX}")
