"""Scenes with one labelled pixel for each garment and one for the background: the task of learning from points.

The scenes are the cue scenes; the classes are the kinds of garments, which can be told from a garment alone. As there,
tops are one class: telling a shirt from a pullover is hard at this size.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from gingham.data.labels import LabelSpace
from gingham.data.points import PointSet, draw_pixels
from gingham.data.segmentation import SegmentationDataset, SegmentationItem, Transform
from gingham.data.wardrobe.assets import split_number
from gingham.data.wardrobe.cue_scenes import make_cue_scene
from gingham.data.wardrobe.garments import Category

_CLASS = {
    Category.T_SHIRT: 1,
    Category.PULLOVER: 1,
    Category.COAT: 1,
    Category.SHIRT: 1,
    Category.DRESS: 2,
    Category.TROUSERS: 3,
    Category.BAG: 4,
    Category.ANKLE_BOOT: 5,
}

#: Background and the kinds of garments.
POINT_SCENE_LABELS = LabelSpace(
    names=("background", "top", "dress", "trousers", "bag", "ankle boot"),
    palette=((0, 0, 0), (0, 158, 115), (240, 228, 66), (213, 30, 30), (255, 255, 255), (230, 159, 0)),
)

_POINTS = 3  # the number of this use of random numbers: the points of a scene are not those that composed it


class PointScenes(SegmentationDataset):
    """Scenes whose masks are for evaluation, and whose `points` are what a method may learn from.

    Args:
        split: "train", "val" or "test"; test garments and backgrounds never occur in the other two.
        length: how many scenes; sample `i` is the same whatever the length.
        size: pixels of the picture's side, 32 or above.
        garments: garments in a scene, 4 to 10.
        transform: applied to each item.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> from gingham.data.points import WithPoints
        >>> scenes = PointScenes("train", 4)
        >>> item = WithPoints(scenes, scenes.points)[0]
        >>> item["image"].shape, item["points"].shape, item["name"]
        (torch.Size([3, 64, 64]), torch.Size([9, 3]), 'wardrobe_train_000000')
    """

    def __init__(
        self, split: str, length: int, *, size: int = 64, garments: int = 8, transform: Transform | None = None
    ) -> None:
        number = split_number(split)
        if length < 0:
            raise ValueError(f"length must be 0 or above, got {length}")
        if size < 32:
            raise ValueError(f"size must be 32 or above, got {size}")
        if not 4 <= garments <= 10:
            raise ValueError(f"garments must be 4 to 10, got {garments}")
        super().__init__(split, POINT_SCENE_LABELS, transform)
        self._images = torch.empty((length, 3, size, size), dtype=torch.uint8)
        self._labels = torch.zeros((length, size, size), dtype=torch.uint8)
        points: dict[str, NDArray[np.int64]] = {}
        for index in range(length):
            scene = make_cue_scene(split, index, size=size, garments=garments)
            self._images[index] = torch.from_numpy(scene.image).permute(2, 0, 1)
            label = self._labels[index].numpy()
            for instance in scene.instances:
                label[instance.mask] = _CLASS[instance.category]
            rng = np.random.default_rng([number, index, _POINTS])
            places = [(0, label == 0)] + [(_CLASS[instance.category], instance.mask) for instance in scene.instances]
            points[self._name(index)] = np.array(
                [[class_index, *draw_pixels(rng, mask)[0]] for class_index, mask in places], np.int64
            )
        #: One evenly drawn pixel of the background and of each garment of every scene.
        self.points = PointSet(self.num_classes, points, source=f"points of the {split} scenes")

    def __len__(self) -> int:
        return len(self._images)

    def _name(self, index: int) -> str:
        return f"wardrobe_{self.split}_{index:06d}"

    def read(self, index: int) -> SegmentationItem:
        # Copies: a transform may work in place, and must not reach what is kept.
        image, label = self._images[index].clone(), self._labels[index].to(torch.int64)
        return {"image": image, "label": label, "name": self._name(index)}
