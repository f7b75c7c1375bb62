"""Fashion-MNIST: garments of ten categories, whole from its IDX files, or the part that comes with the package."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gingham.data.classification import StoredImages, Transform
from gingham.data.segmentation import require_folder
from gingham.data.wardrobe.assets import load_wardrobe
from gingham.data.wardrobe.garments import Category
from gingham.errors import DataError

#: Where the Debian package dataset-fashion-mnist puts its files.
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

CLASS_NAMES = tuple(category.name.lower().replace("_", "-") for category in Category)


class FashionMNIST(StoredImages):
    """Garments of 28x28 pixels, grey, of ten categories: 60,000 to train and 10,000 to test with.

    Args:
        root: the folder of ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and their likes that begin with
            ``t10k``, each also as ``.gz``.
        split: "train" or "test".
        transform: applied to each item.

    Raises:
        ValueError: another split.
        DataError: a file is missing, damaged, or not of this data set.
    """

    def __init__(
        self, root: str | Path = DEBIAN_FOLDER, split: str = "train", transform: Transform | None = None
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        folder = require_folder(Path(root), "the four IDX files of Fashion-MNIST")
        prefix = {"train": "train", "test": "t10k"}[split]
        images = read_idx(_file(folder, f"{prefix}-images-idx3-ubyte"))
        targets = read_idx(_file(folder, f"{prefix}-labels-idx1-ubyte"))
        if images.ndim != 3 or targets.shape != images.shape[:1]:
            raise DataError(
                f"{folder}: {prefix} has images {list(images.shape)} and labels {list(targets.shape)}, "
                "expected [N, 28, 28] and [N]"
            )
        if len(targets) and int(targets.max()) >= len(CLASS_NAMES):
            raise DataError(f"{folder}: a label of {int(targets.max())}, expected 0 to {len(CLASS_NAMES) - 1}")
        super().__init__(split, CLASS_NAMES, images, targets.to(torch.int64), transform)


class PackagedGarments(StoredImages):
    """The part of Fashion-MNIST that comes with the package: 240 garments of each category to train with, 60 others
    of the same file to validate and 100 of the test file.

    They are in turn of every category, so that the first of them are of all.

    Args:
        split: "train", "val" or "test".
        transform: applied to each item.

    Raises:
        ValueError: another split.

    Example:
        >>> garments = PackagedGarments("val")
        >>> len(garments), garments.class_names[garments[3]["label"]]
        (600, 'dress')
    """

    def __init__(self, split: str = "train", transform: Transform | None = None) -> None:
        garments = torch.from_numpy(load_wardrobe(split).garments.copy())  # [10, N, 28, 28]
        count = garments.shape[1]
        targets = torch.arange(len(CLASS_NAMES)).repeat(count)
        super().__init__(split, CLASS_NAMES, garments.transpose(0, 1).flatten(0, 1), targets, transform)


def _file(folder: Path, name: str) -> Path:
    packed = folder / f"{name}.gz"
    return packed if packed.is_file() else folder / name


def read_idx(path: str | Path) -> torch.Tensor:
    """Read an IDX file of unsigned bytes, plain or compressed by gzip.

    Args:
        path: the file; one ending in ``.gz`` is compressed.

    Returns:
        uint8 of the file's own shape.

    Raises:
        DataError: the file is missing, damaged, or of another kind.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     _ = file.write(bytes([0, 0, 8, 1, 0, 0, 0, 2, 5, 7]))
        ...     file.flush()
        ...     read_idx(file.name)
        tensor([5, 7], dtype=torch.uint8)
    """
    path = Path(path)
    try:
        raw: Any = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"{path}: no such file, expected an IDX file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be unpacked, truncated or no gzip file; replace it") from error
    dimensions = raw[3] if raw[:3] == b"\x00\x00\x08" and len(raw) > 3 else 0
    if not dimensions or len(raw) < 4 + 4 * dimensions:
        raise DataError(f"{path}: no IDX file of unsigned bytes")
    shape = [int(size) for size in np.frombuffer(raw, ">u4", dimensions, offset=4)]
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions)
    if len(values) != int(np.prod(shape)):
        raise DataError(f"{path}: {len(values)} values, its head promises {'x'.join(map(str, shape))}")
    return torch.from_numpy(values.reshape(shape).copy())
