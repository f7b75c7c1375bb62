"""Scenes in general: garments with class, box and mask on a photograph, none covered, and data sets of scenes."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gingham.data.labels import LabelSpace
from gingham.data.segmentation import SegmentationDataset, SegmentationItem, Transform
from gingham.data.wardrobe.assets import Wardrobe, split_number
from gingham.data.wardrobe.garments import WHOLE, Category, Garment, Part, cut_garment, paint, random_background


@dataclass(frozen=True)
class Instance:
    """One garment of a scene: what it is, its class index, its box and which pixels of the picture it covers."""

    category: Category
    label: int
    box: tuple[int, int, int, int]  # top, left, bottom, right; the last two exclusive
    mask: NDArray[np.bool_]  # [size, size]


@dataclass(frozen=True)
class Scene:
    """A composed scene: `image` [size, size, 3] uint8, `label` [size, size] uint8, and its garments."""

    image: NDArray[np.uint8]
    label: NDArray[np.uint8]
    instances: tuple[Instance, ...]


class Composition:
    """A scene in the making, on a random photograph.

    Args:
        rng: where all that is drawn comes from.
        wardrobe: where garments and photographs come from.
        size: pixels of the picture's side.
    """

    def __init__(self, rng: np.random.Generator, wardrobe: Wardrobe, size: int) -> None:
        self.rng, self.wardrobe, self.size = rng, wardrobe, size
        self._canvas = random_background(rng, wardrobe, size)
        self._label = np.zeros((size, size), np.uint8)
        self._taken = np.zeros((size, size), bool)
        self._instances: list[Instance] = []

    def random_piece(self) -> int:
        """The position of a garment in its category."""
        return int(self.rng.integers(self.wardrobe.garments.shape[1]))

    def reserve(self, top: int, left: int, height: int, width: int) -> None:
        """Keep a box free of what `fit` finds places for."""
        self._taken[top : top + height, left : left + width] = True

    def fit(self, category: Category, position: int, side: int, part: Part = WHOLE) -> tuple[Garment, int, int]:
        """Cut a garment, and find and reserve a random free place for it; in a crowded scene it shrinks until it fits.

        Args:
            category: which category.
            position: which garment of the category.
            side: pixels of its longer side, as a whole.
            part: what of it to take.

        Returns:
            The garment, and the row and the column of its upper left corner.
        """
        garment = cut_garment(self.wardrobe, category, position, side, part)
        free = _free_places(self._taken, *garment.alpha.shape)
        while not len(free):
            side -= 1
            garment = cut_garment(self.wardrobe, category, position, side, part)
            free = _free_places(self._taken, *garment.alpha.shape)
        top, left = (int(place) for place in free[self.rng.integers(len(free))])
        self.reserve(top, left, *garment.alpha.shape)
        return garment, top, left

    def add(
        self, category: Category, class_index: int, garment: Garment, tint: NDArray[np.float32], top: int, left: int
    ) -> None:
        """Paint a garment, and label what it covers.

        Args:
            category: which it is of.
            class_index: of its pixels.
            garment: what to paint.
            tint: what its grey values are multiplied by, [3].
            top: row of its upper edge.
            left: column of its left edge.
        """
        height, width = garment.alpha.shape
        paint(self._canvas, garment, tint, top, left)
        mask = np.zeros((self.size, self.size), bool)
        mask[top : top + height, left : left + width] = garment.mask
        self._label[mask] = class_index
        self._instances.append(Instance(category, class_index, (top, left, top + height, left + width), mask))

    def shine(self, light: NDArray[np.float32]) -> None:
        """Multiply what has been painted so far by a light, [3]."""
        self._canvas *= light

    def paint_over(self, garment: Garment, tint: NDArray[np.float32], top: int, left: int) -> None:
        """Paint what leaves the labels as they are; the arguments are those of `add`."""
        paint(self._canvas, garment, tint, top, left)

    def scene(self) -> Scene:
        """What has been composed."""
        image = np.clip(np.round(self._canvas), 0, 255).astype(np.uint8)
        return Scene(image, self._label, tuple(self._instances))


def _free_places(taken: NDArray[np.bool_], height: int, width: int) -> NDArray[np.intp]:
    """The upper left corners [n, 2] at which a box of that size touches no taken pixel."""
    sums = np.zeros((taken.shape[0] + 1, taken.shape[1] + 1), np.int32)
    sums[1:, 1:] = taken.cumsum(0, dtype=np.int32).cumsum(1, dtype=np.int32)
    inside = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    return np.argwhere(inside == 0)


class ComposedScenes(SegmentationDataset):
    """A data set of scenes, each composed when it is asked for, or all at once and kept.

    Args:
        split: "train", "val" or "test"; test garments and backgrounds never occur in the other two.
        length: how many scenes; sample `i` is the same whatever the length.
        size: pixels of the picture's side, 32 or above.
        garments: garments in a scene, `fewest_garments` to `most_garments`; None for `usual_garments`.
        cache: whether to compose all scenes now and keep them, 16 KiB each at size 64, instead of composing them anew
            at each visit.
        transform: applied to each item.

    Raises:
        ValueError: an argument outside its range.
    """

    #: The classes.
    scene_labels: LabelSpace
    usual_garments: int
    fewest_garments, most_garments = 4, 10

    def __init__(
        self,
        split: str,
        length: int,
        *,
        size: int = 64,
        garments: int | None = None,
        cache: bool = False,
        transform: Transform | None = None,
    ) -> None:
        split_number(split)
        garments = self.usual_garments if garments is None else garments
        if length < 0:
            raise ValueError(f"length must be 0 or above, got {length}")
        if size < 32:
            raise ValueError(f"size must be 32 or above, got {size}")
        if not self.fewest_garments <= garments <= self.most_garments:
            raise ValueError(f"garments must be {self.fewest_garments} to {self.most_garments}, got {garments}")
        super().__init__(split, self.scene_labels, transform)
        self.length, self.size, self.garments = length, size, garments
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None
        if cache:
            images = torch.empty((length, 3, size, size), dtype=torch.uint8)
            kept_labels = torch.empty((length, size, size), dtype=torch.uint8)
            for index in range(length):
                images[index], kept_labels[index] = self._composed(index)
            self._kept = images, kept_labels

    def __len__(self) -> int:
        return self.length

    @abstractmethod
    def compose(self, index: int) -> Scene:
        """Sample `index`, which depends on the split and on `index` alone."""

    def _composed(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        scene = self.compose(index)
        return torch.from_numpy(scene.image).permute(2, 0, 1).contiguous(), torch.from_numpy(scene.label)

    def name_of(self, index: int) -> str:
        return f"wardrobe_{self.split}_{index:06d}"

    def read(self, index: int) -> SegmentationItem:
        image, label = self._composed(index) if self._kept is None else (kept[index] for kept in self._kept)
        # Copies: a transform may work in place, and must not reach what is kept.
        return {"image": image.clone(), "label": label.to(torch.int64), "name": self.name_of(index)}
