"""Segmentation data for training: which data set, in which order, augmented how, so that any run can be continued."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from gingham.data import ADE20K, Cityscapes, CueScenes, SegmentationDataset, VOCImageTags, VOCSegmentation
from gingham.data.ade20k import ADE20K_LABELS
from gingham.data.atr import ATR_LABELS
from gingham.data.cityscapes import CITYSCAPES_LABELS
from gingham.data.labels import LabelSpace, bit_interleaved_palette
from gingham.data.lip import CIHP_LABELS, LIP, LIP_LABELS
from gingham.data.name_list import read_names
from gingham.data.pascal_context import PASCAL_CONTEXT_ALPHABETICAL_LABELS, PASCAL_CONTEXT_LABELS, PascalContext
from gingham.data.person_part import PERSON_PART_LABELS
from gingham.data.person_warp import PersonAugmentation
from gingham.data.points import PointGenerator, PointSource, WithPoints, collate_points, point_agreement, read_points
from gingham.data.segmentation import FolderSegmentation, SegmentationItem, Transform
from gingham.data.transforms import (
    EvaluationTransform,
    Normalize,
    RandomScale,
    RandomScaleCropFlip,
    bgr_mean_normalize,
    imagenet_normalize,
)
from gingham.data.voc import VOC_LABELS, name_list_of
from gingham.data.wardrobe import CUE_LABELS
from gingham.data.wardrobe.dolls import DOLL_LABELS, Dolls
from gingham.data.wardrobe.point_scenes import POINT_SCENE_LABELS, PointScenes
from gingham.data.wardrobe.scale_scenes import SCALE_LABELS, ScaleScenes
from gingham.data.wardrobe.tag_scenes import TAG_SCENE_LABELS, TagScenes
from gingham.errors import DataError
from gingham.methods.resumable_data import ResumableData

DatasetName = Literal[
    "wardrobe",
    "wardrobe_scales",
    "wardrobe_points",
    "wardrobe_dolls",
    "wardrobe_tags",
    "cityscapes",
    "ade20k",
    "voc",
    "voc_tags",
    "pascal_context",
    "lip",
    "cihp",
    "atr",
    "person_part",
]

_READERS: dict[str, Any] = {
    "cityscapes": Cityscapes,
    "ade20k": ADE20K,
    "voc": VOCSegmentation,
    "voc_tags": VOCImageTags,
    "pascal_context": PascalContext,
    "lip": LIP,
    "cihp": LIP,
    "atr": LIP,
    "person_part": LIP,
}

_LABELS = {
    "wardrobe": CUE_LABELS,
    "wardrobe_scales": SCALE_LABELS,
    "wardrobe_points": POINT_SCENE_LABELS,
    "wardrobe_dolls": DOLL_LABELS,
    "wardrobe_tags": TAG_SCENE_LABELS,
    "cityscapes": CITYSCAPES_LABELS,
    "ade20k": ADE20K_LABELS,
    "voc": VOC_LABELS,
    "voc_tags": VOC_LABELS,
    "pascal_context": PASCAL_CONTEXT_LABELS,
    "pascal_context_alphabetical": PASCAL_CONTEXT_ALPHABETICAL_LABELS,
    "lip": LIP_LABELS,
    "cihp": CIHP_LABELS,
    "atr": ATR_LABELS,
    "person_part": PERSON_PART_LABELS,
}

_SCALES = (0.7, 2.1, 0.1)

_NORMALIZATIONS: dict[str, Callable[[], Normalize]] = {
    "imagenet": imagenet_normalize,
    "imagenet_bgr": partial(imagenet_normalize, channels="BGR"),
    "bgr": bgr_mean_normalize,
}


class FilledUp(Dataset[SegmentationItem]):
    """A data set of at least `length` items; those that it has not got are copies of its first without any label.

    Their tags, in data sets that have tags, are -1.

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
        if "tags" in item:
            item = {**item, "tags": torch.full_like(item["tags"], -1)}
        return {**item, "label": torch.full_like(item["label"], self.dataset.ignore_index)}


