"""Re-identification in video: MARS, whose tables say what a tracklet is, and DukeMTMC-VideoReID, whose folders do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from gingham.data.name_list import IMAGE_SUFFIXES, read_names
from gingham.data.reid import (
    DISTRACTOR,
    JUNK,
    PixelTransform,
    TrackletDataset,
    check_published,
    check_queries,
    hold_back,
)
from gingham.data.segmentation import read_image
from gingham.errors import DataError

#: What the gallery of MARS is: without the queries and without junk, or all tracklets of the test.
MarsProtocol = Literal["torchreid", "official"]

_MARS_NAME = re.compile(r".{4}C\d+T\d+F\d+")
_DUKE_NAME = re.compile(r"-?\d+_?C(\d)_?F(\d+)")


def _read_frames(files: Sequence[Path], size: tuple[int, int] | None) -> Tensor:
    """Images as one tensor [T, 3, H, W], those of another size resized."""
    images = [read_image(file) for file in files]
    if size is not None:
        images = [
            x if tuple(x.shape[-2:]) == size else transforms.resize(x, list(size), antialias=True) for x in images
        ]
    for file, image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            raise DataError(
                f"{file}: {image.shape[2]}x{image.shape[1]} pixels (width x height), but {files[0].name} of the same "
                f"tracklet is {images[0].shape[2]}x{images[0].shape[1]}; give frame_size"
            )
    return torch.stack(images)


class MARS(TrackletDataset):
    """MARS from its folder, or any data set in its layout.

    Args:
        root: the folder of ``bbox_train``, ``bbox_test`` and ``info``, the last with the lists ``train_name.txt`` and
            ``test_name.txt`` and the tables ``tracks_train_info.mat``, ``tracks_test_info.mat`` and ``query_IDX.mat``.
        split: "train", "query" or "gallery"; "val_query" and "val_gallery" are of the persons who are held back.
        protocol: what the gallery is. "torchreid": tracklets that are no queries and no junk. "official": all of the
            test; junk, person -1, counts for nothing, and queries are matches for those of other cameras. The two give
            different numbers.
        validation_persons: how many persons of the training are held back, see `gingham.data.reid.hold_back`.
        complete: whether it has to be the whole published data set; if not, the tracklets are not counted.
        frame_size: rows and columns that frames of other sizes are resized to; None: those of a tracklet must be of one
            size.
        transform: applied to the pixels of each item.

    Raises:
        DataError: a file is missing or not what it should be, or the counts are not the published.
        ValueError: another split or protocol, or `validation_persons` outside its range.

    Source: Zheng et al., MARS: A Video Benchmark for Large-Scale Person Re-identification, ECCV 2016; "torchreid" is
        the protocol of https://github.com/KaiyangZhou/deep-person-reid.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        protocol: MarsProtocol = "torchreid",
        validation_persons: int = 0,
        complete: bool = True,
        frame_size: tuple[int, int] | None = None,
        transform: PixelTransform | None = None,
    ) -> None:
        if protocol not in get_args(MarsProtocol):
            raise ValueError(f"protocol must be 'torchreid' or 'official', got {protocol!r}")
        root = Path(root)
        part = "test" if split in ("query", "gallery") else "train"
        name_file = root / "info" / f"{part}_name.txt"
        names = read_names(name_file)
        table_file = root / "info" / f"tracks_{part}_info.mat"
        table = _table(table_file, f"track_{part}_info", len(names))
        _check_names(name_file, names, table_file, table)
        ids, cameras = table[:, 2], table[:, 3] - 1
        if part == "train":
            kept = np.flatnonzero(ids > DISTRACTOR)
            if complete:
                found = {"tracklets": len(kept), "persons": len(np.unique(ids[kept]))}
                check_published(str(table_file), found, {"tracklets": 8298, "persons": 625})
            kept = kept[hold_back(ids[kept], cameras[kept], validation_persons).get(split, [])]
        else:
            query_file = root / "info" / "query_IDX.mat"
            query = _query_rows(query_file, len(table))
            if complete:
                found = {"tracklets": len(table), "queries": len(query)}
                check_published(str(table_file), found, {"tracklets": 12180, "queries": 1980})
            if split == "query":
                check_queries(str(query_file), ids[query])
                kept = query
            elif protocol == "official":
                kept = np.arange(len(table))
            else:
                kept = np.setdiff1d(np.flatnonzero(ids > JUNK), query)
        self.protocol, self.frame_size = protocol, frame_size
        self._folder, self._names = root / f"bbox_{part}", names
        self._starts = table[kept, 0] - 1
        super().__init__(
            split,
            ids[kept],
            cameras[kept],
            [names[start].rpartition("F")[0] for start in self._starts],
            table[kept, 1] - self._starts,
            transform,
        )

    def frames_of(self, index: int, frame_numbers: Sequence[int] | NDArray[np.int64]) -> Tensor:
        start = int(self._starts[index])
        names = [self._names[start + int(number)] for number in frame_numbers]
        return _read_frames([self._folder / name[:4] / name for name in names], self.frame_size)


