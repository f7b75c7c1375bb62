"""Source and target of an adaptation: the images of both, and which of the target are labelled."""

from __future__ import annotations

import copy
import csv
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gingham.data.person_transform import PersonTransform
from gingham.data.reid import PersonDataset
from gingham.errors import DataError
from gingham.methods.oneshot_reid.split import OneShotSplit, Rule, one_shot_split, read_split
from gingham.methods.oneshot_reid.streams import (
    BatchShape,
    Numbers,
    Stream,
    StreamBatches,
    Streams,
    TargetLabels,
    collate_streams,
)
from gingham.methods.reid_data import PersonData, PersonSource


class AdaptationData(PersonData):
    """Training images of a source and a target; queries and gallery of the target.

    A training batch has a batch of each stream that is trained on now, by its name: ``source``; or ``assigned``, images
    of the target with labels given or guessed, and ``mined``, images in clusters; see
    `gingham.methods.oneshot_reid.streams`.

    Args:
        name: of the target, as in `gingham.methods.reid_data.PersonData`, as are the options not named here.
        root: of the target.
        source_name: of the source; for the world, the two are its two domains.
        source_root: folder of the source; not for the world.
        source_persons: the world only: persons of the source.
        labels_file: a file that a finished adaptation wrote, ``pseudo_labels/final.csv``: the images of the target with
            these labels are the source, so that a new network is trained on them.
        shots: k, labelled images of each person of the target, 1 or more.
        split_seed: of the choice of these images, any whole number; None for `seed`.
        split_rule: how they are chosen, see `gingham.methods.oneshot_reid.split.one_shot_split`.
        split_file: a list of them, see `gingham.methods.oneshot_reid.split.write_split`, instead of choosing them.
        steps_per_epoch: training batches in an epoch, 1 or more.
        persons_per_batch: P of the source.
        items_per_person: K of the source.
        target_persons_per_batch: P of each batch of the target.
        target_items_per_person: K of these.
        flip: probability that a training picture is mirrored, 0 to 1.
        crop: take a random part of pictures of the source and of labelled ones of the target; never of clusters.
        erasing: probability that a box is erased in training, 0 to 1.
        options: of `gingham.methods.reid_data.PersonData`.

    Raises:
        ValueError: an argument outside its range.
        DataError: when data is opened: a folder or file is missing, or not what is expected.

    Source: the authors' later code for batches and augmentation; there an epoch visits every person once.
    """

    def __init__(
        self,
        name: PersonSource = "wardrobe_persons",
        root: str | None = None,
        source_name: PersonSource = "wardrobe_persons",
        source_root: str | None = None,
        source_persons: int = 100,
        labels_file: str | None = None,
        shots: int = 1,
        split_seed: int | None = None,
        split_rule: Rule = "random",
        split_file: str | None = None,
        steps_per_epoch: int = 43,
        persons_per_batch: int = 16,
        items_per_person: int = 8,
        target_persons_per_batch: int = 32,
        target_items_per_person: int = 4,
        flip: float = 0.5,
        crop: bool = True,
        erasing: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(
            name,
            root,
            domain="target",
            epoch="persons",
            persons_per_batch=persons_per_batch,
            items_per_person=items_per_person,
            flip=flip,
            crop=crop,
            erasing=erasing,
            **options,
        )
        for option, value in (
            ("source_persons", source_persons),
            ("shots", shots),
            ("steps_per_epoch", steps_per_epoch),
            ("target_persons_per_batch", target_persons_per_batch),
            ("target_items_per_person", target_items_per_person),
        ):
            if value < 1:
                raise ValueError(f"{option} must be 1 or more, got {value}")
        if split_rule not in ("random", "first"):
            raise ValueError(f"split_rule must be 'random' or 'first', got {split_rule!r}")
        self._source = PersonData(
            source_name,
            source_root,
            domain="source",
            images=self.images,
            complete=self.complete,
            lengths=(source_persons, 0, 0),
        )
        self.labels_file = labels_file
        self.shots, self.split_file = shots, split_file
        self.split_seed = self.seed if split_seed is None else split_seed
        self.split_rule: Rule = split_rule
        self.steps_per_epoch = steps_per_epoch
        self.shapes: dict[Stream, BatchShape] = {
            "source": BatchShape(persons_per_batch, items_per_person),
            "assigned": BatchShape(target_persons_per_batch, target_items_per_person),
            "mined": BatchShape(target_persons_per_batch, target_items_per_person),
        }
        without_crop = PersonTransform(self.augment.size, flip=flip, erasing=erasing)
        self.transforms: dict[Stream, Any] = {"source": self.augment, "assigned": self.augment, "mined": without_crop}
        self._streams: Streams | None = None
        self._split: OneShotSplit | None = None

    # -------------------------------------------------------------------------------------------- the data sets

    def splits(self) -> tuple[str, ...]:
        return (*super().splits(), "train_source")

    def open(self, split: str) -> PersonDataset:
        if split != "train_source":
            return super().open(split)
        if self.labels_file is not None:
            return relabelled(self.target, self.labels_file)
        if self._source.name != self._source.sources[0] and self._source.root is None:
            raise DataError(
                f"data.source_root is not set: give the folder of {self._source.name} with --data.source_root DIR"
            )
        return self._source.open("train")

    @property
    def source(self) -> PersonDataset:
        """The training images of the source."""
        found: PersonDataset = self.opened("train_source")
        return found

    @property
    def target(self) -> PersonDataset:
        """The training images of the target."""
        found: PersonDataset = self.opened("train")
        return found

    @property
    def split(self) -> OneShotSplit:
        """The labelled images of the target."""
        if self._split is None:
            if self.split_file is not None:
                self._split = read_split(self.split_file)
            else:
                target = self.target
                self._split = one_shot_split(
                    target.persons,
                    target.cameras,
                    target.names,
                    dataset=self.name,
                    shots=self.shots,
                    seed=self.split_seed,
                    rule=self.split_rule,
                )
        return self._split

    @property
    def known_ids(self) -> Numbers:
        """The persons of the labelled images as the data set numbers them, sorted; their places are their labels."""
        return np.unique(self.target.person_ids[self._labelled()])

    @property
    def known_persons(self) -> Numbers:
        """Labels [N] of the images of the target: a number from 0 for those that are labelled, -1 for all others."""
        labelled = self._labelled()
        labels = np.full(len(self.target), -1, np.int64)
        labels[labelled] = np.searchsorted(self.known_ids, self.target.person_ids[labelled])
        return labels

    @property
    def true_persons(self) -> Numbers:
        """What all labels would be; -1 for images of persons who are not among the labelled ones."""
        ids, known = self.target.person_ids, self.known_ids
        places = np.searchsorted(known, ids).clip(max=len(known) - 1)
        return np.where(known[places] == ids, places, -1)

    def _labelled(self) -> Numbers:
        places = {name: index for index, name in enumerate(self.target.names)}
        strangers = [name for name in self.split.labelled if name not in places]
        if strangers or not self.split.labelled:
            named = strangers[0] if strangers else "nothing"
            raise DataError(f"{self.split_file}: lists {named!r}, which is no training image of {self.name}")
        return np.array([places[name] for name in self.split.labelled], np.int64)

    def describe(self, split: str) -> str:
        labelled = f"{len(self.split.labelled)} of {len(self.target)} training images labelled"
        return f"{super().describe(split)}; {labelled}, {self.split.shots} a person, sha256 {self.split.sha256[:12]}"

    # -------------------------------------------------------------------------------------------- training

    @property
    def streams(self) -> Streams:
        """What is trained on."""
        if self._streams is None:
            self._streams = Streams(self.source, self.target, self.transforms)
        return self._streams

    def use_labels(self, labels: TargetLabels | None) -> None:
        """Train on these labels of the target from the next epoch on, or with None on the source."""
        self.streams.labels = labels

    def next_epoch(self) -> int:
        """The epoch of the next training batch."""
        return self._trained() // self.steps_per_epoch

    def least_clusters(self) -> int:
        """How many clusters a batch of all processes needs."""
        return self.shapes["mined"].persons * self.process()[1]

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.dataset("val")
            _ = self.streams, self.known_persons
        else:
            super().setup(stage)

    def train_dataloader(self) -> DataLoader[Any]:
        rank, processes = self.process()
        batches = StreamBatches(
            self.streams, self.shapes, self.steps_per_epoch, self.seed, rank, processes, trained=self._trained
        )
        return self.training_loader(self.streams, batches=batches, collate=collate_streams)

    def source_loader(self) -> DataLoader[Any]:
        """This process's share of the images of the source, as they are evaluated."""
        return self.evaluation_loader(Plain(self.source, self.evaluate))

    def target_loader(self) -> DataLoader[Any]:
        """This process's share of the training images of the target, as they are evaluated."""
        return self.evaluation_loader(Plain(self.target, self.evaluate))


class Plain(Dataset[dict[str, Tensor]]):
    """The images of a data set without anything that is known about them.

    Args:
        dataset: whose images.
        transform: what is done to their pixels.
    """

    def __init__(self, dataset: PersonDataset, transform: PersonTransform) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.transform(self.dataset.read(index))}


def relabelled(dataset: PersonDataset, labels_file: str) -> PersonDataset:
    """A training set whose images have the persons that a file of labels says.

    Args:
        dataset: training images.
        labels_file: CSV with the columns ``name`` and ``person``, a line for each image.

    Returns:
        The same images, numbered anew by these persons.

    Raises:
        DataError: a file that cannot be read, or does not have each image once.
    """
    try:
        with open(labels_file, newline="") as table:
            rows = [(row["name"], int(row["person"])) for row in csv.DictReader(table)]
    except OSError as error:
        raise DataError(f"{labels_file}: cannot be read ({error.strerror})") from error
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{labels_file}: is no table of labels, which has columns name and person ({error})") from error
    persons = dict(rows)
    missing = [name for name in dataset.names if name not in persons]
    if missing or not len(rows) == len(persons) == len(dataset.names):
        named = f"no label for {missing[0]!r}" if missing else "labels of other images, or two of one"
        raise DataError(f"{labels_file}: has {named}; it must be of the same training images")
    again = copy.copy(dataset)
    again.person_ids = np.array([persons[name] for name in dataset.names], np.int64)
    again.persons = np.unique(again.person_ids, return_inverse=True)[1].astype(np.int64)
    return again
