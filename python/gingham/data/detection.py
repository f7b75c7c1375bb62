"""What every detection data set is: pictures, boxes with classes, and the truth that evaluation counts against."""

from __future__ import annotations

import bisect
import colorsys
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from gingham.data.labels import Colour


class DetectionItem(TypedDict):
    """One picture with its objects.

    `image` is uint8 RGB [3, H, W] (float32, 0 to 1, after a transform). `boxes` float32 [n, 4] are (x1, y1, x2, y2) in
    pixels, x2 - x1 being the width: a box around the first pixel alone is (0, 0, 1, 1). `labels` int64 [n] are 1 to C;
    0 is background. Both hold what a detector learns from, without crowds and difficult objects. `truth` float64 [m, 7]
    holds all that is annotated, as evaluation wants it and untouched by transforms: (label, x, y, width, height, area,
    ignored). `name` and `image_id` are unique within the split.
    """

    image: torch.Tensor
    boxes: torch.Tensor
    labels: torch.Tensor
    truth: torch.Tensor
    name: str
    image_id: int


class Detections(NamedTuple):
    """What is found in one image, the highest score first."""

    boxes: torch.Tensor  # [n, 4], (x1, y1, x2, y2) in pixels of the image
    labels: torch.Tensor  # [n], 1 to C
    scores: torch.Tensor  # [n], 0 to 1

    def above(self, threshold: float) -> Detections:
        """Those whose score is above a threshold."""
        which = self.scores > threshold
        return Detections(self.boxes[which], self.labels[which], self.scores[which])

    def cpu(self) -> Detections:
        """The same in the memory of the CPU."""
        return Detections(self.boxes.cpu(), self.labels.cpu(), self.scores.cpu())


Transform = Callable[[DetectionItem], DetectionItem]


class DetectionDataset(Dataset[DetectionItem], ABC):
    """A sized collection of `DetectionItem`, with the classes that its labels stand for.

    Args:
        split: the name of the split.
        class_names: of the labels 1, 2, ...
        transform: applied to each item on its way out.
    """

    def __init__(self, split: str, class_names: Sequence[str], transform: Transform | None = None) -> None:
        self.split = split
        self.class_names = tuple(class_names)
        #: What result files call the labels 1, 2, ...
        self.category_ids = tuple(range(1, len(self.class_names) + 1))
        self.transform = transform

    @property
    def palette(self) -> tuple[Colour, ...]:
        """One colour for each class."""
        return class_colours(len(self.class_names))

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> DetectionItem:
        """The item as it is stored, before any transform."""

    def __getitem__(self, index: int) -> DetectionItem:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} out of range for {len(self)} items")
        item = self.read(index % len(self))
        return item if self.transform is None else self.transform(item)


class JoinedDetection(DetectionDataset):
    """Data sets of the same classes one after the other, such as VOC 2007 and 2012; image ids are those of each.

    Args:
        parts: one or more.
        transform: applied to each item; the parts' own are not.

    Raises:
        ValueError: no parts, or parts of other classes.
    """

    def __init__(self, parts: Sequence[DetectionDataset], transform: Transform | None = None) -> None:
        if not parts or any(part.class_names != parts[0].class_names for part in parts):
            raise ValueError(f"parts must be data sets of the same classes, got {[part.class_names for part in parts]}")
        super().__init__(parts[0].split, parts[0].class_names, transform)
        self.parts = tuple(parts)
        self._ends = list(itertools.accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> DetectionItem:
        number = bisect.bisect_right(self._ends, index)
        return self.parts[number].read(index - (self._ends[number - 1] if number else 0))


def class_colours(count: int) -> tuple[Colour, ...]:
    """One bright colour for each of `count` classes; the hues of successive classes lie far apart.

    Example:
        >>> class_colours(2)
        ((255, 77, 77), (77, 129, 255))
    """
    golden = (5**0.5 - 1) / 2
    colours = (colorsys.hsv_to_rgb(index * golden % 1, 0.7, 1.0) for index in range(count))
    return tuple((round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in colours)


def truth_of(boxes: torch.Tensor, labels: torch.Tensor, ignored: torch.Tensor) -> torch.Tensor:
    """The truth of objects whose area is that of their boxes.

    Args:
        boxes: [n, 4], (x1, y1, x2, y2).
        labels: [n].
        ignored: bool [n], those that neither reward nor punish a detection.

    Returns:
        float64 [n, 7], see `DetectionItem`.
    """
    x1, y1, x2, y2 = boxes.double().unbind(1)
    width, height = x2 - x1, y2 - y1
    return torch.stack([labels.double(), x1, y1, width, height, width * height, ignored.double()], dim=1)


class DetectionTransform:
    """A float image, 0 to 1, mirrored with a probability together with its boxes: x1 becomes W - x2.

    Detectors of torchvision resize and normalise themselves. The random number comes from torch's generator, of which
    evaluation, with a probability of 0, takes none.

    Args:
        flip_probability: 0 to 1.

    Raises:
        ValueError: a probability outside its range.

    Example:
        >>> from gingham.data.wardrobe import LookAlikeScenes
        >>> item = LookAlikeScenes("train", 1, transform=DetectionTransform(1.0))[0]
        >>> item["image"].dtype, item["boxes"].shape[1]
        (torch.float32, 4)
    """

    def __init__(self, flip_probability: float = 0.0) -> None:
        if not 0 <= flip_probability <= 1:
            raise ValueError(f"flip_probability must be 0 to 1, got {flip_probability}")
        mirror = [v2.RandomHorizontalFlip(flip_probability)] if flip_probability > 0 else []
        self.transforms = v2.Compose([*mirror, v2.ToDtype(torch.float32, scale=True)])

    def __call__(self, item: DetectionItem) -> DetectionItem:
        size = item["image"].shape[-2:]
        typed: dict[str, Any] = {
            "image": tv_tensors.Image(item["image"]),
            "boxes": tv_tensors.BoundingBoxes(item["boxes"], format="XYXY", canvas_size=size),
        }
        moved = {name: value.as_subclass(torch.Tensor).contiguous() for name, value in self.transforms(typed).items()}
        result: Any = {**item, **moved}
        return result
