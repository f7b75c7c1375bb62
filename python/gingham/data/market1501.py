"""Market-1501 and DukeMTMC-reID, whose file names say who is seen by which camera, and others in their layout."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import Tensor

from gingham.data.name_list import IMAGE_SUFFIXES
from gingham.data.reid import DISTRACTOR, JUNK, PersonDataset, PixelTransform, check_published, check_queries, hold_back
from gingham.data.segmentation import read_image
from gingham.errors import DataError

_FOLDERS = {"query": "query", "gallery": "bounding_box_test"}  # all else is in the training folder
_NAME = re.compile(r"(-1|\d+)_c(\d+)")


class _NamedImages(PersonDataset):
    """Images in ``bounding_box_train``, ``query`` and ``bounding_box_test``, named as ``0002_c1s1_000451_03.jpg``."""

    #: The folder that the published archive makes.
    archive: ClassVar[str]
    #: Of each folder of the published set: how many images and persons (junk and distractors are none).
    published: ClassVar[dict[str, dict[str, int]]]

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        validation_persons: int = 0,
        complete: bool = True,
        keep_junk: bool = False,
        transform: PixelTransform | None = None,
    ) -> None:
        home = Path(root) / self.archive if (Path(root) / self.archive).is_dir() else Path(root)
        folder = home / _FOLDERS.get(split, "bounding_box_train")
        files, ids, cameras = _named(folder)
        training = split not in _FOLDERS
        kept = np.flatnonzero(ids > DISTRACTOR if training else ids > JUNK)
        if split == "query":
            check_queries(str(folder), ids)
        if complete:
            found = {"images": len(kept), "persons": len(np.unique(ids[ids > DISTRACTOR]))}
            check_published(str(folder), found, self.published[folder.name])
        if training:
            kept = kept[hold_back(ids[kept], cameras[kept], validation_persons).get(split, [])]
        elif keep_junk:
            kept = np.arange(len(ids))
        self.files = [files[index] for index in kept]
        super().__init__(split, ids[kept], cameras[kept], [file.stem for file in self.files], transform)

    def read(self, index: int) -> Tensor:
        return read_image(self.files[index])


def _named(folder: Path) -> tuple[list[Path], np.ndarray, np.ndarray]:
    """The images of a folder in the order of their names, with their persons and their cameras from 0."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, expected the images of a split")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise DataError(f"{folder}: no images found (looked for {', '.join(IMAGE_SUFFIXES)})")
    matches = [_NAME.match(file.name) for file in files]
    for file, match in zip(files, matches, strict=True):
        if match is None or int(match[2]) == 0:
            raise DataError(
                f"{file}: the name does not say who is seen by which camera, as 0002_c1s1_000451_03.jpg does"
            )
    for one, other in pairwise(files):
        if one.stem == other.stem:
            raise DataError(f"{other}: there is {one.name} of the same name beside it, one of the two has to go")
    pairs = np.array([(int(match[1]), int(match[2]) - 1) for match in matches if match], np.int64)
    return files, pairs[:, 0], pairs[:, 1]


class Market1501(_NamedImages):
    """Market-1501 from its folder, or any data set in its layout.

    Args:
        root: the folder of ``bounding_box_train``, ``query`` and ``bounding_box_test``, or the folder above it where
            that is called ``Market-1501-v15.09.15``.
        split: "train", "query" or "gallery"; "val_query" and "val_gallery" are of the persons who are held back.
        validation_persons: how many persons of the training are held back, see `gingham.data.reid.hold_back`.
        complete: whether it has to be the whole published data set; if not, the images are not counted.
        keep_junk: keep the gallery's images of nobody, person -1, which count for nothing.
        transform: applied to the pixels of each item.

    Raises:
        DataError: a folder is missing or empty, a name is none of the layout's, or the counts are not the published.
        ValueError: another split, or `validation_persons` outside its range.

    Source: Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015.
    """

    archive = "Market-1501-v15.09.15"
    published: ClassVar = {
        "bounding_box_train": {"images": 12936, "persons": 751},
        "query": {"images": 3368, "persons": 750},
        "bounding_box_test": {"images": 15913, "persons": 750},
    }


class DukeMTMCReID(_NamedImages):
    """DukeMTMC-reID from its folder. Its owner has withdrawn it; it cannot be downloaded.

    Args:
        root: the folder of ``bounding_box_train``, ``query`` and ``bounding_box_test``, or the folder above it where
            that is called ``DukeMTMC-reID``.
        split: "train", "query" or "gallery"; "val_query" and "val_gallery" are of the persons who are held back.
        validation_persons: how many persons of the training are held back, see `gingham.data.reid.hold_back`.
        complete: whether it has to be the whole published data set; if not, the images are not counted.
        keep_junk: as in `Market1501`; this data set has none.
        transform: applied to the pixels of each item.

    Raises:
        DataError: a folder is missing or empty, a name is none of the layout's, or the counts are not the published.
        ValueError: another split, or `validation_persons` outside its range.

    Source: Zheng et al., Unlabeled Samples Generated by GAN Improve the Person Re-identification Baseline in vitro,
        https://arxiv.org/abs/1701.07717.
    """

    archive = "DukeMTMC-reID"
    published: ClassVar = {
        "bounding_box_train": {"images": 16522, "persons": 702},
        "query": {"images": 2228, "persons": 702},
        "bounding_box_test": {"images": 17661, "persons": 1110},
    }
