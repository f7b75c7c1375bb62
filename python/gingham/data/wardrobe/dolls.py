"""Dolls: persons put together from garments, with part labels, and the labels that a careless annotator would give.

Who a doll is (`DollIdentity`) is drawn before it is painted, and painting draws nothing but the jitter: the same person
can be painted again on another background, which is what re-identification needs. `corrupt_labels` makes the noise that
self-correction has to undo: whole parts named after what they look like, and boundaries that wander.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from gingham.data.labels import LabelSpace
from gingham.data.segmentation import SegmentationDataset, SegmentationItem, Transform
from gingham.data.wardrobe.assets import Wardrobe, load_wardrobe, sample_generator, split_number
from gingham.data.wardrobe.garments import Category, Garment, cut_garment, paint, random_background, random_tint

HEIGHT, WIDTH = 64, 32  # of a doll's picture

BACKGROUND, HEAD, UPPER, COAT, DRESS, TROUSERS, SHOES, BAG = range(8)

#: The parts of a doll. No part has a left and a right, so that a mirrored picture keeps its classes.
DOLL_LABELS = LabelSpace(
    names=("background", "head", "upper", "coat", "dress", "trousers", "shoes", "bag"),
    palette=(
        (0, 0, 0),
        (255, 194, 160),
        (0, 158, 115),
        (213, 94, 0),
        (204, 121, 167),
        (0, 114, 178),
        (240, 228, 66),
        (255, 255, 255),
    ),
)

Tint = tuple[float, float, float]  # what grey values are multiplied by, red, green and blue, 0 to 1

_UPPERS = (Category.T_SHIRT, Category.PULLOVER, Category.SHIRT)
_FOOTWEAR = (Category.SANDAL, Category.SNEAKER, Category.ANKLE_BOOT)
_PART = {
    Category.T_SHIRT: UPPER,
    Category.PULLOVER: UPPER,
    Category.SHIRT: UPPER,
    Category.COAT: COAT,
    Category.DRESS: DRESS,
}
_HAIR: tuple[Tint, ...] = (
    (0.10, 0.08, 0.08),
    (0.30, 0.18, 0.10),
    (0.55, 0.30, 0.12),
    (0.85, 0.70, 0.40),
    (0.70, 0.70, 0.72),
)
_SKIN: tuple[Tint, ...] = ((0.98, 0.84, 0.74), (0.90, 0.70, 0.56), (0.70, 0.50, 0.37), (0.45, 0.31, 0.23))


class Box(NamedTuple):
    """Where a garment goes on a picture 64 pixels high: it is scaled to fit into height times width."""

    height: int
    width: int
    row: float  # of the middle
    column: float  # of the middle, to the right of the picture's middle


_TOP = Box(24, 22, 25, 0)
_DRESS = Box(40, 22, 33, 0)
_TROUSERS = Box(27, 13, 44, 0)
_SHOE = Box(6, 9, 59, 5)
_BAG = Box(12, 10, 40, 10)


@dataclass(frozen=True)
class Piece:
    """A garment that somebody wears: its category, which one of the wardrobe's, and its tint."""

    category: Category
    position: int
    tint: Tint


@dataclass(frozen=True)
class DollIdentity:
    """Who a doll is: all that stays when the same person is seen again. Equal and hashable by value.

    The pieces are positions in the wardrobe of the split that the identity was drawn for.
    """

    top: Piece  # a T-shirt, pullover, shirt, coat or dress
    trousers: Piece  # under a dress, its legs show below the hem
    shoes: Piece
    bag: Piece | None
    bag_side: int  # -1 on the left of the picture, 1 on the right
    hair: Tint
    long_hair: bool
    skin: Tint


@dataclass(frozen=True)
class Doll:
    """A painted doll: who it is, `image` [64, 32, 3] uint8 and `label` [64, 32] uint8, a part each pixel."""

    identity: DollIdentity
    image: NDArray[np.uint8]
    label: NDArray[np.uint8]


