"""Segmentation data for training: which data set, in which order, augmented how, so that any run can be continued.

The order of an epoch follows from (seed, epoch) and the augmentation of an item from (seed, epoch, index). Nothing
depends on what was drawn before, on the number of workers, or on when a run was interrupted: a checkpoint holds only
how many batches were trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from gingham.data import ADE20K, Cityscapes, CueScenes, SegmentationDataset, VOCSegmentation
from gingham.data.ade20k import ADE20K_LABELS
from gingham.data.cityscapes import CITYSCAPES_LABELS
from gingham.data.labels import LabelSpace
from gingham.data.segmentation import SegmentationItem
from gingham.data.transforms import (
    EvaluationTransform,
    Normalize,
    RandomScale,
    RandomScaleCropFlip,
    bgr_mean_normalize,
    imagenet_normalize,
)
from gingham.data.voc import VOC_LABELS
from gingham.data.wardrobe import CUE_LABELS
from gingham.errors import DataError

DatasetName = Literal["wardrobe", "cityscapes", "ade20k", "voc"]
Position = tuple[int, int]  # (epoch, index)


class SeededItems(Dataset[SegmentationItem]):
    """A data set whose augmentation is drawn anew for each (epoch, index), and the same whenever that comes again."""

    def __init__(self, dataset: SegmentationDataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: Position) -> SegmentationItem:
        epoch, index = position
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_mixed(_mixed(self.seed, epoch), index))
            return self.dataset[index]


def _mixed(seed: int, number: int) -> int:
    return (seed * 1_000_003 + number) % 2**63  # what torch.manual_seed takes


class EpochBatches(Sampler[list[Position]]):
    """Batches of permutations that follow from (seed, epoch); each process takes its share of every batch.

    One pass gives as many batches as an epoch has, beginning after those that were trained: after the seventh batch of
    an epoch of ten it gives three of that epoch and seven of the next.

    Args:
        length: number of items.
        batch_size: items in a batch of one process. What does not fill a batch of all processes is left out.
        seed: of the permutations.
        rank, world_size: of this process.
        trained: gives the number of batches trained so far in all epochs, asked for when a pass begins.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        trained: Callable[[], int] = lambda: 0,
    ) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.trained = trained

    def __len__(self) -> int:
        return self.length // (self.batch_size * self.world_size)

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(_mixed(self.seed, epoch))
        return torch.randperm(self.length, generator=generator).tolist()

    def __iter__(self) -> Iterator[list[Position]]:
        first = self.trained()
        order: list[int] = []
        for number in range(first, first + len(self)):
            epoch, batch = divmod(number, len(self))
            if batch == 0 or not order:
                order = self._order(epoch)
            begin = (batch * self.world_size + self.rank) * self.batch_size
            yield [(epoch, index) for index in order[begin : begin + self.batch_size]]


