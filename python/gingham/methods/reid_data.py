"""Persons for training and evaluation: which data set, in which batches, and how pictures are varied."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, get_args

import torch
from torch.utils.data import DataLoader

from gingham.data.clips import ClipSampling
from gingham.data.identity_sampler import IdentityBatches, IdentityEpoch
from gingham.data.market1501 import DukeMTMCReID, Market1501
from gingham.data.mars import MARS, DukeMTMCVideoReID, MarsProtocol
from gingham.data.person_transform import PersonTransform
from gingham.data.reid import (
    ChosenClips,
    IndexedPersons,
    PersonDataset,
    QueryAndGallery,
    RandomClips,
    TrackletDataset,
)
from gingham.data.wardrobe.cameras import Domain
from gingham.data.wardrobe.persons import PersonImages
from gingham.data.wardrobe.tracklets import Tracklets
from gingham.errors import DataError
from gingham.methods.resumable_data import ResumableData

PersonSource = Literal["wardrobe_persons", "market1501", "dukemtmc_reid"]
TrackletSource = Literal["wardrobe_tracklets", "mars", "dukemtmc_videoreid"]

_PERSON_READERS: dict[str, type[Market1501] | type[DukeMTMCReID]] = {
    "market1501": Market1501,
    "dukemtmc_reid": DukeMTMCReID,
}


class ReidData(ResumableData, ABC):
    """Batches of P persons with K items each for training; for evaluation, all queries and then the gallery.

    Args:
        name: of the data set.
        root: folder of the data set, as its reader wants it; not for the world.
        persons_per_batch: P in a training batch of one process, 1 or more.
        items_per_person: K, 1 or more.
        epoch: what an epoch is, see `gingham.data.identity_sampler.IdentityBatches`.
        size: rows and columns of pictures.
        flip: probability that a training picture, or all frames of a clip, are mirrored, 0 to 1.
        crop: train on parts of the pictures, see `gingham.data.person_transform.PersonTransform`.
        erasing: probability that a box is erased in training, 0 to 1, see there.
        validation_persons: persons of the training who are held back for validation; not for the world, which has its
            own. With 0, validation is on the queries and the gallery of the test, and nothing may be chosen by it.
        complete: whether it has to be the whole published data set, see the readers.
        evaluation_batch_size: items in an evaluation batch.
        workers: processes that load data.
        seed: of order and augmentation, any whole number.
        lengths: the world only: persons in train, val and test.

    Raises:
        ValueError: an argument outside its range.
        DataError: when a split is opened: `root` is missing, or not what the reader expects.
    """

    #: The names of the data sets; the first is the world's.
    sources: ClassVar[tuple[str, ...]]
    #: What is said where training keeps no best state, see `has_validation`.
    without_validation = "nobody is held back (data.validation_persons): validation is the test, no state is the best"

    def __init__(
        self,
        name: str,
        root: str | None,
        persons_per_batch: int,
        items_per_person: int,
        epoch: IdentityEpoch,
        size: tuple[int, int],
        flip: float,
        crop: bool,
        erasing: float,
        validation_persons: int,
        complete: bool,
        evaluation_batch_size: int,
        workers: int,
        seed: int,
        lengths: tuple[int, int, int],
    ) -> None:
        IdentityBatches([], persons_per_batch, items_per_person, 0, epoch=epoch)  # raises what is wrong with these
        super().__init__(persons_per_batch * items_per_person, evaluation_batch_size, workers, seed)
        if name not in self.sources:
            raise ValueError(f"name must be one of {', '.join(self.sources)}, got {name!r}")
        if len(lengths) != 3:
            raise ValueError(f"lengths must be three numbers, of train, val and test, got {tuple(lengths)}")
        for option, value in (("validation_persons", validation_persons), ("lengths", min(lengths))):
            if value < 0:
                raise ValueError(f"{option} must be 0 or more, got {value}")
        if validation_persons and name == self.sources[0]:
            raise ValueError(f"validation_persons must be 0 for {name}, which has persons for validation")
        self.name: str = name
        self.root = root
        self.persons_per_batch, self.items_per_person = persons_per_batch, items_per_person
        self.epoch: IdentityEpoch = epoch
        self.augment = PersonTransform(size, flip=flip, crop=crop, erasing=erasing)
        self.evaluate = PersonTransform(size)
        self.validation_persons, self.complete = validation_persons, complete
        self.lengths = dict(zip(("train", "val", "test"), lengths, strict=True))
        self._opened: dict[str, Any] = {}
        self._datasets: dict[str, Any] = {}

    # -------------------------------------------------------------------------------------------- the data set

    @property
    def in_memory(self) -> bool:
        """Whether it is the world."""
        return self.name == self.sources[0]

    @property
    def has_validation(self) -> bool:
        """Whether there are persons for validation that are not those of the test."""
        return self.in_memory or self.validation_persons > 0

    def splits(self) -> tuple[str, ...]:
        """The splits that can be opened."""
        validation = ("val_query", "val_gallery") if self.has_validation else ()
        return ("train", *validation, "query", "gallery")

    def folder(self) -> str:
        """The root.

        Raises:
            DataError: there is none.
        """
        if self.root is None:
            raise DataError(f"data.root is not set: give the folder of {self.name} with --data.root DIR")
        return self.root

    def persons_of(self, split: str) -> int:
        """How many persons a split of the world has."""
        return self.lengths[{"train": "train", "val_query": "val", "val_gallery": "val"}.get(split, "test")]

    @abstractmethod
    def open(self, split: str) -> Any:
        """A split as it is stored, one of `splits`, read anew and without any transform."""

    def opened(self, split: str) -> Any:
        """A split as it is stored, one of `splits`. Kept once opened."""
        if split not in self._opened:
            self._opened[split] = self.open(split)
        return self._opened[split]

    @property
    def num_persons(self) -> int:
        """How many persons there are to train on."""
        return int(self.opened("train").num_persons)

    def describe(self, split: str) -> str:
        """What the scores of "val" or "test" depend on, in a line."""
        query, gallery = self._evaluated(split)
        sets = [self.opened(query), self.opened(gallery)]
        number = len({*sets[0].person_ids.tolist()})
        return f"{self.name}: {len(sets[0])} queries of {number} persons, {len(sets[1])} in the gallery"

    def _evaluated(self, split: str) -> tuple[str, str]:
        return ("val_query", "val_gallery") if split == "val" and self.has_validation else ("query", "gallery")

    # -------------------------------------------------------------------------------------------- what is trained on

    @abstractmethod
    def training_items(self, dataset: Any) -> Any:
        """The items of a training set, each with its ``index``."""

    @abstractmethod
    def evaluation_items(self, dataset: Any) -> Any:
        """The items of another split."""

    def dataset(self, split: str) -> Any:
        """The items of "train", or of "val" or "test": queries and then the gallery. Kept once made."""
        if split not in self._datasets:
            if split == "train":
                self.opened("train").transform = self.augment
                self._datasets[split] = self.training_items(self.opened("train"))
            else:
                parts = [self.opened(name) for name in self._evaluated(split)]
                for part in parts:
                    part.transform = self.evaluate
                query, gallery = map(self.evaluation_items, parts)
                self._datasets[split] = QueryAndGallery(query, gallery, shown=parts)
        return self._datasets[split]

    def setup(self, stage: str) -> None:
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ()):
            self.dataset(split)

    def train_dataloader(self) -> DataLoader[Any]:
        dataset = self.dataset("train")
        rank, processes = self.process()
        batches = IdentityBatches(
            self.opened("train").persons,
            self.persons_per_batch,
            self.items_per_person,
            self.seed,
            epoch=self.epoch,
            rank=rank,
            world_size=processes,
            trained=self._trained,
        )
        if len(batches) == 0:
            raise DataError(
                f"the train split has {self.num_persons} persons, but a batch of all processes needs "
                f"{self.persons_per_batch * processes}"
            )
        return self.training_loader(dataset, batches=batches)

    def _evaluation_loader(self, split: str) -> DataLoader[Any]:
        dataset, (_, processes) = self.dataset(split), self.process()
        if len(dataset) < processes:  # one that has nothing cannot take part when features are collected
            raise DataError(f"the {split} split has {len(dataset)} items, fewer than the {processes} processes need")
        return self.evaluation_loader(dataset, collate=collate_sightings)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._evaluation_loader("test")


def collate_sightings(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of items for evaluation: tensors stacked, but lists of what differs in shape from item to item.

    Args:
        items: of `gingham.data.reid.QueryAndGallery`.

    Returns:
        ``image`` [B, 3, H, W], or ``clips``, a list of [n, T, 3, H, W], and perhaps ``occluded``, one of [n, T, h, w];
        ``person``, ``camera`` int64 [B], ``query`` bool [B], ``name``, a list.
    """
    batch: dict[str, Any] = {name: [item[name] for item in items] for name in items[0]}
    for name, values in batch.items():
        if name == "image":
            batch[name] = torch.stack(values)
        elif isinstance(values[0], bool | int):
            batch[name] = torch.tensor(values)
    return batch


