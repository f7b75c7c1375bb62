"""Tracklets of persons whom something hides in most frames: the task of attention over space and time.

A person walks in front of a camera; from frame to frame the crop wanders, and an obstacle of the height of a third to
three fifths of the picture hides the person in most frames, at another height in each. What is behind and what hides,
too near for the lens, are both out of focus and next to grey, so that they can be told from clothes in any photograph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gingham.data.reid import PixelTransform, TrackletDataset
from gingham.data.wardrobe.assets import split_number
from gingham.data.wardrobe.cameras import (
    CAMERAS,
    Domain,
    backdrop,
    check_world,
    grey_light,
    identity_of,
    out_of_focus,
    person_id,
    scenery,
    sightings,
    world_split,
)
from gingham.data.wardrobe.dolls import HEIGHT, WIDTH, paint_doll
from gingham.data.wardrobe.garments import random_background

_TRACKLET = 9  # the number of this use of random numbers
_WANDER = 3  # pixels by which a crop is off at most
_HIDDEN = (0.35, 0.60)  # of the picture's height


class Tracklet(NamedTuple):
    """The frames of a person, uint8 [T, 64, 32, 3], and which rows are hidden, the first and the last + 1, [T, 2]."""

    frames: NDArray[np.uint8]
    hidden: NDArray[np.int64]


def make_tracklet(
    split: str,
    domain: Domain,
    number: int,
    camera: int,
    tracklet: int,
    *,
    frames: int = 8,
    occlusion: float = 0.6,
) -> Tracklet:
    """Paint one tracklet of a person.

    Args:
        split: of the wardrobe: "train", "val" or "test".
        domain: "source" or "target".
        number: of the person, 0 or above.
        camera: 0 or 1.
        tracklet: of the person from that camera, 0 or above.
        frames: T, 1 or more; each is the same however many there are.
        occlusion: the share of frames in which something is hidden, 0 to 1; all else stays as it is.

    Example:
        >>> frames, hidden = make_tracklet("train", "source", 0, 0, 0, frames=4)
        >>> frames.shape, hidden.shape
        ((4, 64, 32, 3), (4, 2))
    """
    domain_number = get_args(Domain).index(domain)
    rng = np.random.default_rng([split_number(split), number, _TRACKLET, domain_number, camera, tracklet])
    wardrobe, seen_by = scenery(split, domain), CAMERAS[domain][camera]
    rows, columns = HEIGHT + 2 * _WANDER, WIDTH + 2 * _WANDER
    canvas = backdrop(rng, wardrobe, camera, rows, columns, light=grey_light)
    side = seen_by.side(rng, HEIGHT)
    top, left = (rows - 2 * side) // 2, (columns - side) // 2
    paint_doll(canvas[top : top + 2 * side, left : left + side], wardrobe, identity_of(split, domain, number), rng)
    pictures, hidden = np.empty((frames, HEIGHT, WIDTH, 3), np.uint8), np.zeros((frames, 2), np.int64)
    for frame in range(frames):
        down, right = rng.integers(2 * _WANDER + 1, size=2)
        picture = canvas[down : down + HEIGHT, right : right + WIDTH].copy()
        obstacle = out_of_focus(random_background(rng, wardrobe, HEIGHT)[:, :WIDTH], grey_light(rng))
        height = round(rng.uniform(*_HIDDEN) * HEIGHT)
        first = int(rng.integers(HEIGHT - height + 1))
        if rng.random() < occlusion:
            picture[first : first + height] = obstacle[:height]
            hidden[frame] = first, first + height
        pictures[frame] = seen_by.take(picture, rng)
    return Tracklet(pictures, hidden)


class Tracklets(TrackletDataset):
    """Persons of the world in tracklets, frames of 64 x 32, each from both cameras of a domain.

    Persons of training, validation and test dress from garments of their own and are never the same. A query is the
    first tracklet of a person from a camera, the gallery all others.

    Args:
        split: "train", "val_query", "val_gallery", "query" or "gallery".
        persons: how many, 0 to 3000; each is the same however many there are.
        domain: "source" or "target".
        tracklets: of a person from a camera, 2 or more; each is the same however many there are.
        frames: of a tracklet, 1 or more.
        occlusion: the share of frames in which the person is partly hidden, 0 to 1.
        cache: whether to paint all tracklets now and keep them, 6 KiB a frame, instead of painting them anew at each
            visit.
        transform: applied to the pixels of each item.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> item = Tracklets("gallery", 3)[2]
        >>> item["frames"].shape, item["person"], item["camera"], item["name"]
        (torch.Size([8, 3, 64, 32]), 6002, 0, '6002C1T0002')
    """

    def __init__(
        self,
        split: str,
        persons: int,
        *,
        domain: Domain = "source",
        tracklets: int = 2,
        frames: int = 8,
        occlusion: float = 0.6,
        cache: bool = False,
        transform: PixelTransform | None = None,
    ) -> None:
        check_world(domain, persons=persons, tracklets=tracklets, frames=frames)
        if not 0 <= occlusion <= 1:
            raise ValueError(f"occlusion must be 0 to 1, got {occlusion}")
        home = world_split(split)
        self._sights = sightings(split, persons, tracklets)
        ids = [person_id(home, number) for number, _, _ in self._sights]
        super().__init__(
            split,
            ids,
            [camera for _, camera, _ in self._sights],
            [
                f"{person:04d}C{camera + 1}T{one + 1:04d}"
                for person, (_, camera, one) in zip(ids, self._sights, strict=True)
            ],
            np.full(len(ids), frames),
            transform,
        )
        self.domain: Domain = domain
        self.frames, self.occlusion = frames, occlusion
        self._kept = [self._paint(index) for index in range(len(self))] if cache else None

    def _paint(self, index: int) -> Tracklet:
        return make_tracklet(
            world_split(self.split),
            self.domain,
            *self._sights[index],
            frames=self.frames,
            occlusion=self.occlusion,
        )

    def _tracklet(self, index: int) -> Tracklet:
        return self._paint(index) if self._kept is None else self._kept[index]

    def frames_of(self, index: int, frame_numbers: Sequence[int] | NDArray[np.int64]) -> Tensor:
        chosen = self._tracklet(index).frames[np.asarray(frame_numbers, np.int64)]  # a copy
        return torch.from_numpy(chosen).permute(0, 3, 1, 2).contiguous()

    def occluded(self, index: int, frame_numbers: Sequence[int] | NDArray[np.int64]) -> Tensor:
        hidden = torch.from_numpy(self._tracklet(index).hidden[np.asarray(frame_numbers, np.int64)])
        rows = torch.arange(HEIGHT)
        covered = (rows >= hidden[:, :1]) & (rows < hidden[:, 1:])  # [T, H]
        return covered[:, :, None].expand(-1, -1, WIDTH).clone()
