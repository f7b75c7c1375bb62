"""Scenes with image-level labels, whose classes a small badge gives away: the task of attention on whole objects.

Each kind of garment has a colour. A garment is faintly dyed in it, and wears a badge in the full colour on its upper
part, which is all that a classifier needs. The light of a picture has the colour of one of its garments, too, as boats
have water around them: whoever looks for more evidence than the badge finds it in the background as well as in the
garment. Sandals and sneakers are clutter without a label. The masks are for evaluation; their outlines are ignored, as
in VOC.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from gingham.data.image_tags import tag_vector, tags_of
from gingham.data.labels import IGNORE_INDEX, LabelSpace
from gingham.data.segmentation import SegmentationItem
from gingham.data.wardrobe.assets import load_wardrobe, sample_generator
from gingham.data.wardrobe.composition import ComposedScenes, Composition, Scene
from gingham.data.wardrobe.garments import Category, Garment, random_tint

#: Background and the kinds of garments that images are tagged with.
TAG_SCENE_LABELS = LabelSpace(
    names=("background", "top", "dress", "trousers", "bag", "ankle boot"),
    palette=((0, 0, 0), (0, 158, 115), (240, 228, 66), (213, 30, 30), (255, 255, 255), (230, 159, 0)),
)

_KINDS: tuple[tuple[Category, ...], ...] = (
    (Category.T_SHIRT, Category.PULLOVER, Category.COAT, Category.SHIRT),
    (Category.DRESS,),
    (Category.TROUSERS,),
    (Category.BAG,),
    (Category.ANKLE_BOOT,),
)
#: The colours of the kinds, RGB, 0 to 1.
COLOURS = ((1.0, 0.1, 0.1), (0.1, 0.9, 0.1), (0.2, 0.2, 1.0), (1.0, 1.0, 0.0), (1.0, 0.1, 1.0))
_CLUTTER = (Category.SANDAL, Category.SNEAKER)
_MOST_TAGGED = 2
_TAGGED_SIDES, _CLUTTER_SIDES = (26 / 64, 38 / 64), (10 / 64, 16 / 64)  # of the picture's side
_DYES = (0.2, 0.3)  # how much of its kind's colour a garment has
_BADGE_SIDES = (0.14, 0.28)  # of the garment's longer side
_LIGHT = 0.5  # how much of a kind's colour there is in the light
_BORDER = 2 / 64  # of the picture's side


def make_tag_scene(split: str, index: int, *, size: int = 64, garments: int = 6) -> Scene:
    """Compose sample `index` of a split.

    Args:
        split: "train", "val" or "test".
        index: 0 or above.
        size: pixels of the picture's side, 32 or above.
        garments: how many garments the scene holds, one or two of which have labels, 4 to 10.

    Returns:
        The scene; the instances with labels come first.

    Example:
        >>> scene = make_tag_scene("train", 0)
        >>> scene.image.shape, len(scene.instances)
        ((64, 64, 3), 6)
    """
    rng = sample_generator(split, index)
    composition = Composition(rng, load_wardrobe(split), size)

    def side(sides: tuple[float, float]) -> int:
        low, high = (round(share * size) for share in sides)
        return int(rng.integers(low, high + 1))

    tagged = rng.permutation(len(_KINDS))[: rng.integers(1, _MOST_TAGGED + 1)]
    composition.shine(_LIGHT * np.array(COLOURS[rng.choice(tagged)], np.float32) + (1 - _LIGHT))
    for kind in tagged:
        category = _KINDS[kind][rng.integers(len(_KINDS[kind]))]
        garment, top, left = composition.fit(category, composition.random_piece(), side(_TAGGED_SIDES))
        colour = np.array(COLOURS[kind], np.float32)
        dye = np.float32(rng.uniform(*_DYES))
        dyed = (1 - dye) * random_tint(rng) + dye * colour
        composition.add(category, int(kind) + 1, garment, dyed, top, left)
        badge, row, column = _badge(rng, garment)
        composition.paint_over(badge, colour, top + row, left + column)
    for _ in range(garments - len(tagged)):
        category = _CLUTTER[rng.integers(len(_CLUTTER))]
        garment, top, left = composition.fit(category, composition.random_piece(), side(_CLUTTER_SIDES))
        composition.add(category, 0, garment, random_tint(rng), top, left)
    scene = composition.scene()
    return replace(scene, label=_with_border(scene.label, round(_BORDER * size)))


def _with_border(label: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """The label with the outlines of its objects ignored, as in VOC: so many pixels to either side."""
    square = np.ones((2 * width + 1, 2 * width + 1), bool)
    inside, outside = (ndimage.binary_dilation(part, square) for part in (label > 0, label == 0))
    return np.where(inside & outside, IGNORE_INDEX, label).astype(np.uint8)


def _badge(rng: np.random.Generator, garment: Garment) -> tuple[Garment, int, int]:
    """A square that fits a garment, and where on its upper part it sits: row and column of its corner."""
    rows, columns = garment.mask.shape
    side = max(3, round(rng.uniform(*_BADGE_SIDES) * max(rows, columns)))
    side = min(side, rows, columns)
    covered = np.array(
        [
            [garment.mask[row : row + side, column : column + side].sum() for column in range(columns - side + 1)]
            for row in range((rows - side) // 2 + 1)
        ]
    )
    places = np.argwhere(covered >= 0.98 * covered.max())
    row, column = (int(place) for place in places[rng.integers(len(places))])
    alpha = garment.mask[row : row + side, column : column + side].astype(np.float32)
    return Garment(grey=255 * alpha, alpha=alpha), row, column


class TagScenes(ComposedScenes):
    """Scenes whose `tags` are what a method may learn from, and whose masks are for evaluation.

    Args:
        split: "train", "val" or "test"; test garments and backgrounds never occur in the other two.
        length: how many scenes; sample `i` is the same whatever the length.
        size: pixels of the picture's side, 32 or above.
        garments: garments in a scene, one or two of which have labels, 4 to 10; None for 6.
        cache: whether to compose all scenes now and keep them, 16 KiB each at size 64, instead of composing them anew
            at each visit.
        transform: applied to each item.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> item = TagScenes("train", 4)[0]
        >>> item["tags"], item["label"].unique()
        (tensor([0, 0, 0, 1, 0]), tensor([  0,   4, 255]))
    """

    scene_labels = TAG_SCENE_LABELS
    usual_garments = 6

    def compose(self, index: int) -> Scene:
        return make_tag_scene(self.split, index, size=self.size, garments=self.garments)

    def read(self, index: int) -> SegmentationItem:
        item = super().read(index)
        tags: torch.Tensor = tag_vector(tags_of(item["label"]), self.num_classes - 1)
        return {**item, "tags": tags}