class PersonData(ReidData):
    """Images of persons; a training batch has ``image`` [P K, 3, H, W], ``person``, ``camera`` and ``index`` [P K].

    Args:
        name: "wardrobe_persons" of the embedded world, or on disk "market1501" or "dukemtmc_reid".
        root: as in `ReidData`, as are those that are not named here.
        domain: the world only: which cameras, "source" or "target".
        images: the world only: of each person from each camera.
        persons_per_batch: as there.
        items_per_person: as there.
        epoch: as there.
        size: as there.
        flip: as there.
        crop: as there.
        erasing: as there.
        validation_persons: as there.
        complete: as there.
        evaluation_batch_size: as there.
        workers: as there.
        seed: as there.
        lengths: as there.

    Raises:
        ValueError: as there.
        DataError: as there.
    """

    sources = get_args(PersonSource)

    def __init__(
        self,
        name: PersonSource = "wardrobe_persons",
        root: str | None = None,
        domain: Domain = "source",
        images: int = 4,
        persons_per_batch: int = 16,
        items_per_person: int = 8,
        epoch: IdentityEpoch = "persons",
        size: tuple[int, int] = (256, 128),
        flip: float = 0.5,
        crop: bool = False,
        erasing: float = 0.0,
        validation_persons: int = 0,
        complete: bool = True,
        evaluation_batch_size: int = 64,
        workers: int = 0,
        seed: int = 0,
        lengths: tuple[int, int, int] = (100, 100, 300),
    ) -> None:
        super().__init__(
            name,
            root,
            persons_per_batch,
            items_per_person,
            epoch,
            size,
            flip,
            crop,
            erasing,
            validation_persons,
            complete,
            evaluation_batch_size,
            workers,
            seed,
            lengths,
        )
        PersonImages("train", 0, domain=domain, images=images)  # raises what is wrong with these
        self.domain: Domain = domain
        self.images = images

    def open(self, split: str) -> PersonDataset:
        if self.in_memory:
            return PersonImages(split, self.persons_of(split), domain=self.domain, images=self.images, cache=True)
        reader = _PERSON_READERS[self.name]
        options: dict[str, Any] = {"validation_persons": self.validation_persons, "complete": self.complete}
        return reader(self.folder(), split, **options)

    def training_items(self, dataset: PersonDataset) -> IndexedPersons:
        return IndexedPersons(dataset)

    def evaluation_items(self, dataset: PersonDataset) -> PersonDataset:
        return dataset


