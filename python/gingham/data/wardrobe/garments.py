"""One garment: cut out of its picture, brought to size, tinted, painted onto a canvas; and the canvas itself."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gingham.data.wardrobe.assets import Wardrobe


class Category(IntEnum):
    """The categories of Fashion-MNIST, by their official numbers."""

    T_SHIRT = 0
    TROUSERS = 1
    PULLOVER = 2
    DRESS = 3
    COAT = 4
    SANDAL = 5
    SHIRT = 6
    SNEAKER = 7
    BAG = 8
    ANKLE_BOOT = 9


@dataclass(frozen=True)
class Garment:
    """A garment within its bounding box.

    `grey` [h, w] float32, 0 to 255, is zero outside the garment and already multiplied by `alpha` [h, w] float32, the
    share of each pixel that the garment covers.
    """

    grey: NDArray[np.float32]
    alpha: NDArray[np.float32]

    @property
    def mask(self) -> NDArray[np.bool_]:
        """The pixels that the garment covers by half or more, [h, w]."""
        return self.alpha >= 0.5


#: A part of a garment: the upper, left, lower and right edge as shares of its height and width.
Part = tuple[float, float, float, float]

WHOLE: Part = (0.0, 0.0, 1.0, 1.0)


def cut_garment(wardrobe: Wardrobe, category: Category, position: int, side: int, part: Part = WHOLE) -> Garment:
    """Cut a garment, or a part of it, out along its mask and scale it.

    Args:
        wardrobe: where it hangs.
        category: which category.
        position: which garment of the category.
        side: pixels of the whole garment's longer side afterwards.
        part: what of it to take; at least a pixel is left.
    """
    mask = wardrobe.masks[category, position]
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    mask = mask[box]
    grey = np.where(mask, wardrobe.garments[category, position][box], 0).astype(np.uint8)
    scale = side / max(mask.shape)
    height, width = (max(1, round(length * scale)) for length in mask.shape)
    top, left = min(int(part[0] * height), height - 1), min(int(part[1] * width), width - 1)
    inside = np.s_[top : max(top + 1, round(part[2] * height)), left : max(left + 1, round(part[3] * width))]
    return Garment(
        grey=_resize(grey, height, width)[inside].astype(np.float32),
        alpha=_resize(mask.astype(np.uint8) * 255, height, width)[inside].astype(np.float32) / np.float32(255),
    )


def paint(canvas: NDArray[np.float32], garment: Garment, tint: NDArray[np.float32], top: int, left: int) -> None:
    """Lay a garment over the canvas [H, W, 3], in place.

    Args:
        canvas: float32, 0 to 255.
        garment: what to paint; it must lie within the canvas.
        tint: what its grey values are multiplied by, [3].
        top: row of its upper edge.
        left: column of its left edge.
    """
    height, width = garment.alpha.shape
    under = canvas[top : top + height, left : left + width]
    under *= 1 - garment.alpha[..., None]
    under += garment.grey[..., None] * tint


def random_tint(rng: np.random.Generator) -> NDArray[np.float32]:
    """A light colour to multiply grey values by, [3] in 0.4 to 1."""
    return rng.uniform(0.4, 1.0, 3).astype(np.float32)


def random_background(rng: np.random.Generator, wardrobe: Wardrobe, size: int) -> NDArray[np.float32]:
    """A square crop of a photograph, at random place, scale, mirroring and light: [size, size, 3] float32, 0 to 255."""
    photograph = wardrobe.photographs[rng.integers(len(wardrobe.photographs))]
    rows, columns = photograph.shape[:2]
    side = int(rng.integers(rows // 3, rows + 1))
    top, left = rng.integers(rows - side + 1), rng.integers(columns - side + 1)
    crop = photograph[top : top + side, left : left + side]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    light = rng.uniform(0.5, 1.0) * rng.uniform(0.7, 1.0, 3)
    return (_resize(crop, size, size) * light).astype(np.float32)


def _resize(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    # Pillow's bilinear filter averages over the whole source area when it shrinks, in integers, hence alike everywhere.
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), Image.Resampling.BILINEAR))
