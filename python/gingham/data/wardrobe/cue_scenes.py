"""Scenes in which one cue object decides the class of the trousers: the task that needs context from the whole image.

A scene holds exactly one cue, a bag or an ankle boot. All trousers of a scene belong to one class with the bag and to
another with the boot, and look the same in both. Every other choice (background, places, sizes, tints, garments, how
many trousers) is drawn without regard to the cue, so that the cue's pixels alone tell the two classes apart.
"""

from __future__ import annotations

from gingham.data.cityscapes import CITYSCAPES_LABELS
from gingham.data.labels import LabelSpace
from gingham.data.wardrobe.assets import load_wardrobe, sample_generator
from gingham.data.wardrobe.composition import ComposedScenes, Composition, Scene
from gingham.data.wardrobe.garments import Category, cut_garment, random_tint

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
#: The class index of every category whose class does not depend on the cue.
CLASS_OF_CATEGORY = {
    Category.T_SHIRT: 1,
    Category.PULLOVER: 1,
    Category.COAT: 1,
    Category.SHIRT: 1,
    Category.DRESS: 2,
    Category.BAG: 3,
    Category.ANKLE_BOOT: 4,
}
_TROUSERS = {Category.BAG: 5, Category.ANKLE_BOOT: 6}  # by the cue of the scene
#: How many trousers a scene holds at least and at most.
FEWEST_TROUSERS, MOST_TROUSERS = 2, 4
_GARMENT_SIDES = (14 / 64, 20 / 64)  # of the picture's side


def make_cue_scene(split: str, index: int, *, size: int = 64, garments: int = 8, cue: Category | None = None) -> Scene:
    """Compose sample `index` of a split.

    Args:
        split: "train", "val" or "test".
        index: 0 or above.
        size: pixels of the picture's side, 32 or above.
        garments: how many garments the scene holds, the cue included, 4 to 10.
        cue: show this cue, `Category.BAG` or `Category.ANKLE_BOOT`, instead of the one that the sample drew; all else
            in the scene but the class of the trousers stays as it is.

    Returns:
        The scene; its first instance is the cue.

    Example:
        >>> scene = make_cue_scene("train", 0)
        >>> scene.image.shape, len(scene.instances)
        ((64, 64, 3), 8)
    """
    rng = sample_generator(split, index)
    composition = Composition(rng, load_wardrobe(split), size)

    def side() -> int:
        low, high = (round(share * size) for share in _GARMENT_SIDES)
        return int(rng.integers(low, high + 1))

    # The cue. Both candidates are drawn, and the square kept free for it fits either, so that what follows is the same
    # whichever of them is shown.
    candidates = {category: composition.random_piece() for category in _CUES}
    drawn = _CUES[rng.integers(2)]
    shown = drawn if cue is None else cue
    cue_side = side()
    garment = cut_garment(composition.wardrobe, shown, candidates[shown], cue_side)
    top, left = (int(place) for place in rng.integers(size - cue_side + 1, size=2))
    composition.reserve(top, left, cue_side, cue_side)
    height, width = garment.alpha.shape
    place = (top + (cue_side - height) // 2, left + (cue_side - width) // 2)
    composition.add(shown, CLASS_OF_CATEGORY[shown], garment, random_tint(rng), *place)

    # Then the trousers, which are to be found in every scene, then garments that mean nothing.
    trousers = int(rng.integers(FEWEST_TROUSERS, min(MOST_TROUSERS, garments - 2) + 1))
    for number in range(garments - 1):
        category = Category.TROUSERS if number < trousers else _DISTRACTORS[rng.integers(len(_DISTRACTORS))]
        class_index = _TROUSERS[shown] if category == Category.TROUSERS else CLASS_OF_CATEGORY[category]
        garment, top, left = composition.fit(category, composition.random_piece(), side())
        composition.add(category, class_index, garment, random_tint(rng), top, left)
    return composition.scene()


class CueScenes(ComposedScenes):
    """The cue-object task: the class of the trousers depends on whether a bag or a boot is anywhere in the picture.

    Args:
        split: "train", "val" or "test"; test garments and backgrounds never occur in the other two.
        length: how many scenes; sample `i` is the same whatever the length.
        size: pixels of the picture's side, 32 or above.
        garments: garments in a scene, the cue included, 4 to 10; None for 8.
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

    scene_labels = CUE_LABELS
    usual_garments = 8

    def compose(self, index: int) -> Scene:
        return make_cue_scene(self.split, index, size=self.size, garments=self.garments)
