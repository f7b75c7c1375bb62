"""CIFAR-10 and CIFAR-100 in their binary version, which holds pictures and labels and no code.

The Python version of these data sets is pickled, and to unpickle a file is to run what is in it. The binary version
comes from the same page, as ``cifar-10-binary.tar.gz`` and ``cifar-100-binary.tar.gz``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from gingham.data.classification import StoredImages, Transform
from gingham.data.name_list import read_names
from gingham.data.segmentation import require_folder
from gingham.errors import DataError

_PIXELS = 3 * 32 * 32
_FILES = {
    ("cifar-10-batches-bin", "train"): tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    ("cifar-10-batches-bin", "test"): ("test_batch.bin",),
    ("cifar-100-binary", "train"): ("train.bin",),
    ("cifar-100-binary", "test"): ("test.bin",),
}


class CIFAR(StoredImages):
    """Pictures of 32x32 pixels of 10 or of 100 classes.

    Args:
        root: the folder that holds ``cifar-10-batches-bin`` or ``cifar-100-binary``, or that folder itself.
        split: "train" (50,000 pictures) or "test" (10,000).
        classes: 10, or 100 (the fine labels).
        transform: applied to each item.

    Raises:
        ValueError: another split or number of classes.
        DataError: a file is missing or is not of this data set.
    """

    def __init__(
        self, root: str | Path, split: str = "train", *, classes: int = 10, transform: Transform | None = None
    ) -> None:
        if classes not in (10, 100):
            raise ValueError(f"classes must be 10 or 100, got {classes}")
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        name, names_file, labels = {
            10: ("cifar-10-batches-bin", "batches.meta.txt", 1),
            100: ("cifar-100-binary", "fine_label_names.txt", 2),
        }[classes]
        folder = Path(root) if Path(root).name == name else Path(root) / name
        self.folder = require_folder(folder, f"the binary version of CIFAR-{classes}")
        names = read_names(folder / names_file)
        if len(names) != classes:
            raise DataError(f"{folder / names_file}: {len(names)} names, expected {classes}")
        records = np.concatenate([_records(folder / file, labels) for file in _FILES[name, split]])
        targets = torch.from_numpy(records[:, labels - 1].astype(np.int64))
        if len(targets) and int(targets.max()) >= classes:
            raise DataError(f"{folder}: a label of {int(targets.max())}, expected 0 to {classes - 1}")
        images = torch.from_numpy(records[:, labels:].reshape(-1, 3, 32, 32))
        super().__init__(split, names, images, targets, transform)


def _records(path: Path, labels: int) -> NDArray[np.uint8]:
    try:
        content = np.fromfile(path, np.uint8)
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"{path}: no such file, expected pictures of the binary version") from None
    if not len(content) or len(content) % (labels + _PIXELS):
        raise DataError(
            f"{path}: {len(content)} bytes are no whole number of pictures of {labels + _PIXELS} bytes; "
            "take the binary version, whole"
        )
    return content.reshape(-1, labels + _PIXELS)