def draw_identity(rng: np.random.Generator, wardrobe: Wardrobe) -> DollIdentity:
    """Draw a person who dresses from a wardrobe.

    Two in five wear a T-shirt, pullover or shirt over their trousers, three in ten a coat, three in ten a dress; two in
    three carry a bag.

    Args:
        rng: what to draw from; `sample_generator(split, number)` gives each person of a split a generator of their own.
        wardrobe: the garments, of one split.

    Example:
        >>> from gingham.data.wardrobe.assets import sample_generator
        >>> identity = draw_identity(sample_generator("train", 3), load_wardrobe("train"))
        >>> identity == draw_identity(sample_generator("train", 3), load_wardrobe("train"))
        True
    """

    def piece(*categories: Category) -> Piece:
        category = categories[rng.integers(len(categories))]
        return Piece(category, int(rng.integers(wardrobe.garments.shape[1])), _tint(random_tint(rng)))

    def complexion(tones: tuple[Tint, ...]) -> Tint:
        return _tint(np.asarray(tones[rng.integers(len(tones))]) * rng.uniform(0.9, 1.0))

    outfit = rng.integers(10)
    top = piece(*_UPPERS) if outfit < 4 else piece(Category.COAT if outfit < 7 else Category.DRESS)
    return DollIdentity(
        top=top,
        trousers=piece(Category.TROUSERS),
        shoes=piece(*_FOOTWEAR),
        bag=piece(Category.BAG) if rng.integers(3) else None,
        bag_side=-1 if rng.integers(2) else 1,
        hair=complexion(_HAIR),
        long_hair=bool(rng.integers(2)),
        skin=complexion(_SKIN),
    )


def _tint(colour: NDArray[np.floating]) -> Tint:
    red, green, blue = (float(channel) for channel in colour)
    return red, green, blue


def paint_doll(
    canvas: NDArray[np.float32],
    wardrobe: Wardrobe,
    identity: DollIdentity,
    rng: np.random.Generator,
    *,
    jitter: float = 0.6,
) -> NDArray[np.uint8]:
    """Paint a person over the canvas, in place.

    Args:
        canvas: [2n, n, 3] float32, 0 to 255, n 16 or above; the person fills it.
        wardrobe: where the garments of the identity hang.
        identity: whom to paint.
        rng: what the jitter is drawn from.
        jitter: standard deviation of the places of garments and head, in pixels of a canvas 64 high.

    Returns:
        The part of every pixel, an index into `DOLL_LABELS`, [2n, n] uint8.

    Raises:
        ValueError: a canvas that is not twice as high as wide, or lower than 32.

    Example:
        >>> wardrobe, rng = load_wardrobe("val"), np.random.default_rng(0)
        >>> label = paint_doll(np.zeros((64, 32, 3), np.float32), wardrobe, draw_identity(rng, wardrobe), rng)
        >>> label.shape, DOLL_LABELS.names[label[8, 16]]
        ((64, 32), 'head')
    """
    rows, columns = canvas.shape[:2]
    if rows != 2 * columns or rows < 32:
        raise ValueError(f"canvas must be [2n, n, 3] with n 16 or above, got {list(canvas.shape)}")
    scale = rows / HEIGHT
    label = np.zeros((rows, columns), np.uint8)

    def shift() -> NDArray[np.float64]:
        return rng.normal(0.0, jitter, 2)

    def lay(part: int, garment: Garment, tint: Tint, row: float, column: float) -> None:
        """Paint with the middle at a row and a column from the picture's middle, as near as the canvas allows."""
        height, width = garment.alpha.shape
        top = min(max(round(row * scale - height / 2), 0), rows - height)
        left = min(max(round((column + WIDTH / 2) * scale - width / 2), 0), columns - width)
        paint(canvas, garment, np.asarray(tint, np.float32), top, left)
        label[top : top + height, left : left + width][garment.mask] = part

    def wear(part: int, piece: Piece, box: Box, *, mirrored: bool = False, hung: bool = False) -> None:
        garment = _fit(wardrobe, piece, round(box.height * scale), round(box.width * scale))
        if mirrored:
            garment = Garment(garment.grey[:, ::-1], garment.alpha[:, ::-1])
        # What hangs from the shoulders keeps its upper edge where the box has it, however short it is.
        lift = (box.height - garment.alpha.shape[0] / scale) / 2 if hung else 0.0
        down, right = shift()
        lay(part, garment, piece.tint, box.row - lift + down, box.column * (-1 if mirrored else 1) + right)

    def head() -> None:
        down, right = shift()

        def oval(height: float, width: float, tint: Tint, row: float) -> None:
            lay(HEAD, _oval(round(height * scale), round(width * scale)), tint, row + down, right)

        oval(17 if identity.long_hair else 11, 10, identity.hair, 10 if identity.long_hair else 7)
        oval(8, 5, identity.skin, 12.5)  # the neck
        oval(9, 6, identity.skin, 8)

    head()
    for mirrored in (False, True):
        wear(SHOES, identity.shoes, _SHOE, mirrored=mirrored)
    wear(TROUSERS, identity.trousers, _TROUSERS)
    part = _PART[identity.top.category]
    wear(part, identity.top, _DRESS if part == DRESS else _TOP, hung=True)
    if identity.bag is not None:
        wear(BAG, identity.bag, _BAG, mirrored=identity.bag_side < 0)
    return label


