"""Cameras that see the same persons differently, and the persons whom they see: what re-identification has to overcome.

Each domain has two cameras with gains, offsets, hues, noise, scales and a photograph behind of their own. Those of the
source differ less from each other than those of the target do, so that what is learnt from the first does not suffice
for the second. In validation and test, each looks at a photograph that no camera of its domain looks at in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from gingham.data.wardrobe.assets import Wardrobe, load_wardrobe, split_number
from gingham.data.wardrobe.dolls import DollIdentity, draw_identity
from gingham.data.wardrobe.garments import random_background

#: Two networks of cameras.
Domain = Literal["source", "target"]

#: How many persons a split may have, so that the numbers of all fit into four digits.
MOST_PERSONS = 3000

_IDENTITY = 7  # the number of this use of random numbers
# What is behind a person is out of focus, in a light of its own. A small network without pretrained weights would else
# know a picture by it, and find nobody before a photograph that it was not trained on.
_LIGHT = (80, 175)  # of red, green and blue
_GREY, _TINGE = (70, 190), 12  # of all three, and by how much each may differ from that
_CONTRAST = np.float32(0.3)


@dataclass(frozen=True)
class Camera:
    """What a camera makes of a picture.

    Args:
        gain: of red, green and blue.
        offset: added to them, of 255.
        hue: degrees by which colours are turned about grey.
        noise: standard deviation, of 255.
        scale: least and largest height of a person, as shares of the picture's.
    """

    gain: tuple[float, float, float]
    offset: tuple[float, float, float]
    hue: float
    noise: float
    scale: tuple[float, float]

    def take(self, picture: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.uint8]:
        """The picture [..., 3], 0 to 255, as the camera stores it."""
        gain, offset = np.array(self.gain, np.float32), np.array(self.offset, np.float32)
        seen = picture @ _hue_rotation(self.hue) * gain + offset
        seen = seen + np.float32(self.noise) * rng.standard_normal(picture.shape, np.float32)
        return np.clip(np.rint(seen), 0, 255).astype(np.uint8)

    def side(self, rng: np.random.Generator, height: int) -> int:
        """The width of a person, half the height, on a picture of that height."""
        low, high = (round(share * height / 2) for share in self.scale)
        return int(rng.integers(low, high + 1))


CAMERAS: dict[Domain, tuple[Camera, Camera]] = {
    "source": (
        Camera((1.0, 1.0, 1.0), (0, 0, 0), hue=0, noise=4, scale=(0.88, 1.0)),
        Camera((0.8, 0.95, 1.05), (8, 0, -4), hue=15, noise=6, scale=(0.8, 0.94)),
    ),
    "target": (
        Camera((1.08, 0.95, 0.88), (-4, 0, 6), hue=30, noise=5, scale=(0.84, 0.98)),
        Camera((0.85, 0.93, 1.08), (6, 2, -4), hue=-15, noise=6, scale=(0.82, 0.96)),
    ),
}


@cache
def _hue_rotation(degrees: float) -> NDArray[np.float32]:
    """Turns colours about the axis of greys; to be multiplied from the right."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees)) / math.sqrt(3)
    cross = np.array([[0, 1, -1], [-1, 0, 1], [1, -1, 0]])
    return (cosine * np.eye(3) + (1 - cosine) / 3 + sine * cross).astype(np.float32)


def world_split(split: str) -> str:
    """The split of the wardrobe that a split of re-identification dresses from."""
    return {"train": "train", "val_query": "val", "val_gallery": "val"}.get(split, "test")


def scenery(split: str, domain: Domain) -> Wardrobe:
    """The wardrobe of a split with the photographs that the two cameras of a domain look at.

    Two of the four that training and validation share are each domain's; in validation the domains change places. The
    test has two of its own.
    """
    wardrobe = load_wardrobe(split)
    second = split != "test" and (domain == "target") != (split == "val")
    return replace(wardrobe, photographs=wardrobe.photographs[2:4] if second else wardrobe.photographs[:2])


def coloured_light(rng: np.random.Generator) -> NDArray[np.float32]:
    """A light of any colour, [3] of 255."""
    return rng.uniform(*_LIGHT, 3).astype(np.float32)


def grey_light(rng: np.random.Generator) -> NDArray[np.float32]:
    """A light of any brightness and next to no colour, [3] of 255."""
    return (rng.uniform(*_GREY) + rng.uniform(-_TINGE, _TINGE, 3)).astype(np.float32)


def out_of_focus(picture: NDArray[np.float32], light: NDArray[np.float32]) -> NDArray[np.float32]:
    """What is left of a picture [H, W, 3] where the lens is not set to its distance, in the light [3]."""
    blurred: NDArray[np.float32] = light + _CONTRAST * (picture - picture.mean((0, 1)))
    return blurred


def backdrop(
    rng: np.random.Generator,
    wardrobe: Wardrobe,
    camera: int,
    height: int,
    width: int,
    *,
    light: Callable[[np.random.Generator], NDArray[np.float32]] = coloured_light,
) -> NDArray[np.float32]:
    """What is behind a person: [height, width, 3], 0 to 255.

    Args:
        rng: what decides.
        wardrobe: of `scenery`.
        camera: 0 or 1.
        height: of the picture.
        width: of the picture, at most its height.
        light: draws the light, `coloured_light` or `grey_light`.
    """
    alone = replace(wardrobe, photographs=wardrobe.photographs[camera : camera + 1])
    left = (height - width) // 2
    canvas = random_background(rng, alone, height)[:, left : left + width]
    return out_of_focus(canvas, light(rng))


def person_id(split: str, number: int) -> int:
    """The number of a person in a data set, 1 or above; persons of other splits of the wardrobe have others.

    Example:
        >>> person_id("train", 0), person_id("val", 0), person_id("test", 5)
        (1, 3001, 6006)
    """
    return split_number(split) * MOST_PERSONS + number + 1


def identity_of(split: str, domain: Domain, number: int) -> DollIdentity:
    """Who a person of a split of the wardrobe and a domain is."""
    domain_number = get_args(Domain).index(domain)
    return draw_identity(
        np.random.default_rng([split_number(split), number, _IDENTITY, domain_number]), load_wardrobe(split)
    )


def check_world(domain: str, **counts: int) -> None:
    """Raise a ValueError that names the first option of a world of persons that cannot be."""
    if domain not in get_args(Domain):
        raise ValueError(f"domain must be 'source' or 'target', got {domain!r}")
    for name, value in counts.items():
        least = 0 if name == "persons" else 2 if name in ("images", "tracklets") else 1
        if value < least or value > MOST_PERSONS:
            raise ValueError(f"{name} must be {least} to {MOST_PERSONS}, got {value}")


def sightings(split: str, persons: int, each: int) -> list[tuple[int, int, int]]:
    """What a split of a world holds: (person, camera, which of the person's from that camera).

    Args:
        split: "train" has all, "query" and "val_query" the first from each camera, the galleries the others.
        persons: how many.
        each: of every person from each camera, all splits together.

    Example:
        >>> sightings("gallery", 1, 3)
        [(0, 0, 1), (0, 0, 2), (0, 1, 1), (0, 1, 2)]
    """
    which = range(each) if split == "train" else range(1) if split.endswith("query") else range(1, each)
    return [(number, camera, one) for number in range(persons) for camera in (0, 1) for one in which]
