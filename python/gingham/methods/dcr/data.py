"""Detection data for training: which data set, in which order, mirrored or not, so that any run can be continued."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch.utils.data import DataLoader, Dataset

from gingham.data.coco_detection import COCO_OBJECTS, CocoDetection
from gingham.data.detection import (
    DetectionDataset,
    DetectionItem,
    DetectionTransform,
    JoinedDetection,
    Transform,
    class_colours,
)
from gingham.data.labels import Colour
from gingham.data.voc_detection import VOC_OBJECTS, VOCDetection
from gingham.data.wardrobe.lookalike_scenes import CLASS_NAMES, LookAlikeScenes
from gingham.errors import DataError
from gingham.methods.resumable_data import ResumableData

DatasetName = Literal["wardrobe_lookalikes", "coco", "voc"]

_SPLITS = ("train", "val", "test")
_CLASS_NAMES = {"wardrobe_lookalikes": CLASS_NAMES, "coco": COCO_OBJECTS, "voc": VOC_OBJECTS}


class DetectionData(ResumableData):
    """A detection data set by name; batches are lists of items.

    Args:
        name: "wardrobe_lookalikes" of the embedded world, or on disk "coco" or "voc".
        root: folder of the data set, as its reader wants it; not for the world.
        also_train: further folders in the same layout, whose training splits are trained on, too, such as that of VOC
            2012 beside 2007.
        splits: what the data set on disk calls its splits for training, validation and test. Where the last two are the
            same, there is no test split of its own, and no state of a training is chosen as the best.
        batch_size: images in a training batch of one process.
        evaluation_batch_size: images in an evaluation batch.
        flip: probability that a training picture is mirrored, 0 to 1.
        only_annotated: "coco" only: leave training pictures out in which there is nothing to learn.
        whole_pixels: "coco" only: truncate boxes to whole pixels, as the official code of DCR does.
        class_names: of the objects, in the order of the labels, where they are not those of the published data set: for
            "voc" as the XML files have them, for "coco" in the order of the category ids.
        workers: processes that load data.
        seed: of order and mirroring, any whole number.
        lengths: the world only: pictures in train, val and test.

    Raises:
        ValueError: a number outside its range, or an option that this data set does not have.
        DataError: when a split is opened: `root` is missing, or not what the reader expects.
    """

    #: What is said where training keeps no best state, see `has_validation`.
    without_validation = "validation is the test (data.splits), no state is the best"

    def __init__(
        self,
        name: DatasetName = "wardrobe_lookalikes",
        root: str | None = None,
        also_train: tuple[str, ...] = (),
        splits: tuple[str, str, str] = _SPLITS,
        batch_size: int = 2,
        evaluation_batch_size: int = 1,
        flip: float = 0.5,
        only_annotated: bool = True,
        whole_pixels: bool = False,
        class_names: tuple[str, ...] | None = None,
        workers: int = 0,
        seed: int = 0,
        lengths: tuple[int, int, int] = (600, 200, 500),
    ) -> None:
        super().__init__(batch_size, evaluation_batch_size, workers, seed)
        if name not in get_args(DatasetName):
            raise ValueError(f"name must be one of {', '.join(get_args(DatasetName))}, got {name!r}")
        if min(lengths) < 0:
            raise ValueError(f"lengths must be 0 or more, got {min(lengths)}")
        for option, names in (("splits", splits), ("lengths", lengths)):
            if len(names) != 3:
                raise ValueError(f"{option} must be three, for train, val and test, got {tuple(names)}")
        embedded, on_disk = name == "wardrobe_lookalikes", f"the data sets on disk, not of {name}"
        for option, does_nothing, owner in (
            ("root", embedded and root is not None, on_disk),
            ("also_train", embedded and len(also_train) > 0, on_disk),
            ("splits", embedded and tuple(splits) != _SPLITS, on_disk),
            ("class_names", embedded and class_names is not None, on_disk),
            ("only_annotated", name != "coco" and not only_annotated, f"coco, not of {name}"),
            ("whole_pixels", name != "coco" and whole_pixels, f"coco, not of {name}"),
        ):
            if does_nothing:
                raise ValueError(f"{option} is an option of {owner}; leave it out")
        self.name: DatasetName = name
        self.root, self.also_train = root, tuple(also_train)
        self._names = dict(zip(_SPLITS, splits, strict=True))
        self.lengths = dict(zip(_SPLITS, lengths, strict=True))
        self.only_annotated, self.whole_pixels = only_annotated, whole_pixels
        self.class_names = tuple(class_names or _CLASS_NAMES[name])
        self.augment = DetectionTransform(flip)
        self.evaluate = DetectionTransform()
        self._datasets: dict[str, DetectionDataset] = {}

    @property
    def palette(self) -> tuple[Colour, ...]:
        """One colour for each class of objects."""
        return class_colours(len(self.class_names))

    @property
    def has_validation(self) -> bool:
        """Whether there are images for validation that are not those of the test."""
        return self._names["val"] != self._names["test"]

    def splits(self) -> tuple[str, ...]:
        """The splits that have images of their own."""
        return tuple(split for split in self._names if split != "test" or self.has_validation)

    def dataset(self, split: str) -> DetectionDataset:
        """The data set of "train", "val" or "test", with its transform. Kept once made."""
        if split not in self._datasets:
            self._datasets[split] = self.open(split)
        return self._datasets[split]

    def open(self, split: str, *, require_labels: bool = True) -> DetectionDataset:
        """A split, read anew.

        Raises:
            DataError: a folder or file is missing, or the classes are not those expected.
        """
        transform = self.augment if split == "train" else self.evaluate
        if self.name == "wardrobe_lookalikes":
            return LookAlikeScenes(split, self.lengths[split], cache=True, transform=transform)
        if self.root is None:
            raise DataError(f"data.root is not set: give the folder of {self.name} with --data.root DIR")
        first = self._files(self.root, split, require_labels, transform)
        if split != "train" or not self.also_train:
            return first
        others = [self._files(root, split, require_labels, transform) for root in self.also_train]
        return JoinedDetection([first, *others], transform)

    def _files(self, root: str, split: str, require_labels: bool, transform: Transform) -> DetectionDataset:
        name = self._names[split]
        if self.name == "voc":
            return VOCDetection(
                root, name, class_names=self.class_names, require_annotations=require_labels, transform=transform
            )
        only_annotated = self.only_annotated and split == "train"
        dataset = CocoDetection(
            root, name, only_annotated=only_annotated, whole_pixels=self.whole_pixels, transform=transform
        )
        if dataset.class_names != self.class_names:
            raise DataError(
                f"{dataset.file}: its categories are {', '.join(dataset.class_names)}; name them with "
                "--data.class_names and give --model.network.num_classes"
            )
        return dataset

    def setup(self, stage: str) -> None:
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ()):
            if len(self.dataset(split)) == 0:
                raise DataError(f"the {split} split of {self.name} has no images")

    def train_dataloader(self) -> DataLoader[DetectionItem]:
        return self.training_loader(self.dataset("train"), collate=list)

    def _evaluation_loader(self, split: str) -> DataLoader[DetectionItem]:
        _, processes = self.process()
        return self.evaluation_loader(FilledUp(self.dataset(split), processes), collate=list)

    def val_dataloader(self) -> DataLoader[DetectionItem]:
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[DetectionItem]:
        return self._evaluation_loader("test")


class FilledUp(Dataset[DetectionItem]):
    """A data set of at least `length` items; those that it has not got are its first with the id -1, not to be counted.

    With as many items as processes, every process has one: those without would leave the others waiting.
    """

    def __init__(self, dataset: DetectionDataset, length: int) -> None:
        self.dataset, self.length = dataset, length

    def __len__(self) -> int:
        return max(len(self.dataset), self.length)

    def __getitem__(self, index: int) -> DetectionItem:
        if index < len(self.dataset):
            return self.dataset[index]
        item: Any = {**self.dataset[0], "image_id": -1}
        return item
