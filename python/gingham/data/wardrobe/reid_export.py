"""Persons of the world written to disk as Market-1501 and as MARS, so that methods train through the same readers.

Pictures are written as PNG, although the layouts have JPEG, which would change their pixels. The persons of validation
go among those of training: the reader holds them back, since their numbers are the highest. It yields the same items in
the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from gingham.data.wardrobe.persons import PersonImages
from gingham.data.wardrobe.tracklets import Tracklets

_FOLDERS = {"query": "query", "gallery": "bounding_box_test"}


def write_market1501(root: str | Path, persons: PersonImages) -> None:
    """Write a split in the layout that `gingham.data.market1501.Market1501` reads.

    Args:
        root: the folder to hold ``bounding_box_train``, ``query`` and ``bounding_box_test``, made where missing. What
            else is in it stays.
        persons: what to write.

    Example:
        >>> import tempfile
        >>> from gingham.data.market1501 import Market1501
        >>> with tempfile.TemporaryDirectory() as root:
        ...     write_market1501(root, PersonImages("query", 1))
        ...     Market1501(root, "query", complete=False).names
        ('6001_c1s1_000001_00', '6001_c2s1_000001_00')
    """
    folder = Path(root) / _FOLDERS.get(persons.split, "bounding_box_train")
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(persons.names):
        _save(folder / f"{name}.png", persons.read(index))


def write_mars(root: str | Path, splits: Sequence[Tracklets]) -> None:
    """Write splits in the layout that `gingham.data.mars.MARS` reads; its tables are of all of them.

    Args:
        root: the folder to hold ``bbox_train``, ``bbox_test`` and ``info``, made where missing.
        splits: what to write, with "query" and "gallery" among them.

    Example:
        >>> import tempfile
        >>> from gingham.data.mars import MARS
        >>> with tempfile.TemporaryDirectory() as root:
        ...     write_mars(root, [Tracklets(split, 1, frames=2) for split in ("train", "query", "gallery")])
        ...     MARS(root, "gallery", complete=False).names
        ('6001C1T0002', '6001C2T0002')
    """
    from scipy.io import savemat

    info = Path(root) / "info"
    info.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        chosen = [one for one in splits if (one.split in _FOLDERS) == (part == "test")]
        places = sorted(
            (name, one, index) for one in range(len(chosen)) for index, name in enumerate(chosen[one].names)
        )
        frames: list[str] = []
        table, query = [], []
        for row, (name, one, index) in enumerate(places, 1):
            tracklets = chosen[one]
            folder = Path(root) / f"bbox_{part}" / name[:4]
            folder.mkdir(parents=True, exist_ok=True)
            first = len(frames) + 1
            for number, frame in enumerate(tracklets.read(index), 1):
                frames.append(f"{name}F{number:03d}.png")
                _save(folder / frames[-1], frame)
            table.append([first, len(frames), tracklets.person_ids[index], tracklets.cameras[index] + 1])
            if tracklets.split == "query":
                query.append(row)
        (info / f"{part}_name.txt").write_text("".join(f"{name}\n" for name in frames), encoding="utf-8")
        savemat(info / f"tracks_{part}_info.mat", {f"track_{part}_info": np.array(table, np.float64).reshape(-1, 4)})
        if part == "test":
            savemat(info / "query_IDX.mat", {"query_IDX": np.array([query], np.float64)})


def _save(file: Path, image: Tensor) -> None:
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
