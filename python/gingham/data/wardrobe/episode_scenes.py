"""Scenes for episodes, in which a class is one garment, or one category of garments.

`GarmentScenes`: a class is a single garment, its picture and its tint; it comes back in other scenes, on other
photographs, at other places and sizes, among other garments. Each split has garments of its own, so that those of the
test split are novel. `CategoryScenes`: a class is a category of Fashion-MNIST, and three of the ten are novel.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gingham.data.labels import LabelSpace, bit_interleaved_palette
from gingham.data.wardrobe.assets import load_wardrobe, sample_generator, split_number
from gingham.data.wardrobe.composition import ComposedScenes, Composition, Scene
from gingham.data.wardrobe.garments import Category, random_tint

_GARMENTS = 4  # the number of this use of random numbers: the classes of a split are not those that compose its scenes

#: The class indices of each split's garments; together they fill what an 8-bit label file can tell apart.
GARMENT_CLASSES = {
    "train": tuple(range(1, 175)),
    "val": tuple(range(175, 205)),
    "test": tuple(range(205, 255)),
}

GARMENT_LABELS = LabelSpace(
    names=("background", *(f"garment {index}" for index in range(1, 255))), palette=bit_interleaved_palette(255)
)

_NOVEL = (Category.DRESS, Category.SNEAKER, Category.BAG)

#: The class indices of the categories of each split: those of training, on garments of its own, in validation too.
CATEGORY_CLASSES = {
    "train": tuple(category + 1 for category in Category if category not in _NOVEL),
    "val": tuple(category + 1 for category in Category if category not in _NOVEL),
    "test": tuple(category + 1 for category in _NOVEL),
}

CATEGORY_LABELS = LabelSpace(
    names=("background", *(category.name.lower().replace("_", " ") for category in Category)),
    palette=bit_interleaved_palette(11),
)

_SIDES = (24 / 64, 34 / 64)  # of the picture's side


class _Piece(NamedTuple):
    """A garment that is a class."""

    category: Category
    position: int
    tint: NDArray[np.float32]


@cache
def _pieces(split: str) -> dict[int, _Piece]:
    """The garments of a split by class index: the categories in turn, no picture twice."""
    rng = np.random.default_rng([split_number(split), _GARMENTS])
    count = load_wardrobe(split).garments.shape[1]
    positions = {category: rng.permutation(count) for category in Category}
    pieces = {}
    for number, class_index in enumerate(GARMENT_CLASSES[split]):
        round_number, category = number // len(Category), Category(number % len(Category))
        pieces[class_index] = _Piece(category, int(positions[category][round_number]), random_tint(rng))
    return pieces


def _side(rng: np.random.Generator, size: int) -> int:
    low, high = (round(share * size) for share in _SIDES)
    return int(rng.integers(low, high + 1))


def make_garment_scene(split: str, index: int, *, size: int = 64, garments: int = 3) -> Scene:
    """Compose sample `index` of a split: different garments of the split's, at random places and sizes.

    Scenes 2 i and 2 i + 1 have one garment in common, so that few scenes make episodes, too.

    Args:
        split: "train", "val" or "test".
        index: 0 or above.
        size: pixels of the picture's side, 32 or above.
        garments: how many garments the scene holds, 2 to 10.

    Example:
        >>> scene, next_scene = make_garment_scene("train", 0), make_garment_scene("train", 1)
        >>> len(scene.instances), scene.instances[0].label == next_scene.instances[0].label
        (3, True)
    """
    rng = sample_generator(split, index)
    composition = Composition(rng, load_wardrobe(split), size)
    classes = GARMENT_CLASSES[split]
    shared = index // 2 % len(classes)
    others = [number for number in rng.permutation(len(classes)).tolist() if number != shared]
    for number in [shared, *others[: garments - 1]]:
        piece = _pieces(split)[classes[number]]
        garment, top, left = composition.fit(piece.category, piece.position, _side(rng, size))
        composition.add(piece.category, classes[number], garment, piece.tint, top, left)
    return composition.scene()


def make_category_scene(split: str, index: int, *, size: int = 64, garments: int = 3) -> Scene:
    """Compose sample `index` of a split: garments of different categories, in training and validation none novel.

    Args:
        split: "train", "val" or "test". A test scene holds at least one novel category.
        index: 0 or above.
        size: pixels of the picture's side, 32 or above.
        garments: how many garments the scene holds, 2 to 7.

    Example:
        >>> scene = make_category_scene("test", 0)
        >>> len({instance.category for instance in scene.instances}), scene.instances[0].label in (4, 8, 9)
        (3, True)
    """
    rng = sample_generator(split, index)
    composition = Composition(rng, load_wardrobe(split), size)
    shown = CATEGORY_CLASSES[split]
    first = shown[int(rng.integers(len(shown)))]
    allowed = range(1, len(Category) + 1) if split == "test" else shown
    others = [class_index for class_index in rng.permutation(allowed).tolist() if class_index != first]
    for class_index in [first, *others[: garments - 1]]:
        category = Category(class_index - 1)
        garment, top, left = composition.fit(category, composition.random_piece(), _side(rng, size))
        composition.add(category, class_index, garment, random_tint(rng), top, left)
    return composition.scene()


class GarmentScenes(ComposedScenes):
    """Scenes whose classes are single garments, other ones in each split.

    Args:
        split: "train", "val" or "test"; test garments and backgrounds never occur in the other two.
        length: how many scenes; sample `i` is the same whatever the length.
        size: pixels of the picture's side, 32 or above.
        garments: garments in a scene, 2 to 10; None for 3.
        cache: whether to compose all scenes now and keep them, 16 KiB each at size 64, instead of composing them anew
            at each visit.
        transform: applied to each item.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> scenes = GarmentScenes("train", 4)
        >>> scenes[0]["image"].shape, scenes.num_classes, len(scenes[0]["label"].unique())
        (torch.Size([3, 64, 64]), 255, 4)
    """

    fewest_garments = 2

    scene_labels = GARMENT_LABELS
    usual_garments = 3

    def compose(self, index: int) -> Scene:
        return make_garment_scene(self.split, index, size=self.size, garments=self.garments)


class CategoryScenes(ComposedScenes):
    """Scenes whose classes are the ten categories; those of the test split show novel ones among the others.

    Args:
        split: "train", "val" or "test"; test garments and backgrounds never occur in the other two.
        length: how many scenes; sample `i` is the same whatever the length.
        size: pixels of the picture's side, 32 or above.
        garments: garments in a scene, 2 to 7; None for 3.
        cache: whether to compose all scenes now and keep them, 16 KiB each at size 64, instead of composing them anew
            at each visit.
        transform: applied to each item.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> CategoryScenes("train", 4).class_names[1:4]
        ('t shirt', 'trousers', 'pullover')
    """

    fewest_garments, most_garments = 2, 7

    scene_labels = CATEGORY_LABELS
    usual_garments = 3

    def compose(self, index: int) -> Scene:
        return make_category_scene(self.split, index, size=self.size, garments=self.garments)