def _fit(wardrobe: Wardrobe, piece: Piece, height: int, width: int) -> Garment:
    """The garment as large as a box of that size allows, its proportions kept."""
    mask = wardrobe.masks[piece.category, piece.position]
    tall, wide = int(np.ptp(np.flatnonzero(mask.any(1)))) + 1, int(np.ptp(np.flatnonzero(mask.any(0)))) + 1
    side = int(max(tall, wide) * min(height / tall, width / wide))
    return cut_garment(wardrobe, piece.category, piece.position, max(1, side))


def _oval(height: int, width: int) -> Garment:
    """A plain white ellipse; a pixel counts by how much of it, in sixteenths, lies inside."""
    fine = 4
    row = (np.arange(height * fine) + 0.5) / (height * fine) * 2 - 1
    column = (np.arange(width * fine) + 0.5) / (width * fine) * 2 - 1
    inside = row[:, None] ** 2 + column**2 <= 1
    alpha = inside.reshape(height, fine, width, fine).mean((1, 3)).astype(np.float32)
    return Garment(grey=alpha * np.float32(255), alpha=alpha)


def make_doll(split: str, index: int) -> Doll:
    """Draw and paint sample `index` of a split.

    Args:
        split: "train", "val" or "test".
        index: 0 or above.

    Example:
        >>> doll = make_doll("train", 0)
        >>> doll.image.shape, doll.label.shape
        ((64, 32, 3), (64, 32))
    """
    rng = sample_generator(split, index)
    wardrobe = load_wardrobe(split)
    identity = draw_identity(rng, wardrobe)
    middle = (HEIGHT - WIDTH) // 2
    canvas = random_background(rng, wardrobe, HEIGHT)[:, middle : middle + WIDTH].copy()
    label = paint_doll(canvas, wardrobe, identity, rng)
    return Doll(identity, np.clip(np.round(canvas), 0, 255).astype(np.uint8), label)


class Confusion(NamedTuple):
    """How often an annotator names a part wrongly, and the names that they then give it, all equally often."""

    rate: float
    names: tuple[int, ...]


#: What a careless annotator takes each part for: garments for garments of the same place, small things for nothing.
CONFUSIONS: Mapping[int, Confusion] = {
    HEAD: Confusion(0.25, (BACKGROUND,)),
    UPPER: Confusion(0.30, (COAT, DRESS)),
    COAT: Confusion(0.35, (UPPER, DRESS)),
    DRESS: Confusion(0.35, (UPPER, COAT)),
    TROUSERS: Confusion(0.25, (DRESS,)),
    SHOES: Confusion(0.30, (TROUSERS, BACKGROUND)),
    BAG: Confusion(0.30, (BACKGROUND, UPPER)),
}

_KNOT = 8  # pixels between the places at which the wandering of a boundary is drawn


