"""Classification data for training: which data set, in which order, augmented how, so that any run can be continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch.utils.data import DataLoader, Dataset

from gingham.data import fashion_mnist
from gingham.data.cifar import CIFAR
from gingham.data.classification import (
    ClassificationDataset,
    ClassificationItem,
    ClassificationTransform,
    SomeItems,
    WrongLabels,
    first_of_each_class,
)
from gingham.data.detection import class_colours
from gingham.data.fashion_mnist import FashionMNIST, PackagedGarments
from gingham.data.image_folder import ImageFolder, class_folders
from gingham.data.labels import Colour
from gingham.errors import DataError
from gingham.methods.resumable_data import ResumableData

DatasetName = Literal["fashion_mnist", "cifar10", "cifar100", "image_folder"]
Augmentation = Literal["none", "padded_crop", "resized_crop"]


class ClassificationData(ResumableData):
    """A classification data set by name.

    Args:
        name: "fashion_mnist", "cifar10", "cifar100" (the binary versions), or "image_folder", folders of the classes in
            folders of the splits, such as ImageNet.
        root: folder of the data set. For "fashion_mnist" by default that of the Debian package
            ``dataset-fashion-mnist``, or where it is not installed the 2,400, 600 and 1,000 garments that come with
            this package.
        splits: "image_folder" only: what the folders for training, validation and test are called. Where the last two
            are the same, there is no test split of its own.
        held_out: pictures of the training file that are kept for validation, as many of each class as of the others:
            the published data sets of "fashion_mnist" and CIFAR have no validation split. With 0, their test split is
            that of validation too. The garments that come with the package have one of their own.
        lengths: at most so many pictures in train, val and test, as many of each class as of the others; None for all.
        batch_size: images in a training batch of one process.
        evaluation_batch_size: images in an evaluation batch.
        size: side of the pictures that the network sees, or None to leave them as they are.
        augmentation: of training pictures, see `gingham.data.classification.ClassificationTransform`.
        flip: probability that a training picture is mirrored.
        resize: shorter side to which pictures are resized before their centre is cut out: in evaluation, and in
            training without an augmentation that cuts.
        label_noise: share of the training pictures that have the label of another class, drawn from the seed.
        drop_last: leave out, in every epoch, the pictures that do not fill a batch of all processes.
        workers: processes that load data.
        seed: of order, augmentation and wrong labels, any whole number.

    Raises:
        ValueError: a number outside its range, an unknown name, or an option that would do nothing with the others.
        DataError: when a split is opened: `root` is missing, or not what the reader expects.

    Example:
        >>> data = ClassificationData("fashion_mnist", batch_size=4, lengths=(20, 10, 10))
        >>> next(iter(data.train_dataloader()))["image"].shape
        torch.Size([4, 3, 28, 28])
    """

    def __init__(
        self,
        name: DatasetName = "fashion_mnist",
        root: str | None = None,
        splits: tuple[str, str, str] = ("train", "val", "val"),
        held_out: int = 0,
        lengths: tuple[int, int, int] | None = None,
        batch_size: int = 128,
        evaluation_batch_size: int = 256,
        size: int | None = None,
        augmentation: Augmentation = "none",
        flip: float = 0.0,
        resize: int | None = None,
        label_noise: float = 0.0,
        drop_last: bool = False,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, evaluation_batch_size, workers, seed, drop_last=drop_last)
        if name not in get_args(DatasetName):
            raise ValueError(f"name must be one of {', '.join(get_args(DatasetName))}, got {name!r}")
        if held_out < 0 or (held_out and name == "image_folder"):
            raise ValueError(f"held_out must be 0 or more, and 0 for image_folder, got {held_out}")
        if lengths is not None and (len(lengths) != 3 or min(lengths) < 1):
            raise ValueError(f"lengths must be three numbers of 1 or more, or None, got {lengths}")
        if name != "image_folder" and tuple(splits) != ("train", "val", "val"):
            raise ValueError(f"splits is an option of image_folder, not of {name}; leave it out")
        if not 0 <= label_noise <= 1:
            raise ValueError(f"label_noise must be 0 to 1, got {label_noise}")
        self.name: DatasetName = name
        self.root, self.held_out, self.label_noise = root, held_out, label_noise
        keys = ("train", "val", "test")
        self.lengths = dict(zip(keys, lengths or (None, None, None), strict=True))
        self._names = dict(zip(keys, splits, strict=True))
        unchanged = augmentation == "none"  # what is trained with is cut out as what is evaluated
        self.augment = ClassificationTransform(size, augmentation, flip, resize if unchanged else None)
        self.evaluate = ClassificationTransform(size, resize=resize)
        self._datasets: dict[str, ClassificationDataset] = {}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the labels 0, 1, ...; those of "image_folder" are read from its folders."""
        if self.name == "image_folder":
            return class_folders(self._root() / self._names["train"])
        return self.dataset("train").class_names

    @property
    def palette(self) -> tuple[Colour, ...]:
        """One colour for each class."""
        return class_colours(len(self.class_names))

    def splits(self) -> tuple[str, ...]:
        """The splits that have images of their own."""
        if self.name == "image_folder":
            own_test = self._names["test"] != self._names["val"]
        else:
            own_test = self.held_out > 0 or self._packaged()
        return ("train", "val", "test") if own_test else ("train", "val")

    def dataset(self, split: str) -> ClassificationDataset:
        """The data set of "train", "val" or "test", with its transform. Kept once made."""
        if split not in self._datasets:
            self._datasets[split] = self.open(split)
        return self._datasets[split]

    def training_length(self) -> int:
        """The number of training pictures, which may be fewer than `lengths` asks for."""
        return len(self.dataset("train"))

    def open(self, split: str, *, require_labels: bool = True) -> ClassificationDataset:
        """A split, read anew.

        Raises:
            DataError: a folder or file is missing, or not of this data set.
        """
        whole = self._whole(split)
        indices = torch.arange(len(whole))
        if self.held_out and not self._packaged() and split != "test":
            if self.held_out >= len(whole):
                raise DataError(f"held_out must be below the {len(whole)} pictures of {self.name}, got {self.held_out}")
            kept = torch.ones(len(whole), dtype=torch.bool)
            kept[first_of_each_class(whole.targets, self.held_out)] = False
            indices = (kept if split == "train" else ~kept).nonzero().flatten()
        if (most := self.lengths[split]) is not None:
            indices = indices[first_of_each_class(whole.targets[indices], most)]
        transform = self.augment if split == "train" else self.evaluate
        dataset: ClassificationDataset = SomeItems(whole, indices, transform)
        return WrongLabels(dataset, self.label_noise, self.seed) if self.label_noise and split == "train" else dataset

    def _packaged(self) -> bool:
        """Whether the garments that come with the package have to do."""
        return self.name == "fashion_mnist" and self.root is None and not fashion_mnist.DEBIAN_FOLDER.is_dir()

    def _whole(self, split: str) -> ClassificationDataset:
        if self._packaged():
            return PackagedGarments(split)
        file = "train" if split == "train" or (split == "val" and self.held_out) else "test"
        if self.name == "fashion_mnist":
            return FashionMNIST(self.root or fashion_mnist.DEBIAN_FOLDER, file)
        if self.name == "image_folder":
            names = self.class_names if split != "train" else None
            return ImageFolder(self._root(), self._names[split], class_names=names)
        return CIFAR(self._root(), file, classes=10 if self.name == "cifar10" else 100)

    def _root(self) -> Path:
        if self.root is None:
            raise DataError(
                f"data.root is not set: give the folder of {self.name} with --data.root DIR, or to predict, the "
                "config.yaml of a run that was trained with it"
            )
        return Path(self.root)

    def setup(self, stage: str) -> None:
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ()):
            if len(self.dataset(split)) == 0:
                raise DataError(f"the {split} split of {self.name} has no images")

    def train_dataloader(self) -> DataLoader[ClassificationItem]:
        return self.training_loader(self.dataset("train"))

    def _evaluation_loader(self, split: str) -> DataLoader[ClassificationItem]:
        _, processes = self.process()
        return self.evaluation_loader(FilledUp(self.dataset(split), processes))

    def val_dataloader(self) -> DataLoader[ClassificationItem]:
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[ClassificationItem]:
        return self._evaluation_loader("test")


class FilledUp(Dataset[ClassificationItem]):
    """A data set of at least `length` items; those that it has not got are its first with the label -1, not to be
    counted.

    With as many items as processes, every process has one: those without would leave the others waiting.
    """

    def __init__(self, dataset: ClassificationDataset, length: int) -> None:
        self.dataset, self.length = dataset, length

    def __len__(self) -> int:
        return max(len(self.dataset), self.length)

    def __getitem__(self, index: int) -> ClassificationItem:
        if index < len(self.dataset):
            return self.dataset[index]
        item: Any = {**self.dataset[0], "label": torch.tensor(-1)}
        return item
