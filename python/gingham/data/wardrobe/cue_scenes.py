"""Scenes in which one cue object decides the class of the trousers: the task that needs context from the whole image.

A scene holds exactly one cue, a bag or an ankle boot. All trousers of a scene belong to one class with the bag and to
another with the boot, and look the same in both. Every other choice (background, places, sizes, tints, garments, how
many trousers) is drawn without regard to the cue, so that the cue's pixels alone tell the two classes apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gingham.data.cityscapes import CITYSCAPES_LABELS
from gingham.data.labels import LabelSpace
from gingham.data.segmentation import SegmentationDataset, SegmentationItem, Transform
from gingham.data.wardrobe.assets import load_wardrobe, sample_generator, split_number
from gingham.data.wardrobe.garments import Category, Garment, cut_garment, paint, random_background, random_tint

#: Classes of the cue scenes; in files they borrow the first Cityscapes ids, so that the plain reader takes them. Tops
#: are one class: telling a shirt from a pullover is hard at this size and has nothing to do with context.
CUE_LABELS = LabelSpace(
    names=("background", "top", "dress", "bag", "ankle boot", "trousers with bag", "trousers with boot"),
    palette=(
        (0, 0, 0),
        (0, 158, 115),
        (240, 228, 66),
        (255, 255, 255),
        (230, 159, 0),
        (213, 30, 30),
        (30, 60, 220),
    ),
    values=CITYSCAPES_LABELS.values[:7],
)

_DISTRACTORS = (Category.T_SHIRT, Category.PULLOVER, Category.DRESS, Category.COAT, Category.SHIRT)
_CUES = (Category.BAG, Category.ANKLE_BOOT)
_CLASS = {
    Category.T_SHIRT: 1,
    Category.PULLOVER: 1,
    Category.COAT: 1,
    Category.SHIRT: 1,
    Category.DRESS: 2,
    Category.BAG: 3,
    Category.ANKLE_BOOT: 4,
}
_TROUSERS = {Category.BAG: 5, Category.ANKLE_BOOT: 6}  # by the cue of the scene
_FEWEST_TROUSERS, _MOST_TROUSERS = 2, 4
_GARMENT_SIDES = (14 / 64, 20 / 64)  # of the picture's side


@dataclass(frozen=True)
class Instance:
    """One garment of a scene: what it is, its class index, its box and which pixels of the picture it covers."""

    category: Category
    label: int
    box: tuple[int, int, int, int]  # top, left, bottom, right; the last two exclusive
    mask: NDArray[np.bool_]  # [size, size]


@dataclass(frozen=True)
class CueScene:
    """A composed scene: `image` [size, size, 3] uint8, `label` [size, size] uint8, and its garments, the cue first."""

    image: NDArray[np.uint8]
    label: NDArray[np.uint8]
    instances: tuple[Instance, ...]


def make_cue_scene(
    split: str, index: int, *, size: int = 64, garments: int = 8, cue: Category | None = None
) -> CueScene:
    """Compose sample `index` of a split.

    Args:
        split: "train", "val" or "test".
        index: 0 or above.
        size: pixels of the picture's side, 32 or above.
        garments: how many garments the scene holds, the cue included, 4 to 10.
        cue: show this cue, `Category.BAG` or `Category.ANKLE_BOOT`, instead of the one that the sample drew; all else
            in the scene but the class of the trousers stays as it is.

    Returns:
        The scene.

    Example:
        >>> scene = make_cue_scene("train", 0)
        >>> scene.image.shape, len(scene.instances)
        ((64, 64, 3), 8)
    """
    rng = sample_generator(split, index)
    wardrobe = load_wardrobe(split)
    pieces = wardrobe.garments.shape[1]
    canvas = random_background(rng, wardrobe, size)
    label = np.zeros((size, size), np.uint8)
    taken = np.zeros((size, size), bool)
    instances: list[Instance] = []

    def side() -> int:
        low, high = (round(share * size) for share in _GARMENT_SIDES)
        return int(rng.integers(low, high + 1))

    def add(category: Category, class_index: int, garment: Garment, top: int, left: int) -> None:
        height, width = garment.alpha.shape
        paint(canvas, garment, random_tint(rng), top, left)
        mask = np.zeros((size, size), bool)
        mask[top : top + height, left : left + width] = garment.mask
        label[mask] = class_index
        instances.append(Instance(category, class_index, (top, left, top + height, left + width), mask))

    # The cue. Both candidates are drawn, and the square kept free for it fits either, so that what follows is the same
    # whichever of them is shown.
    candidates = {category: int(rng.integers(pieces)) for category in _CUES}
    drawn = _CUES[rng.integers(2)]
    shown = drawn if cue is None else cue
    cue_side = side()
    cue_garment = cut_garment(wardrobe, shown, candidates[shown], cue_side)
    top, left = (int(place) for place in rng.integers(size - cue_side + 1, size=2))
    taken[top : top + cue_side, left : left + cue_side] = True
    height, width = cue_garment.alpha.shape
    add(shown, _CLASS[shown], cue_garment, top + (cue_side - height) // 2, left + (cue_side - width) // 2)

    # Then the trousers, which are to be found in every scene, then garments that mean nothing.
    trousers = int(rng.integers(_FEWEST_TROUSERS, min(_MOST_TROUSERS, garments - 2) + 1))
    for number in range(garments - 1):
        category = Category.TROUSERS if number < trousers else _DISTRACTORS[rng.integers(len(_DISTRACTORS))]
        class_index = _TROUSERS[shown] if category == Category.TROUSERS else _CLASS[category]
        position, length = int(rng.integers(pieces)), side()
        garment = cut_garment(wardrobe, category, position, length)
        free = _free_places(taken, *garment.alpha.shape)
        while not len(free):  # a crowded scene: the garment shrinks until it fits
            length -= 1
            garment = cut_garment(wardrobe, category, position, length)
            free = _free_places(taken, *garment.alpha.shape)
        top, left = (int(place) for place in free[rng.integers(len(free))])
        height, width = garment.alpha.shape
        taken[top : top + height, left : left + width] = True
        add(category, class_index, garment, top, left)

    image = np.clip(np.round(canvas), 0, 255).astype(np.uint8)
    return CueScene(image, label, tuple(instances))


def _free_places(taken: NDArray[np.bool_], height: int, width: int) -> NDArray[np.intp]:
    """The upper left corners [n, 2] at which a box of that size touches no taken pixel."""
    sums = np.zeros((taken.shape[0] + 1, taken.shape[1] + 1), np.int32)
    sums[1:, 1:] = taken.cumsum(0, dtype=np.int32).cumsum(1, dtype=np.int32)
    inside = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    return np.argwhere(inside == 0)


class CueScenes(SegmentationDataset):
    """The cue-object task: the class of the trousers depends on whether a bag or a boot is anywhere in the picture.

    Args:
        split: "train", "val" or "test"; test garments and backgrounds never occur in the other two.
        length: how many scenes; sample `i` is the same whatever the length.
        size: pixels of the picture's side, 32 or above.
        garments: garments in a scene, the cue included, 4 to 10.
        cache: whether to compose all scenes now and keep them, 16 KiB each at size 64, instead of composing them anew
            at each visit.
        transform: applied to each item.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> scenes = CueScenes("train", 4)
        >>> item = scenes[0]
        >>> item["image"].shape, item["label"].dtype, item["name"]
        (torch.Size([3, 64, 64]), torch.int64, 'wardrobe_train_000000')
    """

    #: The class indices of the trousers, whose IoU measures whether the cue was understood.
    trousers = tuple(_TROUSERS.values())

    def __init__(
        self,
        split: str,
        length: int,
        *,
        size: int = 64,
        garments: int = 8,
        cache: bool = False,
        transform: Transform | None = None,
    ) -> None:
        split_number(split)
        if length < 0:
            raise ValueError(f"length must be 0 or above, got {length}")
        if size < 32:
            raise ValueError(f"size must be 32 or above, got {size}")
        if not 4 <= garments <= 10:
            raise ValueError(f"garments must be 4 to 10, got {garments}")
        super().__init__(split, CUE_LABELS, transform)
        self.length = length
        self.size = size
        self.garments = garments
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None
        if cache:
            images = torch.empty((length, 3, size, size), dtype=torch.uint8)
            labels = torch.empty((length, size, size), dtype=torch.uint8)
            for index in range(length):
                images[index], labels[index] = self._compose(index)
            self._kept = images, labels

    def __len__(self) -> int:
        return self.length

    def _compose(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        scene = make_cue_scene(self.split, index, size=self.size, garments=self.garments)
        return torch.from_numpy(scene.image).permute(2, 0, 1).contiguous(), torch.from_numpy(scene.label)

    def read(self, index: int) -> SegmentationItem:
        image, label = self._compose(index) if self._kept is None else (kept[index] for kept in self._kept)
        name = f"wardrobe_{self.split}_{index:06d}"
        # Copies: a transform may work in place, and must not reach what is kept.
        return {"image": image.clone(), "label": label.to(torch.int64), "name": name}