def _own_labels(names: tuple[str, ...]) -> LabelSpace:
    pairs = tuple(
        (names.index(name), names.index(f"right {name.removeprefix('left ')}"))
        for name in names
        if name.startswith("left ") and f"right {name.removeprefix('left ')}" in names
    )
    return LabelSpace(names, bit_interleaved_palette(len(names)), mirror_pairs=pairs)


class SegmentationData(ResumableData):
    """A segmentation data set by name.

    Args:
        name: of the embedded world "wardrobe" (scenes with a cue), "wardrobe_scales" (garments at three scales),
            "wardrobe_points" (one labelled pixel an object), "wardrobe_tags" (image-level labels) or "wardrobe_dolls"
            (human parsing); or a data set on disk: "cityscapes", "ade20k", "voc", "voc_tags" (image-level labels),
            "pascal_context", "lip", "cihp", "atr" or "person_part".
        root: folder of the data set, as its reader wants it; not for the world.
        batch_size: images in a training batch of one process.
        evaluation_batch_size: images in an evaluation batch.
        crop: side of the training crop, or (rows, columns).
        scales: (low, high, step) of the random scale, or None.
        short_side: pixels of a training picture's shorter side before it is cropped, instead of a random scale.
        augmentation: "crop" (random scale and crop, `gingham.data.transforms.RandomScaleCropFlip`) or "person" (the
            whole picture scaled and rotated, `gingham.data.person_warp.PersonAugmentation`; it takes no `scales`).
        flip: probability that a training picture is mirrored.
        normalization: "imagenet" (RGB, mean and standard deviation), "imagenet_bgr" (the same in the order BGR) or
            "bgr" (BGR minus mean, as CCNet's official weights).
        points: what is known of a training picture's labels: all (None), the pixels in a point file
            (`gingham.data.points`), one drawn pixel "per_class" or "per_region", or "instances", the points of
            "wardrobe_points". With a point file, training images need no label files.
        point_crop: cut training crops where at least one point is.
        workers: processes that load data.
        seed: of order, augmentation and drawn points, any whole number.
        train_list: "voc" only: the list in ``ImageSets/Segmentation`` that training takes instead of "train".
        label_folder: "voc" only: the folder of the training labels, in the root or anywhere else, instead of
            ``SegmentationClass``: seed labels that were made from attention, for example.
        lengths: of the world: pictures in train, val and test. Data sets on disk are as long as they are.
        noise: "wardrobe_dolls" only: whether the labels of the training split are noisy.
        classes: of the files, where they are not those of `name`: the name of another data set, or names of your own
            for the values 0, 1, ... of which "left ..." and "right ..." change places in mirrored pictures.

    Raises:
        ValueError: a number outside its range, an unknown name, or an option that would do nothing with the others.
        DataError: when a split is opened: `root` is missing, or not what the reader expects.

    Source: the layouts are those of the data sets; the crop and the scales are CCNet's.

    Example:
        >>> data = SegmentationData("wardrobe_dolls", crop=(64, 32), scales=None, lengths=(4, 2, 2))
        >>> next(iter(data.train_dataloader()))["image"].shape
        torch.Size([2, 3, 64, 32])
    """

    def __init__(
        self,
        name: DatasetName = "wardrobe",
        root: str | None = None,
        batch_size: int = 2,
        evaluation_batch_size: int = 1,
        crop: int | tuple[int, int] = 769,
        scales: tuple[float, float, float] | None = _SCALES,
        short_side: int | None = None,
        augmentation: Literal["crop", "person"] = "crop",
        flip: float = 0.5,
        normalization: Literal["imagenet", "imagenet_bgr", "bgr"] = "imagenet",
        points: str | None = None,
        point_crop: bool = False,
        workers: int = 0,
        seed: int = 0,
        train_list: str | None = None,
        label_folder: str | None = None,
        lengths: tuple[int, int, int] = (1600, 300, 500),
        noise: bool = True,
        classes: str | tuple[str, ...] | None = None,
    ) -> None:
        super().__init__(batch_size, evaluation_batch_size, workers, seed)
        if min(lengths) < 0:
            raise ValueError(f"lengths must be 0 or more, got {min(lengths)}")
        if augmentation not in ("crop", "person"):
            raise ValueError(f"augmentation must be 'crop' or 'person', got {augmentation!r}")
        if normalization not in _NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {', '.join(_NORMALIZATIONS)}, got {normalization!r}")
        if name not in get_args(DatasetName):
            raise ValueError(f"name must be one of {', '.join(get_args(DatasetName))}, got {name!r}")
        if isinstance(classes, str) and classes not in _LABELS:
            raise ValueError(f"classes must be names of your own or one of {', '.join(_LABELS)}, got {classes!r}")
        if points is not None and augmentation == "person":
            raise ValueError("points cannot be augmented with augmentation 'person'; take 'crop'")
        if points == "instances" and name != "wardrobe_points":
            raise ValueError(f"points 'instances' are those of wardrobe_points, got them for {name}")
        embedded, on_disk = name not in _READERS, f"the data sets on disk, not of {name}"
        for option, does_nothing, owner in (
            ("root", embedded and root is not None, on_disk),
            ("classes", embedded and classes is not None, on_disk),
            ("train_list", name != "voc" and train_list is not None, f"voc, not of {name}"),
            ("label_folder", name != "voc" and label_folder is not None, f"voc, not of {name}"),
            ("noise", name != "wardrobe_dolls" and not noise, f"wardrobe_dolls, not of {name}"),
            ("point_crop", point_crop and points is None, "trainings from points"),
            ("scales", augmentation == "person" and scales not in (None, _SCALES), "the augmentation 'crop'"),
        ):
            if does_nothing:
                raise ValueError(f"{option} is an option of {owner}; leave it out")
        if short_side is not None and (scales or points or augmentation == "person" or short_side < 1):
            raise ValueError(
                f"short_side must be 1 or more, with neither scales, points nor augmentation 'person', got {short_side}"
            )
        self.train_list, self.label_folder = train_list, label_folder
        self.name: DatasetName = name
        self.root = root
        self.lengths, self.noise = dict(zip(("train", "val", "test"), lengths, strict=True)), noise
        self.points = points
        named = classes is None or isinstance(classes, str)
        self.labels: LabelSpace = _LABELS[str(classes or name)] if named else _own_labels(tuple(classes or ()))
        normalize = _NORMALIZATIONS[normalization]()
        crop_size = crop if isinstance(crop, int) else (crop[0], crop[1])
        pairs = self.labels.mirror_pairs
        rescale: v2.Transform | None = RandomScale(*scales) if scales else None
        if short_side is not None:
            rescale = v2.RandomShortestSize(short_side)
        self.augment: Transform = (
            PersonAugmentation(crop_size, flip_probability=flip, mirror_pairs=pairs, normalize=normalize)
            if augmentation == "person"
            else RandomScaleCropFlip(
                crop_size,
                rescale=rescale,
                flip_probability=flip,
                mirror_pairs=pairs,
                normalize=normalize,
                point_crop=point_crop,
            )
        )
        self.evaluate = EvaluationTransform(normalize=normalize)
        self._datasets: dict[str, SegmentationDataset] = {}

    def dataset(self, split: str) -> SegmentationDataset:
        """The data set of "train", "val" or "test", with its transform. Kept once made."""
        if split not in self._datasets:
            self._datasets[split] = self.open(split, require_labels=not self._does_without_labels(split))
        return self._datasets[split]

    def open(self, split: str, *, require_labels: bool = True) -> SegmentationDataset:
        """A split, read anew.

        Raises:
            DataError: a folder is missing, or an image has no label although `require_labels`.
        """
        transform = self.augment if split == "train" else self.evaluate
        dataset = (
            self._world(split, transform)
            if self.name not in _READERS
            else self._files(split, require_labels, transform)
        )
        return WithPoints(dataset, self._points(dataset)) if self.points and split == "train" else dataset

    def require_training_labels(self) -> None:
        """For trainings that learn the labels of pixels, even where the data set has points.

        Raises:
            DataError: a training image has no label.
        """
        if self._does_without_labels("train"):
            self.open("train")

    def _does_without_labels(self, split: str) -> bool:
        """Whether images need no label files, as all that is to be known of them stands in a point file."""
        return split == "train" and self.points not in (None, "per_class", "per_region", "instances")

    def _world(self, split: str, transform: Transform) -> SegmentationDataset:
        length = self.lengths[split]
        if self.name == "wardrobe_dolls":
            return Dolls(split, length, noise=self.noise and split == "train", cache=True, transform=transform)
        if self.name == "wardrobe_points":
            return PointScenes(split, length, cache=True, transform=transform)
        if self.name == "wardrobe_tags":
            return TagScenes(split, length, cache=True, transform=transform)
        if self.name == "wardrobe_scales":
            return ScaleScenes(split, length, cache=True, transform=transform)
        return CueScenes(split, length, cache=True, transform=transform)

    def _files(self, split: str, require_labels: bool, transform: Transform) -> SegmentationDataset:
        reader = _READERS[self.name]
        if not self._has_test_split() and split == "test":
            split = "val"
        options: dict[str, Any] = {"labels": self.labels, "require_labels": require_labels, "transform": transform}
        labels_are_optional = self._does_without_labels(split)
        if split == "train" and self.label_folder is not None:
            options["label_folder"] = self.label_folder
        if split == "train" and self.train_list is not None:
            split = self.train_list
        dataset: FolderSegmentation = reader(self._root(), split, **options)
        if labels_are_optional:
            dataset.labels_expected = False
        return dataset

    def _points(self, dataset: SegmentationDataset) -> PointSource:
        match self.points:
            case "per_class" | "per_region" as rule:
                return PointGenerator(rule, seed=abs(self.seed))
            case "instances":
                assert isinstance(dataset, PointScenes)
                return dataset.points
            case file:
                assert file is not None
                return read_points(file)

    def _root(self) -> Path:
        if self.root is None:
            raise DataError(f"data.root is not set: give the folder of {self.name} with --data.root DIR")
        return Path(self.root)

    def _has_test_split(self) -> bool:
        """Whether there is a test split. Published ones but that of Cityscapes count only where they have labels."""
        if self.name not in _READERS:
            return True
        root = self._root()
        if self.name == "cityscapes":
            return (root / "leftImg8bit" / "test").is_dir()
        if self.name == "voc_tags":
            return name_list_of(root, "test_cls").is_file()
        if self.name in ("voc", "pascal_context"):
            kind = {"voc": "", "pascal_context": "Context"}[self.name]
            lists = name_list_of(root, "test", kind)
            labels = root / f"SegmentationClass{kind}"
            return lists.is_file() and (labels / f"{read_names(lists)[0]}.png").is_file()
        return self.name != "ade20k" and (root / "test_segmentations").is_dir()

    def splits(self) -> tuple[str, ...]:
        """The splits that have images of their own; "test" is the validation split of the other data sets."""
        return ("train", "val", "test") if self._has_test_split() else ("train", "val")

    def label_space(self) -> LabelSpace:
        """The classes, known without opening the data set."""
        return self.labels

    def setup(self, stage: str) -> None:
        if stage == "fit" and isinstance(source := self.dataset("train"), WithPoints):
            self._require_points_on_their_classes(source)
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ()):
            if len(self.dataset(split)) == 0:
                raise DataError(f"the {split} split of {self.name} has no images")

    def _require_points_on_their_classes(self, dataset: WithPoints) -> None:
        """Points of which most lie on other classes are in another order, or number the classes otherwise."""
        looked_at = range(0, len(dataset), max(1, len(dataset) // 20))
        found = point_agreement(dataset, looked_at)
        if found.labelled and found.agreeing < found.labelled / 2:
            raise DataError(
                f"{self.points}: only {found.agreeing} of {found.labelled} points looked at lie on their own class; "
                "are they of these images, in the order c,y,x, and do labels and points number the classes alike?"
            )

    def train_dataloader(self) -> DataLoader[SegmentationItem]:
        return self.training_loader(self.dataset("train"), collate=collate_points if self.points else None)

    def _evaluation_loader(self, split: str) -> DataLoader[SegmentationItem]:
        _, processes = self.process()
        return self.evaluation_loader(FilledUp(self.dataset(split), processes))

    def val_dataloader(self) -> DataLoader[SegmentationItem]:
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[SegmentationItem]:
        return self._evaluation_loader("test")