def corrupt_labels(
    label: NDArray[np.uint8],
    rng: np.random.Generator,
    *,
    confusions: Mapping[int, Confusion] = CONFUSIONS,
    wander: float = 1.3,
) -> NDArray[np.uint8]:
    """Label a doll as a careless annotator would: parts get the name of something similar, boundaries wander.

    Every part of the doll is misnamed as a whole or not at all, by its own draw and at its own rate, 25 to 35 % as
    `CONFUSIONS` has it. Then every pixel takes the label that stands some way off: the way is drawn every 8 pixels from
    a normal distribution and interpolated in between, so that boundaries bend smoothly. With the defaults the labels of
    the first 500 training dolls score about 54 % mIoU against the truth.

    Args:
        label: the true parts, [H, W] uint8; it stays as it is.
        rng: what to draw from.
        confusions: how often a part is misnamed and what for; a part that is not in it always keeps its name.
        wander: standard deviation of the ways that are drawn, in pixels along rows and columns each; 0 keeps the
            boundaries.

    Returns:
        The noisy labels, [H, W] uint8. No value occurs that is neither in `label` nor in `confusions`.

    Raises:
        ValueError: a rate outside 0 to 1, a part without other names, or a way below 0.

    Example:
        >>> label = make_doll("train", 0).label
        >>> noisy = corrupt_labels(label, np.random.default_rng(0))
        >>> noisy.shape == label.shape, bool((noisy != label).any())
        (True, True)
    """
    for part, confusion in confusions.items():
        if not 0 <= confusion.rate <= 1 or not confusion.names:
            raise ValueError(f"confusions must have rates of 0 to 1 and a name or more, got {confusion} for {part}")
    if wander < 0:
        raise ValueError(f"wander must be 0 or above, got {wander}")
    name_of = np.arange(256, dtype=np.uint8)
    for part, (rate, names) in confusions.items():
        misnamed, name = rng.random() < rate, names[rng.integers(len(names))]
        if misnamed:
            name_of[part] = name
    rows, columns = label.shape
    row = np.arange(rows)[:, None] + wander * _smooth_normal(rng, rows, columns)
    column = np.arange(columns) + wander * _smooth_normal(rng, rows, columns)
    row, column = np.rint(row).astype(np.intp), np.rint(column).astype(np.intp)
    noisy: NDArray[np.uint8] = name_of[label[row.clip(0, rows - 1), column.clip(0, columns - 1)]]
    return noisy


def _smooth_normal(rng: np.random.Generator, rows: int, columns: int) -> NDArray[np.float64]:
    """A field [rows, columns] of normal draws at knots, bilinear in between."""
    field = rng.normal(size=(-(-rows // _KNOT) + 1, -(-columns // _KNOT) + 1))
    for axis, length in ((0, rows), (1, columns)):
        place = np.arange(length) / _KNOT
        before = place.astype(np.intp)
        share = np.expand_dims(place - before, 1 - axis)
        field = field.take(before, axis) * (1 - share) + field.take(before + 1, axis) * share
    return field


class Dolls(SegmentationDataset):
    """Human parsing on dolls: one person a picture, eight classes, labels true or noisy.

    Args:
        split: "train", "val" or "test"; test garments and backgrounds never occur in the other two.
        length: how many dolls; sample `i` is the same whatever the length.
        noise: give the labels of `corrupt_labels` instead of the true ones. Those of sample `i` are always the same,
            and its picture is that of the sample without noise.
        cache: whether to paint all dolls now and keep them, 8 KiB each, instead of painting them anew at each visit.
        transform: applied to each item.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> dolls = Dolls("train", 4, noise=True)
        >>> item = dolls[0]
        >>> item["image"].shape, item["label"].dtype, item["name"]
        (torch.Size([3, 64, 32]), torch.int64, 'doll_train_000000')
    """

    def __init__(
        self,
        split: str,
        length: int,
        *,
        noise: bool = False,
        cache: bool = False,
        transform: Transform | None = None,
    ) -> None:
        split_number(split)
        if length < 0:
            raise ValueError(f"length must be 0 or above, got {length}")
        super().__init__(split, DOLL_LABELS, transform)
        self.length = length
        self.noise = noise
        self._kept = [self._compose(index) for index in range(length)] if cache else None

    def __len__(self) -> int:
        return self.length

    def _compose(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        doll = make_doll(self.split, index)
        label = corrupt_labels(doll.label, _annotator(self.split, index)) if self.noise else doll.label
        return torch.from_numpy(doll.image).permute(2, 0, 1).contiguous(), torch.from_numpy(label)

    def read(self, index: int) -> SegmentationItem:
        image, label = self._compose(index) if self._kept is None else self._kept[index]
        name = f"doll_{self.split}_{index:06d}"
        # Copies: a transform may work in place, and must not reach what is kept.
        return {"image": image.clone(), "label": label.to(torch.int64), "name": name}


def _annotator(split: str, index: int) -> np.random.Generator:
    """A generator apart from the one that the doll was drawn from, so that noise changes nothing in the picture."""
    return np.random.default_rng([split_number(split), index, 1])