def _matrix(file: Path, variable: str) -> NDArray[Any]:
    """A numeric variable of a file of MATLAB."""
    from scipy.io import loadmat

    if not file.is_file():  # scipy would look for other endings
        raise DataError(f"{file}: no such file, expected the table {variable}")
    try:
        content = loadmat(file, variable_names=[variable])
    except Exception as error:  # scipy raises many types for files that are damaged or of another kind
        raise DataError(f"{file}: not a readable file of MATLAB (before 7.3) with the table {variable}") from error
    values = content.get(variable)
    if values is None or values.ndim != 2 or not np.issubdtype(values.dtype, np.number):
        raise DataError(f"{file}: has no numeric table {variable}")
    return np.asarray(values, np.int64)


def _table(file: Path, variable: str, frames: int) -> NDArray[np.int64]:
    """Rows of first frame, last frame, both counted from 1, person and camera, from 1."""
    table = _matrix(file, variable)
    if table.shape[1] != 4 or not len(table):
        raise DataError(f"{file}: {variable} must be [n, 4] with n >= 1, got {list(table.shape)}")
    wrong = np.flatnonzero(
        (table[:, 0] < 1)
        | (table[:, 1] < table[:, 0])
        | (table[:, 1] > frames)
        | (table[:, 2] < JUNK)
        | (table[:, 3] < 1)
    )
    if len(wrong):
        raise DataError(
            f"{file}: row {wrong[0] + 1} is {table[wrong[0]].tolist()}, expected the first and the last of the "
            f"{frames} listed frames, a person of -1 or more and a camera of 1 or more"
        )
    return table


def _check_names(name_file: Path, names: Sequence[str], table_file: Path, table: NDArray[np.int64]) -> None:
    """Raise a DataError where frames of a tracklet that is not junk differ in person or camera, or a name is none."""
    sights = np.array([name.partition("T")[0] for name in names])
    changes = np.append(0, np.cumsum(sights[1:] != sights[:-1]))
    for row in np.flatnonzero(table[:, 2] > JUNK):
        first, last = table[row, :2] - 1
        if _MARS_NAME.match(names[first]) is None:
            raise DataError(f"{name_file}: line {first + 1} is {names[first]}, expected a name as 0999C1T0001F002.jpg")
        if changes[first] != changes[last]:
            other = first + int(np.argmax(sights[first : last + 1] != sights[first]))
            raise DataError(
                f"{table_file}: row {row + 1} makes a tracklet of lines {first + 1} to {last + 1} of {name_file.name}, "
                f"but line {other + 1}, {names[other]}, is of another person or camera than {names[first]}"
            )


def _query_rows(file: Path, tracklets: int) -> NDArray[np.int64]:
    rows = _matrix(file, "query_IDX").ravel() - 1
    if ((rows < 0) | (rows >= tracklets)).any():
        raise DataError(f"{file}: query_IDX must be rows 1 to {tracklets} of the table of the test")
    return rows


