"""What every re-identification data set is: images or tracklets of persons, seen by cameras.

A data set on disk has three splits: "train", whose persons are numbered anew from 0, and "query" and "gallery", whose
persons are those of the test. Where persons of the training are held back there are two more of these, "val_query" and
"val_gallery", so that nothing need be chosen by the test's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NotRequired, TypedDict, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import Dataset

from gingham.data.clips import ClipSampling, evaluation_clips, random_clip
from gingham.errors import DataError

#: The splits of a re-identification data set.
ReidSplit = Literal["train", "val_query", "val_gallery", "query", "gallery"]

#: Of the person of an item: on nobody's picture, but a detector's mistake that counts for nothing; and somebody in the
#: gallery whom no query asks for.
JUNK, DISTRACTOR = -1, 0


class PersonItem(TypedDict):
    """One picture of a person.

    `image` is uint8 RGB [3, H, W] (float32 after a transform). `person` is 0 to P - 1 in training and a number of the
    data set's in other splits, 0 being a distractor. `camera` counts from 0. `name` is unique in the split.
    """

    image: Tensor
    person: int
    camera: int
    name: str


class TrackletItem(TypedDict):
    """One person's pictures from one camera, in the order of time; all but these two as in `PersonItem`.

    `frames` is uint8 RGB [T, 3, H, W] (float32 after a transform). `occluded`, where it is known, is bool [T, H, W]:
    which pixels, before any transform, show something in front of the person.
    """

    frames: Tensor
    person: int
    camera: int
    name: str
    occluded: NotRequired[Tensor]


#: Changes pixels, uint8 RGB [..., 3, H, W]; the frames of a clip are all changed alike.
PixelTransform = Callable[[Tensor], Tensor]


class ReidDataset(Dataset[Any], ABC):
    """Persons seen by cameras; what one sighting is, an image or a tracklet, subclasses say.

    Args:
        split: one of `ReidSplit`.
        person_ids: [N], the data set's own numbers. In training they are replaced by their places among the sorted
            different ones; elsewhere they stay.
        cameras: [N], from 0.
        names: N names, unique.
        transform: applied to the pixels of each item on its way out.

    Raises:
        ValueError: another split, or lengths that differ.
    """

    def __init__(
        self,
        split: str,
        person_ids: ArrayLike,
        cameras: ArrayLike,
        names: Sequence[str],
        transform: PixelTransform | None = None,
    ) -> None:
        if split not in get_args(ReidSplit):
            raise ValueError(f"split must be one of {', '.join(get_args(ReidSplit))}, got {split!r}")
        self.split = split
        #: [N], the data set's own numbers of persons.
        self.person_ids = np.asarray(person_ids, np.int64)
        #: [N], the persons of the items.
        self.persons: NDArray[np.int64] = self.person_ids
        if split == "train":
            self.persons = np.unique(self.person_ids, return_inverse=True)[1].astype(np.int64)
        self.cameras: NDArray[np.int64] = np.asarray(cameras, np.int64)
        self.names = tuple(names)
        if not self.persons.shape == self.cameras.shape == (len(self.names),):
            raise ValueError(
                f"person_ids, cameras and names must be of one length, got {len(self.persons)}, {len(self.cameras)} "
                f"and {len(self.names)}"
            )
        self.transform = transform

    @property
    def num_persons(self) -> int:
        """How many persons there are, without distractors and junk."""
        persons = np.unique(self.persons)
        return len(persons) if self.split == "train" else int((persons > DISTRACTOR).sum())

    def __len__(self) -> int:
        return len(self.names)

    def _place(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} out of range for {len(self)} items")
        return int(index) % len(self)

    def _sighting(self, index: int) -> dict[str, Any]:
        """Whom an item shows, who sees it, and its name."""
        return {"person": int(self.persons[index]), "camera": int(self.cameras[index]), "name": self.names[index]}

    def _transformed(self, pixels: Tensor) -> Tensor:
        return pixels if self.transform is None else self.transform(pixels)

    @abstractmethod
    def picture(self, index: int) -> Tensor:
        """What people are shown of an item, uint8 RGB [3, H, W]."""

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))


class PersonDataset(ReidDataset):
    """A sized collection of `PersonItem`."""

    @abstractmethod
    def read(self, index: int) -> Tensor:
        """The picture as it is stored, uint8 RGB [3, H, W]."""

    def picture(self, index: int) -> Tensor:
        return self.read(index)

    def __getitem__(self, index: int) -> PersonItem:
        place = self._place(index)
        item: Any = {"image": self._transformed(self.read(place)), **self._sighting(place)}
        return item


class TrackletDataset(ReidDataset):
    """A sized collection of `TrackletItem`; `lengths`, int64 [N], are the frames of each.

    Args:
        split: as in `ReidDataset`.
        person_ids: as there.
        cameras: as there.
        names: as there.
        lengths: [N], 1 or more.
        transform: as there.

    Raises:
        ValueError: as there.
    """

    def __init__(
        self,
        split: str,
        person_ids: ArrayLike,
        cameras: ArrayLike,
        names: Sequence[str],
        lengths: ArrayLike,
        transform: PixelTransform | None = None,
    ) -> None:
        super().__init__(split, person_ids, cameras, names, transform)
        self.lengths: NDArray[np.int64] = np.asarray(lengths, np.int64)
        if self.lengths.shape != self.persons.shape or (self.lengths < 1).any():
            raise ValueError(f"lengths must be [{len(self.persons)}] and 1 or more, got {self.lengths}")

    @abstractmethod
    def frames_of(self, index: int, frame_numbers: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """Some frames of a tracklet as they are stored, by their places in it, uint8 RGB [T, 3, H, W]."""

    def occluded(self, index: int, frame_numbers: Sequence[int] | NDArray[np.int64]) -> Tensor | None:
        """Where something is in front of the person in these frames, bool [T, H, W]; None where nobody knows."""
        return None

    def read(self, index: int) -> Tensor:
        """All frames of a tracklet as they are stored, uint8 RGB [T, 3, H, W]."""
        return self.frames_of(index, np.arange(self.lengths[index]))

    def picture(self, index: int) -> Tensor:
        return self.frames_of(index, [int(self.lengths[index]) // 2])[0]

    def clip(self, index: int, frame_numbers: Sequence[int] | NDArray[np.int64]) -> TrackletItem:
        """An item of these frames only."""
        frames = self._transformed(self.frames_of(index, frame_numbers))
        item: Any = {"frames": frames, **self._sighting(index)}
        if (hidden := self.occluded(index, frame_numbers)) is not None:
            item["occluded"] = hidden
        return item

    def __getitem__(self, index: int) -> TrackletItem:
        place = self._place(index)
        return self.clip(place, np.arange(self.lengths[place]))


class IndexedPersons(Dataset[Any]):
    """The items of a training set of images, each with its place as ``index``."""

    def __init__(self, dataset: PersonDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], "index": index}


class RandomClips(Dataset[Any]):
    """Of each tracklet of a training set a clip, drawn by torch's generator each time; ``index`` is its place.

    Args:
        dataset: whose tracklets.
        frames: T of `gingham.data.clips.random_clip`, 1 or more.
    """

    def __init__(self, dataset: TrackletDataset, frames: int) -> None:
        self.dataset, self.frames = dataset, frames

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        numbers = random_clip(int(self.dataset.lengths[index]), self.frames)
        return {**self.dataset.clip(index, numbers), "index": index}


class ChosenClips(Dataset[Any]):
    """Of each tracklet the ``clips`` that it is evaluated by, float32 or uint8 [n, T, 3, H, W].

    Where it is known, ``occluded`` is bool [n, T, H, W].

    Args:
        dataset: whose tracklets.
        frames: T of `gingham.data.clips.evaluation_clips`, 1 or more.
        sampling: as there.
    """

    def __init__(self, dataset: TrackletDataset, frames: int, sampling: ClipSampling) -> None:
        self.dataset, self.frames, self.sampling = dataset, frames, sampling

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        numbers = evaluation_clips(int(self.dataset.lengths[index]), self.frames, self.sampling)
        different, where = np.unique(numbers, return_inverse=True)  # a file that comes twice is read once
        places = torch.from_numpy(where.reshape(numbers.shape))
        item: dict[str, Any] = {**self.dataset.clip(index, different)}
        item["clips"] = item.pop("frames")[places]
        if "occluded" in item:
            item["occluded"] = item["occluded"][places]
        return item


class QueryAndGallery(Dataset[Any]):
    """The items of a query and then those of its gallery, each with whether it is a ``query``.

    Args:
        query: items with a person and a camera.
        gallery: likewise.
        shown: the data sets that the two are made of, for pictures; by default the two themselves.
    """

    def __init__(self, query: Any, gallery: Any, shown: Sequence[ReidDataset] | None = None) -> None:
        self.query, self.gallery = query, gallery
        self._shown = (query, gallery) if shown is None else shown

    def __len__(self) -> int:
        return len(self.query) + len(self.gallery)

    def __getitem__(self, index: int) -> dict[str, Any]:
        is_query = index < len(self.query)
        item = self.query[index] if is_query else self.gallery[index - len(self.query)]
        return {**item, "query": is_query}

    def picture(self, index: int) -> tuple[Tensor, int]:
        """What people are shown of an item, uint8 RGB [3, H, W], and its person."""
        query, gallery = self._shown
        part, place = (query, index) if index < len(query) else (gallery, index - len(query))
        return part.picture(place), int(part.persons[place])


def hold_back(person_ids: ArrayLike, cameras: ArrayLike, persons: int) -> dict[str, NDArray[np.int64]]:
    """Keep the last persons of a training set back for validation.

    Args:
        person_ids: [N] of the training set.
        cameras: [N].
        persons: how many are held back, those of the highest numbers, 0 or more and not all.

    Returns:
        Which items are in "train", "val_query" and "val_gallery": of each person who is held back, the first item from
        each camera is a query. Of persons of whom every camera has a single item, only that of the first camera is:
        nobody could be found otherwise.

    Raises:
        ValueError: `persons` outside its range.

    Example:
        >>> hold_back([1, 2, 2, 2], [0, 0, 0, 1], 1)
        {'train': array([0]), 'val_query': array([1, 3]), 'val_gallery': array([2])}
    """
    ids, seen_by = np.asarray(person_ids, np.int64), np.asarray(cameras, np.int64)
    different = np.unique(ids)
    if not 0 <= persons < max(1, len(different)):
        raise ValueError(f"validation_persons must be 0 to below the {len(different)} of the training, got {persons}")
    held = np.isin(ids, different[len(different) - persons :])
    of_held = np.flatnonzero(held)
    pairs = np.stack([ids[held], seen_by[held]])
    (whose, _), firsts, counts = np.unique(pairs, axis=1, return_index=True, return_counts=True)
    single = ~np.isin(whose, whose[counts > 1])
    asks = ~single | (np.diff(whose, prepend=whose[:1] - 1) != 0)
    query = np.sort(of_held[firsts[asks]])
    return {
        "train": np.flatnonzero(~held),
        "val_query": query,
        "val_gallery": np.setdiff1d(of_held, query),
    }


def check_queries(where: str, person_ids: NDArray[np.int64]) -> None:
    """Raise a DataError where a query is of nobody, as in data whose persons are numbered from 0.

    Args:
        where: the folder or file, for the text.
        person_ids: [N], of the queries.
    """
    if (person_ids <= DISTRACTOR).any():
        raise DataError(
            f"{where}: a query is of person {person_ids.min()}, but 0 is a distractor, whom no query asks for, and -1 "
            "junk: number persons from 1"
        )


def check_published(where: str, found: dict[str, int], published: dict[str, int]) -> None:
    """Raise a DataError where a data set is not complete.

    Args:
        where: its folder or file, for the text.
        found: what was counted, by name.
        published: what there should be.
    """
    for name, number in published.items():
        if found[name] != number:
            raise DataError(
                f"{where}: {found[name]} {name}, but the published data set has {number}; "
                "set complete to false if it is a part or another one in the same layout"
            )
