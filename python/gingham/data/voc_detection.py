"""PASCAL VOC detection (Everingham et al., IJCV 2010): boxes of 20 classes of objects, one XML file a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import torch

from gingham.data.detection import DetectionDataset, DetectionItem, Transform, truth_of
from gingham.data.name_list import IMAGE_SUFFIXES, read_names
from gingham.data.segmentation import read_image, require_folder
from gingham.errors import DataError

#: The classes by the names that stand in the XML files, in the alphabetical order of the development kit.
VOC_OBJECTS = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)


class VOCDetection(DetectionDataset):
    """A split in the layout of the VOC development kit, in the order of its list.

    The layout is ``root/JPEGImages/<name>.jpg`` with ``root/Annotations/<name>.xml`` and the list of names
    ``root/ImageSets/Main/<split>.txt``. Images may also end in .jpeg or .png. The coordinates in the files are
    1-based, both ends included. Difficult objects are not learned from, and evaluation ignores them.

    Args:
        root: the folder ``VOCdevkit/VOC2007``, or another year's.
        split: "train", "val", "trainval", "test", or another list in ``ImageSets/Main``.
        class_names: as the XML files call them, in the order of the labels 1, 2, ...
        require_annotations: whether the image and the XML file of every name must be there now. If not, reading those
            that miss one is an error, so that `gingham.data.check_dataset` lists them all.
        transform: applied to each item.

    Raises:
        DataError: a folder, the list or a required file is missing.

    Example:
        >>> dataset = VOCDetection("/data/VOCdevkit/VOC2007", "trainval")  # doctest: +SKIP
        >>> len(dataset)  # doctest: +SKIP
        5011
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        class_names: Sequence[str] = VOC_OBJECTS,
        require_annotations: bool = True,
        transform: Transform | None = None,
    ) -> None:
        super().__init__(split, class_names, transform)
        root = require_folder(Path(root), "a VOC folder with JPEGImages/, Annotations/ and ImageSets/Main/")
        self.images = require_folder(root / "JPEGImages", "the pictures, *.jpg")
        self.annotations = require_folder(root / "Annotations", "the annotations, *.xml")
        name_list = root / "ImageSets" / "Main" / f"{split}.txt"
        self.names = read_names(name_list)
        self._label_of = {name: label for label, name in enumerate(self.class_names, 1)}
        if require_annotations:
            needed = (path for name in self.names for path in (self._image(name), self._annotation(name)))
            if missing := next((path for path in needed if not path.is_file()), None):
                raise DataError(f"{missing}: no such file, but {name_list} names it")

    def _image(self, name: str) -> Path:
        candidates = [self.images / f"{name}{suffix}" for suffix in IMAGE_SUFFIXES]
        return next((path for path in candidates if path.is_file()), candidates[0])

    def _annotation(self, name: str) -> Path:
        return self.annotations / f"{name}.xml"

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> DetectionItem:
        name = self.names[index]
        image = read_image(self._image(name))
        file = self._annotation(name)
        objects = [self._object(entry, file, image.shape[-2:]) for entry in _objects(file)]
        boxes = torch.tensor([box for box, _, _ in objects], dtype=torch.float32).reshape(-1, 4)
        labels = torch.tensor([label for _, label, _ in objects], dtype=torch.int64)
        difficult = torch.tensor([hard for _, _, hard in objects], dtype=torch.bool)
        return {
            "image": image,
            "boxes": boxes[~difficult],
            "labels": labels[~difficult],
            "truth": truth_of(boxes, labels, difficult),
            "name": name,
            "image_id": index,
        }

    def _object(
        self, entry: ElementTree.Element, file: Path, size: Sequence[int]
    ) -> tuple[tuple[float, float, float, float], int, bool]:
        """Box, label, and whether it is difficult."""
        name = (entry.findtext("name") or "").strip()
        if name not in self._label_of:
            raise DataError(f"{file}: an object is called {name!r}, expected one of {', '.join(self.class_names)}")
        texts = [entry.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
        try:
            x1, y1, x2, y2 = (float(text or "") for text in texts)
        except ValueError:
            raise DataError(f"{file}: a {name} has the bndbox {texts}, expected xmin, ymin, xmax and ymax") from None
        height, width = size
        if not (1 <= x1 <= x2 <= width and 1 <= y1 <= y2 <= height):
            raise DataError(
                f"{file}: a {name} has the bndbox {texts}, which is not within the picture of {width}x{height} pixels"
            )
        return (x1 - 1, y1 - 1, x2, y2), self._label_of[name], (entry.findtext("difficult") or "0").strip() == "1"


def _objects(file: Path) -> list[ElementTree.Element]:
    try:
        return ElementTree.parse(file).getroot().findall("object")
    except FileNotFoundError:
        raise DataError(f"{file}: no such file, expected the annotation of a picture") from None
    except (ElementTree.ParseError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not an XML file ({error})") from None
