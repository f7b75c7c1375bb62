"""Data sets in their published folder layouts, transforms, and the embedded world.

Every segmentation data set yields `SegmentationItem` dictionaries and carries its `LabelSpace`; see
`gingham.data.segmentation`. Every detection data set yields `DetectionItem` dictionaries; see `gingham.data.detection`.
Nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gingham.data.ade20k import ADE20K
    from gingham.data.check import check_dataset
    from gingham.data.cityscapes import Cityscapes
    from gingham.data.coco_detection import CocoDetection
    from gingham.data.detection import DetectionDataset, DetectionItem
    from gingham.data.episodes import EpisodeDataset, RandomEpisodes
    from gingham.data.labels import IGNORE_INDEX, LabelSpace
    from gingham.data.lip import LIP
    from gingham.data.pascal_context import PascalContext
    from gingham.data.points import WithPoints, read_points
    from gingham.data.segmentation import SegmentationDataset, SegmentationItem
    from gingham.data.voc import VOCImageTags, VOCSegmentation
    from gingham.data.voc_detection import VOCDetection
    from gingham.data.wardrobe import (
        CategoryScenes,
        CueScenes,
        Dolls,
        GarmentScenes,
        LookAlikeScenes,
        PointScenes,
        ScaleScenes,
        TagScenes,
    )

_HOME = {
    "ADE20K": "ade20k",
    "check_dataset": "check",
    "Cityscapes": "cityscapes",
    "CocoDetection": "coco_detection",
    "DetectionDataset": "detection",
    "DetectionItem": "detection",
    "EpisodeDataset": "episodes",
    "RandomEpisodes": "episodes",
    "CategoryScenes": "wardrobe",
    "CueScenes": "wardrobe",
    "Dolls": "wardrobe",
    "GarmentScenes": "wardrobe",
    "LookAlikeScenes": "wardrobe",
    "PointScenes": "wardrobe",
    "ScaleScenes": "wardrobe",
    "TagScenes": "wardrobe",
    "IGNORE_INDEX": "labels",
    "LabelSpace": "labels",
    "LIP": "lip",
    "PascalContext": "pascal_context",
    "read_points": "points",
    "SegmentationDataset": "segmentation",
    "SegmentationItem": "segmentation",
    "VOCDetection": "voc_detection",
    "VOCImageTags": "voc",
    "VOCSegmentation": "voc",
    "WithPoints": "points",
}

__all__ = [
    "ADE20K",
    "IGNORE_INDEX",
    "LIP",
    "CategoryScenes",
    "Cityscapes",
    "CocoDetection",
    "CueScenes",
    "DetectionDataset",
    "DetectionItem",
    "Dolls",
    "EpisodeDataset",
    "GarmentScenes",
    "LabelSpace",
    "LookAlikeScenes",
    "PascalContext",
    "PointScenes",
    "RandomEpisodes",
    "ScaleScenes",
    "SegmentationDataset",
    "SegmentationItem",
    "TagScenes",
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
