"""Scenes at three scales in which the colour of the bag decides the class of the trousers: the task of SPGNet.

As in the cue scenes, one object anywhere in the picture decides the class of all trousers. Here it is a bag in every
scene, and what decides is its colour, red or blue. Other garments come in the same two colours and decide nothing, so
that a colour counts only together with the class of the pixels that have it. Garments are small, middling or large.
Every other choice is drawn without regard to the colour of the bag.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from gingham.data.labels import LabelSpace
from gingham.data.segmentation import Transform
from gingham.data.wardrobe.assets import load_wardrobe, sample_generator
from gingham.data.wardrobe.composition import ComposedScenes, Composition, Scene
from gingham.data.wardrobe.cue_scenes import CLASS_OF_CATEGORY, CUE_LABELS, FEWEST_TROUSERS, MOST_TROUSERS
from gingham.data.wardrobe.garments import Category, random_tint

Colour = Literal["red", "blue"]

#: The classes of the cue scenes, with colours of one bag in the place of two cues.
SCALE_LABELS = LabelSpace(
    names=(*CUE_LABELS.names[:5], "trousers with red bag", "trousers with blue bag"),
    palette=CUE_LABELS.palette,
    values=CUE_LABELS.values,
)

#: What the longer side of a garment is drawn from, of the picture's side: small, middling, large.
SCALES = ((10 / 64, 12 / 64), (15 / 64, 18 / 64), (22 / 64, 26 / 64))

_COLOURS: tuple[Colour, ...] = ("red", "blue")
_TINTS = {"red": (1.0, 0.25, 0.15), "blue": (0.15, 0.25, 1.0)}
_TROUSERS = {"red": 5, "blue": 6}  # by the colour of the bag
_DISTRACTORS = tuple(category for category in CLASS_OF_CATEGORY if category != Category.BAG)


def make_scale_scene(
    split: str,
    index: int,
    *,
    size: int = 64,
    garments: int = 8,
    decoys: float = 0.2,
    colour: Colour | None = None,
) -> Scene:
    """Compose sample `index` of a split.

    Args:
        split: "train", "val" or "test".
        index: 0 or above.
        size: pixels of the picture's side, 32 or above.
        garments: how many garments the scene holds, the bag included, 4 to 10.
        decoys: probability, 0 to 1, that another garment is red or blue as a bag could be.
        colour: show a bag of this colour instead of the one that the sample drew; all else in the scene but the class
            of the trousers stays as it is.

    Returns:
        The scene; its first instance is the bag, which is middling or large.

    Example:
        >>> scene = make_scale_scene("train", 0)
        >>> scene.image.shape, len(scene.instances), scene.instances[0].category.name
        ((64, 64, 3), 8, 'BAG')
    """
    rng = sample_generator(split, index)
    composition = Composition(rng, load_wardrobe(split), size)

    def side(smallest: int = 0) -> int:
        low, high = (round(share * size) for share in SCALES[rng.integers(smallest, len(SCALES))])
        return int(rng.integers(low, high + 1))

    def tint(shade: Colour) -> np.ndarray:
        return np.array(_TINTS[shade], np.float32)

    drawn = _COLOURS[rng.integers(len(_COLOURS))]
    shown = drawn if colour is None else colour
    garment, top, left = composition.fit(Category.BAG, composition.random_piece(), side(smallest=1))
    composition.add(Category.BAG, CLASS_OF_CATEGORY[Category.BAG], garment, tint(shown), top, left)

    trousers = int(rng.integers(FEWEST_TROUSERS, min(MOST_TROUSERS, garments - 2) + 1))
    for number in range(garments - 1):
        category = Category.TROUSERS if number < trousers else _DISTRACTORS[rng.integers(len(_DISTRACTORS))]
        class_index = _TROUSERS[shown] if category == Category.TROUSERS else CLASS_OF_CATEGORY[category]
        garment, top, left = composition.fit(category, composition.random_piece(), side())
        decoy = rng.random() < decoys
        worn = tint(_COLOURS[rng.integers(len(_COLOURS))]) if decoy else random_tint(rng)
        composition.add(category, class_index, garment, worn, top, left)
    return composition.scene()


class ScaleScenes(ComposedScenes):
    """The coloured-bag task: the class of the trousers depends on the colour of the bag, wherever it lies.

    Args:
        split: "train", "val" or "test"; test garments and backgrounds never occur in the other two.
        length: how many scenes; sample `i` is the same whatever the length.
        size: pixels of the picture's side, 32 or above.
        garments: garments in a scene, the bag included, 4 to 10; None for 8.
        decoys: probability, 0 to 1, that another garment is red or blue as a bag could be.
        cache: whether to compose all scenes now and keep them, 16 KiB each at size 64, instead of composing them anew
            at each visit.
        transform: applied to each item.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> scenes = ScaleScenes("train", 4)
        >>> item = scenes[0]
        >>> item["image"].shape, item["label"].dtype, item["name"]
        (torch.Size([3, 64, 64]), torch.int64, 'wardrobe_train_000000')
    """

    #: The class indices of the trousers, whose IoU measures whether the bag was understood.
    trousers = tuple(_TROUSERS.values())

    scene_labels = SCALE_LABELS
    usual_garments = 8

    def __init__(
        self,
        split: str,
        length: int,
        *,
        size: int = 64,
        garments: int | None = None,
        decoys: float = 0.2,
        cache: bool = False,
        transform: Transform | None = None,
    ) -> None:
        if not 0 <= decoys <= 1:
            raise ValueError(f"decoys must be 0 to 1, got {decoys}")
        self.decoys = decoys
        super().__init__(split, length, size=size, garments=garments, cache=cache, transform=transform)

    def compose(self, index: int) -> Scene:
        return make_scale_scene(self.split, index, size=self.size, garments=self.garments, decoys=self.decoys)
