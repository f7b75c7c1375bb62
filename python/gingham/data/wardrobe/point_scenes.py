"""Scenes with one labelled pixel for each garment and one for the background: the task of learning from points.

The scenes are the cue scenes; the classes are the kinds of garments, which can be told from a garment alone. As there,
tops are one class: telling a shirt from a pullover is hard at this size.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gingham.data.labels import LabelSpace
from gingham.data.points import PointSet, draw_pixels
from gingham.data.wardrobe.assets import split_number
from gingham.data.wardrobe.composition import ComposedScenes, Scene
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


class PointScenes(ComposedScenes):
    """Scenes whose masks are for evaluation, and whose `points` are what a method may learn from.

    Args:
        split: "train", "val" or "test"; test garments and backgrounds never occur in the other two.
        length: how many scenes; sample `i` is the same whatever the length.
        size: pixels of the picture's side, 32 or above.
        garments: garments in a scene, 4 to 10; None for 8.
        cache: whether to compose all scenes now and keep them, 16 KiB each at size 64, instead of composing them anew
            at each visit.
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

    scene_labels = POINT_SCENE_LABELS
    usual_garments = 8

    def compose(self, index: int) -> Scene:
        scene = make_cue_scene(self.split, index, size=self.size, garments=self.garments)
        instances = tuple(replace(instance, label=_CLASS[instance.category]) for instance in scene.instances)
        label = np.zeros_like(scene.label)
        for instance in instances:
            label[instance.mask] = instance.label
        return Scene(scene.image, label, instances)

    @cached_property
    def points(self) -> PointSet:
        """One evenly drawn pixel of the background and of each garment of every scene."""
        points: dict[str, NDArray[np.int64]] = {}
        for index in range(self.length):
            scene = self.compose(index)
            rng = np.random.default_rng([split_number(self.split), index, _POINTS])
            places = [(0, scene.label == 0)] + [(instance.label, instance.mask) for instance in scene.instances]
            points[self.name_of(index)] = np.array(
                [[class_index, *draw_pixels(rng, mask)[0]] for class_index, mask in places], np.int64
            )
        return PointSet(self.num_classes, points, source=f"points of the {self.split} scenes")
