"""Scenes of small garments among others that look like them: the task of refusing hard false positives (DCR).

T-shirts, trousers, dresses, bags and ankle boots are to be found. Shirts, pullovers and coats, which look like T-shirts
and dresses, and cropped pieces of the garments that are to be found, belong to the background: a box around one of them
is well placed and wrong.
"""

from __future__ import annotations

import numpy as np
import torch

from gingham.data.detection import DetectionDataset, DetectionItem, Transform, truth_of
from gingham.data.wardrobe.assets import load_wardrobe, sample_generator, split_number
from gingham.data.wardrobe.composition import Composition, Scene
from gingham.data.wardrobe.garments import WHOLE, Category, Part, random_tint

#: What is to be found; the label of a category is its position here, from 1.
SOUGHT = (Category.T_SHIRT, Category.TROUSERS, Category.DRESS, Category.BAG, Category.ANKLE_BOOT)

#: Whole garments that belong to the background.
LOOK_ALIKES = (Category.SHIRT, Category.PULLOVER, Category.COAT)

#: Of the labels 1 to 5.
CLASS_NAMES = ("T-shirt", "trousers", "dress", "bag", "ankle boot")
_SIDES = (12 / 96, 26 / 96)  # of the picture's side
_FEWEST, _MOST = 3, 5  # of the garments that are to be found, and of the others
_CROPPED = 0.5  # probability that one of the others is a cropped piece of a garment that would be to be found
_KEPT = (0.4, 0.65)  # share of the height or width that is left of a cropped piece


def make_lookalike_scene(split: str, index: int, *, size: int = 96) -> Scene:
    """Compose sample `index` of a split.

    Args:
        split: "train", "val" or "test".
        index: 0 or above.
        size: pixels of the picture's side, 64 or above.

    Returns:
        The scene, in which the instances with label 0 are those that look like the others.

    Example:
        >>> scene = make_lookalike_scene("train", 0)
        >>> scene.image.shape, sorted({instance.label > 0 for instance in scene.instances})
        ((96, 96, 3), [False, True])
    """
    rng = sample_generator(split, index)
    composition = Composition(rng, load_wardrobe(split), size)
    sought, others = (int(number) for number in rng.integers(_FEWEST, _MOST + 1, 2))
    for number in range(sought + others):
        if number < sought:
            label = int(rng.integers(len(SOUGHT))) + 1
            category, part = SOUGHT[label - 1], WHOLE
        else:
            label = 0
            category, part = _look_alike(rng)
        side = int(rng.integers(round(_SIDES[0] * size), round(_SIDES[1] * size) + 1))
        garment, top, left = composition.fit(category, composition.random_piece(), side, part)
        composition.add(category, label, garment, random_tint(rng), top, left)
    return composition.scene()


def _look_alike(rng: np.random.Generator) -> tuple[Category, Part]:
    """A garment of the background: a whole one, or an upper, lower, left or right piece of one that is sought."""
    if rng.random() >= _CROPPED:
        return LOOK_ALIKES[rng.integers(len(LOOK_ALIKES))], WHOLE
    kept = float(rng.uniform(*_KEPT))
    pieces: tuple[Part, ...] = (
        (0.0, 0.0, kept, 1.0),
        (1.0 - kept, 0.0, 1.0, 1.0),
        (0.0, 0.0, 1.0, kept),
        (0.0, 1.0 - kept, 1.0, 1.0),
    )
    return SOUGHT[rng.integers(len(SOUGHT))], pieces[rng.integers(len(pieces))]


class LookAlikeScenes(DetectionDataset):
    """The look-alike task: five kinds of small garments are to be found, those that look like them are not.

    Args:
        split: "train", "val" or "test"; test garments and backgrounds never occur in the other two.
        length: how many scenes; sample `i` is the same whatever the length.
        size: pixels of the picture's side, 64 or above.
        cache: whether to compose all scenes now and keep them, 27 KiB each at size 96, instead of composing them anew
            at each visit.
        transform: applied to each item.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> item = LookAlikeScenes("train", 4)[0]
        >>> item["image"].shape, item["labels"].dtype, item["name"]
        (torch.Size([3, 96, 96]), torch.int64, 'wardrobe_train_000000')
    """

    def __init__(
        self, split: str, length: int, *, size: int = 96, cache: bool = False, transform: Transform | None = None
    ) -> None:
        split_number(split)
        if length < 0:
            raise ValueError(f"length must be 0 or above, got {length}")
        if size < 64:
            raise ValueError(f"size must be 64 or above, got {size}")
        super().__init__(split, CLASS_NAMES, transform)
        self.length, self.size = length, size
        self._kept = [self._composed(index) for index in range(length)] if cache else None

    def __len__(self) -> int:
        return self.length

    def _composed(self, index: int) -> DetectionItem:
        scene = make_lookalike_scene(self.split, index, size=self.size)
        sought = [instance for instance in scene.instances if instance.label]
        edges = [(left, top, right, bottom) for top, left, bottom, right in (instance.box for instance in sought)]
        boxes = torch.tensor(edges, dtype=torch.float32)
        labels = torch.tensor([instance.label for instance in sought])
        return {
            "image": torch.from_numpy(scene.image).permute(2, 0, 1).contiguous(),
            "boxes": boxes,
            "labels": labels,
            "truth": truth_of(boxes, labels, torch.zeros(len(sought), dtype=torch.bool)),
            "name": f"wardrobe_{self.split}_{index:06d}",
            "image_id": index,
        }

    def read(self, index: int) -> DetectionItem:
        item = self._composed(index) if self._kept is None else self._kept[index]
        # Copies: a transform may work in place, and must not reach what is kept.
        result: DetectionItem = item.copy()
        result["image"], result["boxes"] = item["image"].clone(), item["boxes"].clone()
        return result
