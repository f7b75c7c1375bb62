"""Data sets in their published folder layouts, transforms, and the embedded world.

Every segmentation data set yields `SegmentationItem` dictionaries and carries its `LabelSpace`; see
`gingham.data.segmentation`. Every detection data set yields `DetectionItem` dictionaries; see `gingham.data.detection`.
Every classification data set yields `ClassificationItem` dictionaries; see `gingham.data.classification`.
Those of re-identification yield `PersonItem` or `TrackletItem` dictionaries; see `gingham.data.reid`.
Nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gingham.data.ade20k import ADE20K
    from gingham.data.check import check_dataset
    from gingham.data.cifar import CIFAR
    from gingham.data.cityscapes import Cityscapes
    from gingham.data.classification import ClassificationDataset, ClassificationItem
    from gingham.data.coco_detection import CocoDetection
    from gingham.data.detection import DetectionDataset, DetectionItem
    from gingham.data.episodes import EpisodeDataset, RandomEpisodes
    from gingham.data.fashion_mnist import FashionMNIST, PackagedGarments
    from gingham.data.image_folder import ImageFolder
    from gingham.data.labels import IGNORE_INDEX, LabelSpace
    from gingham.data.lip import LIP
    from gingham.data.market1501 import DukeMTMCReID, Market1501
    from gingham.data.mars import MARS, DukeMTMCVideoReID
    from gingham.data.pascal_context import PascalContext
    from gingham.data.points import WithPoints, read_points
    from gingham.data.reid import PersonDataset, PersonItem, TrackletDataset, TrackletItem
    from gingham.data.segmentation import SegmentationDataset, SegmentationItem
    from gingham.data.voc import VOCImageTags, VOCSegmentation
    from gingham.data.voc_detection import VOCDetection
    from gingham.data.wardrobe import (
        CategoryScenes,
        CueScenes,
        Dolls,
        GarmentScenes,
        LookAlikeScenes,
        PersonImages,
        PointScenes,
        ScaleScenes,
        TagScenes,
        Tracklets,
    )

_HOME = {
    "ADE20K": "ade20k",
    "check_dataset": "check",
    "CIFAR": "cifar",
    "Cityscapes": "cityscapes",
    "ClassificationDataset": "classification",
    "ClassificationItem": "classification",
    "CocoDetection": "coco_detection",
    "DetectionDataset": "detection",
    "DetectionItem": "detection",
    "EpisodeDataset": "episodes",
    "RandomEpisodes": "episodes",
    "FashionMNIST": "fashion_mnist",
    "PackagedGarments": "fashion_mnist",
    "ImageFolder": "image_folder",
    "CategoryScenes": "wardrobe",
    "CueScenes": "wardrobe",
    "Dolls": "wardrobe",
    "GarmentScenes": "wardrobe",
    "LookAlikeScenes": "wardrobe",
    "PersonImages": "wardrobe",
    "PointScenes": "wardrobe",
    "ScaleScenes": "wardrobe",
    "TagScenes": "wardrobe",
    "Tracklets": "wardrobe",
    "IGNORE_INDEX": "labels",
    "LabelSpace": "labels",
    "LIP": "lip",
    "DukeMTMCReID": "market1501",
    "DukeMTMCVideoReID": "mars",
    "Market1501": "market1501",
    "MARS": "mars",
    "PascalContext": "pascal_context",
    "PersonDataset": "reid",
    "PersonItem": "reid",
    "read_points": "points",
    "SegmentationDataset": "segmentation",
    "SegmentationItem": "segmentation",
    "TrackletDataset": "reid",
    "TrackletItem": "reid",
    "VOCDetection": "voc_detection",
    "VOCImageTags": "voc",
    "VOCSegmentation": "voc",
    "WithPoints": "points",
}

__all__ = [
    "ADE20K",
    "CIFAR",
    "IGNORE_INDEX",
    "LIP",
    "MARS",
    "CategoryScenes",
    "Cityscapes",
    "ClassificationDataset",
    "ClassificationItem",
    "CocoDetection",
    "CueScenes",
    "DetectionDataset",
    "DetectionItem",
    "Dolls",
    "DukeMTMCReID",
    "DukeMTMCVideoReID",
    "EpisodeDataset",
    "FashionMNIST",
    "GarmentScenes",
    "ImageFolder",
    "LabelSpace",
    "LookAlikeScenes",
    "Market1501",
    "PackagedGarments",
    "PascalContext",
    "PersonDataset",
    "PersonImages",
    "PersonItem",
    "PointScenes",
    "RandomEpisodes",
    "ScaleScenes",
    "SegmentationDataset",
    "SegmentationItem",
    "TagScenes",
    "TrackletDataset",
    "TrackletItem",
    "Tracklets",
    "VOCDetection",
    "VOCImageTags",
    "VOCSegmentation",
    "WithPoints",
    "check_dataset",
    "read_points",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
