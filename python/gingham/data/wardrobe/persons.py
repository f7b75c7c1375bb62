"""Pictures of persons from two cameras of a domain: the task of adapting to cameras that nobody has labelled."""

from __future__ import annotations

from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gingham.data.reid import PersonDataset, PixelTransform
from gingham.data.wardrobe.assets import split_number
from gingham.data.wardrobe.cameras import (
    CAMERAS,
    Domain,
    backdrop,
    check_world,
    identity_of,
    person_id,
    scenery,
    sightings,
    world_split,
)
from gingham.data.wardrobe.dolls import HEIGHT, WIDTH, paint_doll

_PICTURE = 8  # the number of this use of random numbers


def make_person(split: str, domain: Domain, number: int, camera: int, image: int) -> NDArray[np.uint8]:
    """Paint one picture of a person.

    Args:
        split: of the wardrobe: "train", "val" or "test".
        domain: "source" or "target".
        number: of the person, 0 or above.
        camera: 0 or 1.
        image: of the person from that camera, 0 or above.

    Returns:
        uint8 [64, 32, 3].

    Example:
        >>> make_person("train", "source", 0, 0, 0).shape
        (64, 32, 3)
    """
    domain_number = get_args(Domain).index(domain)
    rng = np.random.default_rng([split_number(split), number, _PICTURE, domain_number, camera, image])
    wardrobe, seen_by = scenery(split, domain), CAMERAS[domain][camera]
    canvas = backdrop(rng, wardrobe, camera, HEIGHT, WIDTH)
    side = seen_by.side(rng, HEIGHT)
    top, left = rng.integers(HEIGHT - 2 * side + 1), rng.integers(WIDTH - side + 1)
    place = canvas[top : top + 2 * side, left : left + side]
    paint_doll(place, wardrobe, identity_of(split, domain, number), rng)
    return seen_by.take(canvas, rng)


class PersonImages(PersonDataset):
    """Persons of the world in single pictures, 64 x 32, each from both cameras of a domain.

    Persons of training, validation and test dress from garments of their own and are never the same; nor are those of
    the two domains. A query is the first picture of a person from a camera, the gallery all others.

    Args:
        split: "train", "val_query", "val_gallery", "query" or "gallery".
        persons: how many, 0 to 3000; each is the same however many there are.
        domain: "source" or "target".
        images: of a person from a camera, 2 or more; each is the same however many there are.
        cache: whether to paint all pictures now and keep them, 6 KiB each, instead of painting them anew at each visit.
        transform: applied to the pixels of each item.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> item = PersonImages("query", 3, domain="target")[3]
        >>> item["image"].shape, item["person"], item["camera"], item["name"]
        (torch.Size([3, 64, 32]), 6002, 1, '6002_c2s1_000001_00')
    """

    def __init__(
        self,
        split: str,
        persons: int,
        *,
        domain: Domain = "source",
        images: int = 4,
        cache: bool = False,
        transform: PixelTransform | None = None,
    ) -> None:
        check_world(domain, persons=persons, images=images)
        home = world_split(split)
        self._sights = sightings(split, persons, images)
        ids = [person_id(home, number) for number, _, _ in self._sights]
        super().__init__(
            split,
            ids,
            [camera for _, camera, _ in self._sights],
            [
                f"{person:04d}_c{camera + 1}s1_{image + 1:06d}_00"
                for person, (_, camera, image) in zip(ids, self._sights, strict=True)
            ],
            transform,
        )
        self.domain: Domain = domain
        self._kept = torch.stack([self._paint(index) for index in range(len(self))]) if cache and len(self) else None

    def _paint(self, index: int) -> Tensor:
        picture = make_person(world_split(self.split), self.domain, *self._sights[index])
        return torch.from_numpy(picture).permute(2, 0, 1).contiguous()

    def read(self, index: int) -> Tensor:
        # A copy: a transform may work in place, and must not reach what is kept.
        return self._paint(index) if self._kept is None else self._kept[index].clone()