class DukeMTMCVideoReID(TrackletDataset):
    """DukeMTMC-VideoReID from its folder. Its owner has withdrawn it; it cannot be downloaded.

    Args:
        root: the folder of ``train``, ``query`` and ``gallery``, in each of which ``<person>/<tracklet>/`` holds images
            named as ``0001_C6_F0099_X30823.jpg``, or without the underlines; or the folder above it where that is
            called ``DukeMTMC-VideoReID``. Frames are ordered by the number after F.
        split: "train", "query" or "gallery"; "val_query" and "val_gallery" are of the persons who are held back.
        validation_persons: how many persons of the training are held back, see `gingham.data.reid.hold_back`.
        complete: whether it has to be the whole published data set; if not, the tracklets of training and queries are
            not counted. Those of the gallery never are.
        frame_size: rows and columns that frames are resized to, since they are of all sizes; None: those of a tracklet
            must be of one size.
        transform: applied to the pixels of each item.

    Raises:
        DataError: a folder is missing or empty, a name is none of the layout's, or the counts are not the published.
        ValueError: another split, or `validation_persons` outside its range.

    Source: Wu et al., Exploit the Unknown Gradually: One-Shot Video-Based Person Re-Identification by Stepwise
        Learning, CVPR 2018.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        validation_persons: int = 0,
        complete: bool = True,
        frame_size: tuple[int, int] | None = (256, 128),
        transform: PixelTransform | None = None,
    ) -> None:
        archive = Path(root) / "DukeMTMC-VideoReID"
        folder = (archive if archive.is_dir() else Path(root)) / (split if split in ("query", "gallery") else "train")
        found = [_tracklet(tracklet) for person in _folders(folder) for tracklet in _folders(person)]
        ids = np.array([int(frames[0].parent.parent.name) for frames, _ in found], np.int64)
        cameras = np.array([camera for _, camera in found], np.int64)
        kept = np.arange(len(found))
        if complete and folder.name != "gallery":
            published = {"train": {"tracklets": 2196, "persons": 702}, "query": {"tracklets": 702, "persons": 702}}
            counts = {"tracklets": len(found), "persons": len(np.unique(ids))}
            check_published(str(folder), counts, published[folder.name])
        if folder.name == "train":
            kept = np.flatnonzero(ids > DISTRACTOR)
            kept = kept[hold_back(ids[kept], cameras[kept], validation_persons).get(split, [])]
        if split == "query":
            check_queries(str(folder), ids)
        self.frame_size = frame_size
        self._files = [found[index][0] for index in kept]
        names = [f"{files[0].parent.parent.name}_{files[0].parent.name}" for files in self._files]
        super().__init__(split, ids[kept], cameras[kept], names, [len(files) for files in self._files], transform)

    def frames_of(self, index: int, frame_numbers: Sequence[int] | NDArray[np.int64]) -> Tensor:
        return _read_frames([self._files[index][int(number)] for number in frame_numbers], self.frame_size)


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, expected a folder for each person with one for each tracklet")
    found = sorted(path for path in folder.iterdir() if path.is_dir())
    if not found:
        raise DataError(f"{folder}: no folders in it, expected <person>/<tracklet>/<image>")
    if strange := [path for path in found if not path.name.lstrip("-").isdigit()]:
        raise DataError(f"{strange[0]}: the name of the folder must be a number")
    return found


def _tracklet(folder: Path) -> tuple[list[Path], int]:
    """The images of a tracklet in the order of time, and its camera from 0."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise DataError(f"{folder}: no images found (looked for {', '.join(IMAGE_SUFFIXES)})")
    matches = {file: _DUKE_NAME.match(file.name) for file in files}
    times: dict[Path, tuple[int, int]] = {}
    for file, match in matches.items():
        if match is None:
            raise DataError(f"{file}: the name does not say camera and frame, as 0001_C6_F0099_X30823.jpg does")
        times[file] = int(match[2]), int(match[1]) - 1
    ordered = sorted(files, key=lambda file: (times[file][0], file.name))
    if len(cameras := {camera for _, camera in times.values()}) > 1:
        raise DataError(f"{folder}: a tracklet is from one camera, got images from {sorted(x + 1 for x in cameras)}")
    return ordered, cameras.pop()