class TrackletData(ReidData):
    """Tracklets; a training batch has ``frames`` [P K, T, 3, H, W], ``person``, ``camera`` and ``index`` [P K].

    Args:
        name: "wardrobe_tracklets" of the embedded world, or on disk "mars" or "dukemtmc_videoreid".
        root: as in `ReidData`, as are those that are not named here.
        protocol: "mars" only: what the gallery is, see `gingham.data.mars.MARS`.
        frames: T of a clip, 1 or more.
        test_sample: the clips that a tracklet is evaluated by, see `gingham.data.clips.evaluation_clips`.
        domain: the world only: which cameras, "source" or "target".
        tracklets: the world only: of each person from each camera.
        tracklet_frames: the world only: of a tracklet.
        occlusion: the world only: the share of frames in which the person is partly hidden.
        persons_per_batch: as there.
        items_per_person: as there.
        epoch: as there.
        size: as there.
        flip: as there.
        crop: as there.
        erasing: as there.
        validation_persons: as there.
        complete: as there.
        evaluation_batch_size: as there.
        workers: as there.
        seed: as there.
        lengths: as there.

    Raises:
        ValueError: as there.
        DataError: as there.
    """

    sources = get_args(TrackletSource)

    def __init__(
        self,
        name: TrackletSource = "wardrobe_tracklets",
        root: str | None = None,
        protocol: MarsProtocol = "torchreid",
        frames: int = 4,
        test_sample: ClipSampling = "dense",
        domain: Domain = "source",
        tracklets: int = 2,
        tracklet_frames: int = 8,
        occlusion: float = 0.6,
        persons_per_batch: int = 8,
        items_per_person: int = 4,
        epoch: IdentityEpoch = "persons",
        size: tuple[int, int] = (256, 128),
        flip: float = 0.5,
        crop: bool = False,
        erasing: float = 0.0,
        validation_persons: int = 0,
        complete: bool = True,
        evaluation_batch_size: int = 8,
        workers: int = 0,
        seed: int = 0,
        lengths: tuple[int, int, int] = (80, 100, 500),
    ) -> None:
        super().__init__(
            name,
            root,
            persons_per_batch,
            items_per_person,
            epoch,
            size,
            flip,
            crop,
            erasing,
            validation_persons,
            complete,
            evaluation_batch_size,
            workers,
            seed,
            lengths,
        )
        if protocol not in get_args(MarsProtocol):
            raise ValueError(f"protocol must be 'torchreid' or 'official', got {protocol!r}")
        if frames < 1:
            raise ValueError(f"frames must be 1 or more, got {frames}")
        if test_sample not in get_args(ClipSampling):
            raise ValueError(f"test_sample must be 'dense', 'evenly' or 'all', got {test_sample!r}")
        self.world: dict[str, Any] = {
            "domain": domain,
            "tracklets": tracklets,
            "frames": tracklet_frames,
            "occlusion": occlusion,
        }
        Tracklets("train", 0, **self.world)  # raises what is wrong with these
        self.protocol: MarsProtocol = protocol
        self.frames = frames
        self.test_sample: ClipSampling = test_sample

    def open(self, split: str) -> TrackletDataset:
        if self.in_memory:
            return Tracklets(split, self.persons_of(split), cache=True, **self.world)
        options: dict[str, Any] = {
            "validation_persons": self.validation_persons,
            "complete": self.complete,
            "frame_size": self.evaluate.size,
        }
        if self.name == "mars":
            return MARS(self.folder(), split, protocol=self.protocol, **options)
        return DukeMTMCVideoReID(self.folder(), split, **options)

    def training_items(self, dataset: TrackletDataset) -> RandomClips:
        return RandomClips(dataset, self.frames)

    def evaluation_items(self, dataset: TrackletDataset) -> ChosenClips:
        return ChosenClips(dataset, self.frames, self.test_sample)

    def describe(self, split: str) -> str:
        protocol = f", protocol {self.protocol}" if self.name == "mars" else ""
        clips = "" if self.test_sample == "all" else f" of {self.frames} frames"
        return f"{super().describe(split)}{protocol}; clips {self.test_sample}{clips}"
