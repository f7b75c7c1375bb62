"""What every segmentation data set is: items, label space, transform; and reading one from pairs of files."""

from __future__ import annotations

import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from gingham.data.labels import IGNORE_INDEX, Colour, LabelSpace
from gingham.errors import DataError


class SegmentationItem(TypedDict):
    """One picture with its label.

    `image` is uint8 RGB [3, H, W] (float32 after a normalising transform), `label` int64 [H, W] with ignored pixels
    255, `name` unique within its split. `soft`, where a strategy has refined the labels, is uint8 [K, H, W]: the
    probabilities of the classes, times 255. `tags`, in data sets of image-level labels, is int64 [K - 1]: 1 for each
    class but the background that occurs in the picture.
    """

    image: torch.Tensor
    label: torch.Tensor
    name: str
    soft: NotRequired[torch.Tensor]
    tags: NotRequired[torch.Tensor]


Transform = Callable[[SegmentationItem], SegmentationItem]


class SegmentationDataset(Dataset[SegmentationItem], ABC):
    """A sized collection of `SegmentationItem`, with the classes that its labels stand for.

    Args:
        split: the name of the split.
        labels: the classes.
        transform: applied to each item on its way out, see `gingham.data.transforms`.
    """

    ignore_index = IGNORE_INDEX

    def __init__(self, split: str, labels: LabelSpace, transform: Transform | None = None) -> None:
        self.split = split
        self.labels = labels
        self.transform = transform
        #: A folder of soft labels (`write_soft_label`) that every item then brings along.
        self.soft_labels: Path | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.labels.names

    @property
    def palette(self) -> tuple[Colour, ...]:
        return self.labels.palette

    @property
    def num_classes(self) -> int:
        return self.labels.num_classes

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> SegmentationItem:
        """The item as it is stored, before any transform."""

    def read_label(self, index: int) -> torch.Tensor:
        """The label of an item as it is stored."""
        return self.read(index)["label"]

    def name_of(self, index: int) -> str:
        """The name of an item."""
        return self.read(index)["name"]

    def __getitem__(self, index: int) -> SegmentationItem:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} out of range for {len(self)} items")
        item = self.read(index % len(self))
        if self.soft_labels is not None:
            item["soft"] = read_soft_label(self.soft_labels / f"{item['name']}.npz", self.num_classes, item["label"])
        return item if self.transform is None else self.transform(item)

    def __iter__(self) -> Iterator[SegmentationItem]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class ImageFile:
    """An image, the file of its label or None, and the name of the pair."""

    image: Path
    label: Path | None
    name: str


class FolderSegmentation(SegmentationDataset):
    """Images and label images found on disk; the data sets of this package differ only in where they look.

    Args:
        root: the data set's folder.
        split: the name of the split.
        labels: the classes and the file values that stand for them.
        images: every image file with the label file that belongs to it, which need not exist.
        require_labels: whether an image without its label file is an error; if not, its label is 255 throughout, as
            suits the unlabelled test splits of the benchmarks.
        transform: applied to each item.

    Raises:
        DataError: an image has no label file although labels are required.
    """

    #: Whether an image without a label file is a defect of the data set.
    labels_expected = True

    def __init__(
        self,
        root: Path,
        split: str,
        labels: LabelSpace,
        images: Sequence[ImageFile],
        *,
        require_labels: bool,
        transform: Transform | None,
    ) -> None:
        super().__init__(split, labels, transform)
        self.root = root
        self.images = [
            file if file.label is not None and file.label.is_file() else ImageFile(file.image, None, file.name)
            for file in images
        ]
        if require_labels:
            for found, file in zip(self.images, images, strict=True):
                if found.label is None:
                    missing = sum(other.label is None for other in self.images)
                    more = f" ({missing - 1} more images have none)" if missing > 1 else ""
                    raise DataError(f"{file.image}: no label file, expected {file.label}{more}")

    def __len__(self) -> int:
        return len(self.images)

    def read_label(self, index: int) -> torch.Tensor:
        path = self.images[index].label
        return self.read(index)["label"] if path is None else self.labels.decode(read_label_values(path), path)

    def name_of(self, index: int) -> str:
        return self.images[index].name

    def read(self, index: int) -> SegmentationItem:
        file = self.images[index]
        image = read_image(file.image)
        height, width = image.shape[1:]
        if file.label is None:
            label = torch.full((height, width), IGNORE_INDEX, dtype=torch.int64)
        else:
            values = read_label_values(file.label)
            if values.shape != (height, width):
                raise DataError(
                    f"{file.label}: label is {values.shape[1]}x{values.shape[0]} pixels (width x height), "
                    f"its image {file.image.name} is {width}x{height}"
                )
            label = self.labels.decode(values, file.label)
        return {"image": image, "label": label, "name": file.name}


