"""Pictures in one folder a class, as ImageNet is: ``train/n01440764/n01440764_10026.JPEG``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from gingham.data.classification import ClassificationDataset, Transform
from gingham.data.segmentation import read_image, require_folder
from gingham.errors import DataError


def class_folders(folder: Path) -> tuple[str, ...]:
    """The names of the folders in a split's folder, sorted.

    Raises:
        DataError: there is no such folder, or none in it.
    """
    found = sorted(
        entry.name for entry in require_folder(folder, "one folder for each class").iterdir() if entry.is_dir()
    )
    if not found:
        raise DataError(f"{folder}: no folders in it, expected one for each class")
    return tuple(found)


class ImageFolder(ClassificationDataset):
    """Pictures whose class is the name of their folder; classes are numbered in the order of the names.

    Args:
        root: the folder of the splits.
        split: the folder in it that holds the folders of the classes.
        class_names: the classes in the order of their labels, where that is not the one of the folders' names, or where
            some have no folder in this split.
        transform: applied to each item.

    Raises:
        DataError: a folder is missing, has no pictures, or is of no known class.

    Source: torchvision's ImageFolder, which finds the same files in the same order.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        class_names: Sequence[str] | None = None,
        transform: Transform | None = None,
    ) -> None:
        folder = Path(root) / split
        found = class_folders(folder)
        names = found if class_names is None else tuple(class_names)
        if strangers := sorted(set(found) - set(names)):
            raise DataError(f"{folder / strangers[0]}: no class of this data set, which has {len(names)}")
        numbers = {name: number for number, name in enumerate(names) if name in found}
        try:
            samples = make_dataset(str(folder), numbers, IMG_EXTENSIONS)
        except FileNotFoundError as error:
            raise DataError(f"{folder}: {str(error).split(' Supported')[0]}") from None
        super().__init__(split, names, torch.tensor([label for _, label in samples]), transform)
        self.folder = folder
        beginning = len(str(folder)) + 1
        #: Of the files, from the folder of the split on.
        self.names = [file[beginning:] for file, _ in samples]

    def image(self, index: int) -> torch.Tensor:
        return read_image(self.folder / self.names[index])

    def name(self, index: int) -> str:
        return self.names[index]