class ShareOfItems(Sampler[int]):
    """Every world_size-th item, without the repetitions that would count items twice in a metric."""

    def __init__(self, length: int, rank: int, world_size: int) -> None:
        self.indices = range(rank, length, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


class FilledUp(Dataset[SegmentationItem]):
    """A data set of at least `length` items; those that it has not got are copies of its first without any label.

    With as many items as processes, every process has one: those without would leave the others waiting.
    """

    def __init__(self, dataset: SegmentationDataset, length: int) -> None:
        self.dataset, self.length = dataset, length

    def __len__(self) -> int:
        return max(len(self.dataset), self.length)

    def __getitem__(self, index: int) -> SegmentationItem:
        if index < len(self.dataset):
            return self.dataset[index]
        item = self.dataset[0]
        return {**item, "label": torch.full_like(item["label"], self.dataset.ignore_index)}


def _own_generator() -> torch.Generator:
    # A loader draws a seed for its workers each time it starts. From torch's own generator, that would shift dropout,
    # and a resumed run starts its loaders at other moments.
    return torch.Generator().manual_seed(0)


class SegmentationData(lightning.LightningDataModule):
    """A segmentation data set by name.

    Args:
        name: "wardrobe" (the embedded cue scenes), "cityscapes", "ade20k" or "voc".
        root: folder of the data set, as its reader wants it; not for "wardrobe".
        batch_size: images in a training batch of one process.
        evaluation_batch_size: images in an evaluation batch.
        crop: side of the training crop, or (rows, columns).
        scales: (low, high, step) of the random scale, or None.
        normalization: "imagenet" (RGB, mean and standard deviation) or "bgr" (BGR minus mean, as the official weights).
        workers: processes that load data.
        seed: of order and augmentation, any whole number.
        lengths: "wardrobe" only: scenes in train, val and test.
        world_labels: read "cityscapes" files as the embedded world, written with `write_cityscapes`.

    Raises:
        ValueError: a number outside its range.
        DataError: when a split is opened: `root` is missing, or not what the reader expects.
    """

    def __init__(
        self,
        name: DatasetName = "wardrobe",
        root: str | None = None,
        batch_size: int = 2,
        evaluation_batch_size: int = 1,
        crop: int | tuple[int, int] = 769,
        scales: tuple[float, float, float] | None = (0.7, 2.1, 0.1),
        normalization: Literal["imagenet", "bgr"] = "imagenet",
        workers: int = 0,
        seed: int = 0,
        lengths: tuple[int, int, int] = (1600, 300, 500),
        world_labels: bool = False,
    ) -> None:
        super().__init__()
        for option, value, least in (
            ("batch_size", batch_size, 1),
            ("evaluation_batch_size", evaluation_batch_size, 1),
            ("workers", workers, 0),
            ("lengths", min(lengths), 0),
        ):
            if value < least:
                raise ValueError(f"{option} must be {least} or more, got {value}")
        self.name: DatasetName = name
        self.root, self.seed, self.workers = root, seed, workers
        self.batch_size, self.evaluation_batch_size = batch_size, evaluation_batch_size
        self.lengths, self.world_labels = dict(zip(("train", "val", "test"), lengths, strict=True)), world_labels
        normalize: Normalize = imagenet_normalize() if normalization == "imagenet" else bgr_mean_normalize()
        rescale = RandomScale(*scales) if scales else None
        crop_size = crop if isinstance(crop, int) else (crop[0], crop[1])
        self.augment = RandomScaleCropFlip(crop_size, rescale=rescale, normalize=normalize)
        self.evaluate = EvaluationTransform(normalize=normalize)
        self._datasets: dict[str, SegmentationDataset] = {}
        self._trained_before = 0  # batches, when the run was interrupted

    def dataset(self, split: str) -> SegmentationDataset:
        """The data set of "train", "val" or "test", with its transform. Kept once made."""
        if split not in self._datasets:
            self._datasets[split] = self.open(split)
        return self._datasets[split]

    def open(self, split: str, *, require_labels: bool = True) -> SegmentationDataset:
        """A split, read anew.

        Raises:
            DataError: a folder is missing, or an image has no label although `require_labels`.
        """
        transform = self.augment if split == "train" else self.evaluate
        if self.name == "wardrobe":
            return CueScenes(split, self.lengths[split], cache=True, transform=transform)
        root = self._root()
        if self.name == "cityscapes":
            labels = CUE_LABELS if self.world_labels else CITYSCAPES_LABELS
            return Cityscapes(root, split, labels=labels, require_labels=require_labels, transform=transform)
        if self.name == "ade20k":
            split = "training" if split == "train" else "validation"
            return ADE20K(root, split, require_labels=require_labels, transform=transform)
        split = "train" if split == "train" else "val"
        return VOCSegmentation(root, split, require_labels=require_labels, transform=transform)

    def _root(self) -> Path:
        if self.root is None:
            raise DataError(f"data.root is not set: give the folder of {self.name} with --data.root DIR")
        return Path(self.root)

    def splits(self) -> tuple[str, ...]:
        """The splits that have images of their own: "test" is the validation split of ADE20K and VOC."""
        if self.name == "wardrobe" or (self.name == "cityscapes" and (self._root() / "leftImg8bit" / "test").is_dir()):
            return ("train", "val", "test")
        return ("train", "val")

    def label_space(self) -> LabelSpace:
        """The classes, known without opening the data set."""
        if self.name == "wardrobe" or self.world_labels:
            return CUE_LABELS
        spaces = {"cityscapes": CITYSCAPES_LABELS, "ade20k": ADE20K_LABELS, "voc": VOC_LABELS}
        return spaces[self.name]

    def setup(self, stage: str) -> None:
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ()):
            if len(self.dataset(split)) == 0:
                raise DataError(f"the {split} split of {self.name} has no images")

    def _process(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)

    def _trained(self) -> int:
        """Batches that were trained so far, those before an interruption included."""
        if self.trainer is None:
            return 0
        # Lightning restores its count only after a schedule has asked for the length of the loader.
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        return max(self._trained_before, progress.total.processed)

    def train_dataloader(self) -> DataLoader[SegmentationItem]:
        dataset = self.dataset("train")
        batches = EpochBatches(len(dataset), self.batch_size, self.seed, *self._process(), self._trained)
        if len(batches) == 0:
            raise DataError(f"the train split has {len(dataset)} images, fewer than one batch of all processes needs")
        items: Any = SeededItems(dataset, self.seed)
        return DataLoader(items, batch_sampler=batches, num_workers=self.workers, generator=_own_generator())

    def _evaluation_loader(self, split: str) -> DataLoader[SegmentationItem]:
        rank, world_size = self._process()
        items = FilledUp(self.dataset(split), world_size)
        share = ShareOfItems(len(items), rank, world_size)
        size, workers = self.evaluation_batch_size, self.workers
        return DataLoader(items, size, sampler=share, num_workers=workers, generator=_own_generator())

    def val_dataloader(self) -> DataLoader[SegmentationItem]:
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[SegmentationItem]:
        return self._evaluation_loader("test")

    def state_dict(self) -> dict[str, int]:
        return {"trained": self._trained()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._trained_before = state_dict.get("trained", 0)
