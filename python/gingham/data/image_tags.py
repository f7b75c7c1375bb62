"""Image-level labels: which classes occur in an image, and the lists that say so.

A line of a list is a name and the numbers of its object classes, counted from 0 without the background:
``2007_000032 0 14``. In masks, the number is the class index minus 1. A path that begins with a slash stands for the
name of its file, without folder and ending.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from gingham.data.labels import IGNORE_INDEX
from gingham.data.name_list import read_lines
from gingham.data.segmentation import SegmentationDataset
from gingham.errors import DataError


def tags_of(label: torch.Tensor) -> tuple[int, ...]:
    """The object classes that occur in a mask: its class indices minus 1, without background and ignored pixels.

    Args:
        label: class indices [H, W], the background 0.

    Example:
        >>> tags_of(torch.tensor([[0, 15, 255], [1, 15, 0]]))
        (0, 14)
    """
    return tuple(value - 1 for value in label.unique().tolist() if value not in (0, IGNORE_INDEX))


def tag_vector(tags: Iterable[int], count: int) -> torch.Tensor:
    """Tags as a vector: int64 [count], 1 for each class that occurs.

    Args:
        tags: numbers from 0.
        count: C, object classes.

    Example:
        >>> tag_vector((0, 2), 4)
        tensor([1, 0, 1, 0])
    """
    vector = torch.zeros(count, dtype=torch.int64)
    vector[list(tags)] = 1
    return vector


def read_tags(path: str | Path, count: int) -> dict[str, tuple[int, ...]]:
    """Read a list of names with their tags, in the order of the list.

    Args:
        path: the list.
        count: C, object classes.

    Returns:
        The tags of each name; a name may have none.

    Raises:
        DataError: no such list, a line that is no name with numbers from 0 to C - 1, or a name that stands twice.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_tags(f"{folder}/list.txt", {"2007_000032": (0, 14)})
        ...     read_tags(f"{folder}/list.txt", 20)
        {'2007_000032': (0, 14)}
    """
    path = Path(path)
    tags: dict[str, tuple[int, ...]] = {}
    for line in read_lines(path):
        name, *numbers = line.split()
        if name.startswith("/"):
            name = Path(name).stem
        if not all(number.isdecimal() and int(number) < count for number in numbers):
            raise DataError(f"{path}: line {line!r}, expected a name and class numbers from 0 to {count - 1}")
        if name in tags:
            raise DataError(f"{path}: names {name} twice")
        tags[name] = tuple(int(number) for number in numbers)
    return tags


def write_tags(path: str | Path, tags: Mapping[str, Iterable[int]]) -> None:
    """Write a list that `read_tags` reads.

    Args:
        path: the list; its folder is made where missing.
        tags: of each name.

    Raises:
        ValueError: a name that is empty or has blanks, which would end it.
    """
    for name in tags:
        if name.split() != [name]:
            raise ValueError(f"names must be without blanks, got {name!r}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [" ".join([name, *(str(number) for number in numbers)]) for name, numbers in tags.items()]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def tags_of_masks(dataset: SegmentationDataset) -> dict[str, tuple[int, ...]]:
    """The tags of every image of a data set, from its masks; the first class must be the background.

    Args:
        dataset: read without its transform.

    Example:
        >>> from gingham.data.wardrobe import CueScenes
        >>> tags_of_masks(CueScenes("val", 1))
        {'wardrobe_val_000000': (0, 1, 3, 5)}
    """
    items = (dataset.read(index) for index in range(len(dataset)))
    return {item["name"]: tags_of(item["label"]) for item in items}