def read_image(path: Path) -> torch.Tensor:
    """Read any image file that Pillow knows as RGB, uint8 [3, H, W], as the file has it: EXIF turns nothing.

    Raises:
        DataError: the file is missing, truncated or no image, or has more than eight bits a channel.
    """
    with open_image(path) as image:
        if image.mode.startswith(("I", "F")):  # Pillow would clip the values
            raise DataError(f"{path}: has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits first")
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_label_values(path: Path) -> NDArray[np.uint8]:
    """Read the values of an 8-bit single-channel or palette image, uint8 [H, W].

    Raises:
        DataError: the file is missing, truncated, no image, or has several channels or more than eight bits.
    """
    with open_image(path) as image:
        if image.mode not in ("L", "P"):
            raise DataError(
                f"{path}: a label must be an 8-bit image of one channel (grey or palette), got mode {image.mode}"
            )
        return np.array(image)


def read_grey(path: Path) -> NDArray[np.uint8]:
    """Read an 8-bit grey image, uint8 [H, W].

    Raises:
        DataError: the file is missing, truncated, no image, or has colours or more than eight bits.
    """
    with open_image(path) as image:
        if image.mode != "L":
            raise DataError(f"{path}: expected an 8-bit grey image, got mode {image.mode}")
        return np.array(image)


def write_label(path: Path, label: torch.Tensor, labels: LabelSpace) -> None:
    """Write class indices [H, W] as a label image of the data set's own values, in the colours of the classes.

    A file of that name is replaced as a whole, never in part.
    """
    palette = np.zeros((256, 3), np.uint8)
    palette[list(labels.values)] = labels.palette
    image = Image.fromarray(labels.encode(label))
    image.putpalette(palette.tobytes())
    part = path.with_name(f".part-{path.name}")
    image.save(part)
    part.replace(path)


def write_soft_label(path: Path, probabilities: torch.Tensor) -> None:
    """Write class probabilities [K, H, W], rounded to 255 levels, as a compressed NumPy archive.

    A file of that name is replaced as a whole, never in part.
    """
    part = path.with_name(f".part-{path.name}")
    np.savez_compressed(part, soft=(255 * probabilities).round().to(torch.uint8).numpy())
    part.replace(path)


def read_soft_label(path: Path, num_classes: int, label: torch.Tensor) -> torch.Tensor:
    """Read what `write_soft_label` wrote, uint8 [K, H, W].

    Raises:
        DataError: the file is missing or damaged, or does not fit the classes or the label [H, W].
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            soft = torch.from_numpy(archive["soft"])
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, expected the refined label of an image") from None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as a refined label; delete it and refine anew") from error
    if soft.shape != (num_classes, *label.shape):
        raise DataError(f"{path}: refined label is {list(soft.shape)}, expected {[num_classes, *label.shape]}")
    return soft


def open_image(path: Path) -> Image.Image:
    """Open and decode an image file of any mode, so that every defect of the file shows here.

    Raises:
        DataError: the file is missing, truncated or no image.
    """
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: {error}") from error
    # Pillow reports a damaged PNG as SyntaxError or ValueError, depending on which chunk is hit.
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: cannot be read, truncated or not an image; replace the file") from error
    return image


def require_folder(path: Path, contents: str) -> Path:
    """Return `path` if it is a folder.

    Args:
        path: the folder.
        contents: what it should hold, for the error text.

    Raises:
        DataError: there is no such folder.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such folder, expected {contents}")
    return path
