"""COCO detection (Lin et al., ECCV 2014): boxes of 80 classes of objects, in one JSON file a split."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gingham.data.detection import DetectionDataset, DetectionItem, Transform
from gingham.data.segmentation import read_image, require_folder
from gingham.errors import DataError

#: The classes in the order of their category ids.
COCO_OBJECTS = (
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "airplane",
    "bus",
    "train",
    "truck",
    "boat",
    "traffic light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "bench",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "backpack",
    "umbrella",
    "handbag",
    "tie",
    "suitcase",
    "frisbee",
    "skis",
    "snowboard",
    "sports ball",
    "kite",
    "baseball bat",
    "baseball glove",
    "skateboard",
    "surfboard",
    "tennis racket",
    "bottle",
    "wine glass",
    "cup",
    "fork",
    "knife",
    "spoon",
    "bowl",
    "banana",
    "apple",
    "sandwich",
    "orange",
    "broccoli",
    "carrot",
    "hot dog",
    "pizza",
    "donut",
    "cake",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "laptop",
    "mouse",
    "remote",
    "keyboard",
    "cell phone",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
    "scissors",
    "teddy bear",
    "hair drier",
    "toothbrush",
)

_LISTS = {"images": ("id", "file_name", "width", "height"), "categories": ("id", "name")}
_TEXTS = ("file_name", "name")
_IDS_END = 2**53  # rows of detections are float64, which know every whole number below


class CocoDetection(DetectionDataset):
    """A split in COCO's layout, in the order of its JSON file.

    The layout is ``root/annotations/instances_<split>.json`` with the pictures in ``root/<split>/``. Category ids,
    which need not be contiguous, become labels 1, 2, ... in ascending order. Boxes are clipped to the picture; those
    without an area are left out of what is learned from, as are crowds, which evaluation ignores.

    Args:
        root: the folder of the data set.
        split: such as "train2017" or "val2017".
        only_annotated: leave out pictures in which nothing is to be learned, as the official code of DCR does.
        whole_pixels: truncate the inclusive coordinates of boxes to whole numbers, as that code does.
        transform: applied to each item.

    Raises:
        DataError: a file or folder is missing, or the file is not what COCO's format promises.

    Example:
        >>> dataset = CocoDetection("/data/coco", "val2017")  # doctest: +SKIP
        >>> len(dataset.class_names)  # doctest: +SKIP
        80
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        only_annotated: bool = False,
        whole_pixels: bool = False,
        transform: Transform | None = None,
    ) -> None:
        root = require_folder(Path(root), "COCO's folder with annotations/ and the folders of pictures")
        self.file = root / "annotations" / f"instances_{split}.json"
        self.images = require_folder(root / split, f"the pictures of {self.file.name}")
        content = _read_json(self.file)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        super().__init__(split, [str(category["name"]) for category in categories], transform)
        self.category_ids = tuple(int(category["id"]) for category in categories)
        self._label_of = {identity: label for label, identity in enumerate(self.category_ids, 1)}
        self.whole_pixels = whole_pixels
        self._annotations = _by_image(content, self.file)
        self._entries: list[dict[str, Any]] = content["images"]
        if only_annotated:
            self._entries = [entry for entry in self._entries if self._teaches(entry)]

    def _teaches(self, entry: dict[str, Any]) -> bool:
        return any(not note.get("iscrowd") for note in self._annotations[entry["id"]])

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, index: int) -> DetectionItem:
        entry = self._entries[index]
        path = self.images / entry["file_name"]
        image = read_image(path)
        height, width = image.shape[-2:]
        if (height, width) != (entry["height"], entry["width"]):
            raise DataError(
                f"{path}: is {width}x{height} pixels (width x height), "
                f"{self.file.name} says {entry['width']}x{entry['height']}"
            )
        rows = [self._truth(note, path, width, height) for note in self._annotations[entry["id"]]]
        truth = torch.tensor(rows, dtype=torch.float64).reshape(-1, 7)
        boxes, labels = self._learnable(truth, width, height)
        return {
            "image": image,
            "boxes": boxes,
            "labels": labels,
            "truth": truth,
            "name": Path(entry["file_name"]).stem,
            "image_id": int(entry["id"]),
        }

    def _truth(self, note: dict[str, Any], path: Path, width: int, height: int) -> list[float]:
        """(label, x, y, width, height, area, ignored) of an annotation."""
        where = f"{path}: annotation {note.get('id')} of {self.file.name}"
        box = note.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(_is_number(x) for x in box):
            raise DataError(f"{where} has the bbox {box}, expected four numbers x, y, width, height")
        category = note.get("category_id")
        if not _is_whole(category):
            raise DataError(f"{where} has the category_id {category!r}, expected a whole number")
        if category not in self._label_of:
            raise DataError(f"{where} has the category_id {category}, which no category has")
        x, y, w, h = box
        if w < 0 or h < 0 or x >= width or y >= height or x + w < 0 or y + h < 0:
            raise DataError(f"{where} has the bbox {box}, which lies outside of the picture of {width}x{height} pixels")
        area = note.get("area", w * h)
        if not _is_number(area):
            raise DataError(f"{where} has the area {area}, expected a number")
        return [self._label_of[category], x, y, w, h, area, bool(note.get("iscrowd", 0))]

    def _learnable(self, truth: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
        """Boxes [n, 4] and labels [n] of what a detector learns from."""
        label, x, y, w, h, area, ignored = truth.unbind(1)
        boxes = torch.stack([x, y, x + w.clamp(min=1), y + h.clamp(min=1)], dim=1)
        boxes = boxes.clamp(min=0).minimum(torch.tensor([width, height] * 2, dtype=torch.float64))
        if self.whole_pixels:
            boxes[:, :2] = boxes[:, :2].floor()
            boxes[:, 2:] = (boxes[:, 2:] - 1).floor() + 1  # the last pixel of a box is one less than its edge
        boxes = boxes.float()  # first: a sliver at the border may have a width in double precision only
        kept = (area > 0) & (ignored == 0) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        return boxes[kept], label[kept].long()


def write_coco_results(path: str | Path, detections: Tensor, category_ids: Sequence[int]) -> None:
    """Write detections as the result file that COCO's server and pycocotools read.

    Args:
        path: of the JSON file, replaced as a whole.
        detections: float64 [n, 7], rows (image id, x, y, width, height, score, label).
        category_ids: of the labels 1, 2, ...

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_coco_results(f"{folder}/a.json", torch.tensor([[7.0, 1, 2, 3, 4, 0.5, 1]]), [18])
        ...     print(Path(f"{folder}/a.json").read_text().strip())
        [{"image_id": 7, "category_id": 18, "bbox": [1.0, 2.0, 3.0, 4.0], "score": 0.5}]
    """
    results = [
        {"image_id": int(row[0]), "category_id": category_ids[int(row[6]) - 1], "bbox": row[1:5], "score": row[5]}
        for row in detections.double().tolist()
    ]
    path = Path(path)
    part = path.with_name(f".part-{path.name}")
    part.write_text(json.dumps(results) + "\n")
    part.replace(path)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_json(file: Path) -> Any:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"{file}: no such file, expected the annotations in COCO's format") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not a JSON file ({error})") from None
    names = (*_LISTS, "annotations")
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in names):
        raise DataError(f"{file}: not in COCO's format, which has the lists {', '.join(names)}")
    for name, needed in _LISTS.items():
        for entry in content[name]:
            missing = [key for key in needed if not isinstance(entry, dict) or key not in entry]
            if missing:
                raise DataError(f"{file}: an entry of {name} has no {', '.join(missing)}: {str(entry)[:80]}")
            if not _is_whole(entry["id"]):
                raise DataError(f"{file}: an entry of {name} has the id {entry['id']!r}, expected a whole number")
            if text := next((key for key in _TEXTS if key in needed and not isinstance(entry[key], str)), None):
                raise DataError(f"{file}: an entry of {name} has the {text} {entry[text]!r}, expected a text")
        if len({entry["id"] for entry in content[name]}) < len(content[name]):
            raise DataError(f"{file}: two entries of {name} have the same id")
    if (outside := next((x["id"] for x in content["images"] if not 0 <= x["id"] < _IDS_END), None)) is not None:
        raise DataError(f"{file}: an entry of images has the id {outside}, expected 0 to {_IDS_END - 1}")
    return content


def _by_image(content: Any, file: Path) -> dict[Any, list[dict[str, Any]]]:
    known = {entry["id"] for entry in content["images"]}
    notes: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for note in content["annotations"]:
        if not isinstance(note, dict) or not _is_whole(note.get("image_id")) or note["image_id"] not in known:
            raise DataError(f"{file}: an annotation is of no picture of the file, by image_id: {str(note)[:80]}")
        notes[note["image_id"]].append(note)
    return notes
