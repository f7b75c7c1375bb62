"""The garments and photographs that come with the package, by split."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: The splits of the world in the order of their numbers, the first half of every sample's seed.
SPLITS = ("train", "val", "test")

#: Of the 300 training garments of a category, those from here on are kept for validation.
FIRST_VALIDATION_GARMENT = 240


@dataclass(frozen=True)
class Wardrobe:
    """The garments and backgrounds of one split; the arrays are read-only.

    `garments` [10, N, 28, 28] uint8 holds grey values by Fashion-MNIST category, `masks` [10, N, 28, 28] bool what of
    an image is garment, `photographs` [P, 192, 256, 3] uint8 the backgrounds.
    """

    garments: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    photographs: NDArray[np.uint8]


@cache
def _asset() -> dict[str, NDArray[Any]]:
    with (
        as_file(files("gingham.data") / "assets" / "wardrobe.npz") as path,
        np.load(path, allow_pickle=False) as archive,
    ):
        arrays = {name: archive[name] for name in archive.files}
    for split in ("train", "test"):
        packed = arrays[f"{split}_masks"]
        shape = arrays[f"{split}_garments"].shape
        arrays[f"{split}_masks"] = np.unpackbits(packed, axis=-1).reshape(shape).astype(bool)
    for array in arrays.values():
        array.setflags(write=False)
    return arrays


def load_wardrobe(split: str) -> Wardrobe:
    """The garments and backgrounds of a split.

    Training and validation share the photographs and split the garments of Fashion-MNIST's training file (240 and 60 of
    every category); the test split has 100 garments of every category from the test file and photographs of its own.

    Args:
        split: "train", "val" or "test".

    Raises:
        ValueError: another split.

    Example:
        >>> load_wardrobe("val").garments.shape
        (10, 60, 28, 28)
    """
    number = split_number(split)
    arrays = _asset()
    source = "test" if SPLITS[number] == "test" else "train"
    part = {
        "train": slice(None, FIRST_VALIDATION_GARMENT),
        "val": slice(FIRST_VALIDATION_GARMENT, None),
        "test": slice(None),
    }[split]
    return Wardrobe(
        garments=arrays[f"{source}_garments"][:, part],
        masks=arrays[f"{source}_masks"][:, part],
        photographs=arrays[f"{source}_photographs"],
    )


def notices() -> str:
    """The licence notices of the garments and photographs."""
    return bytes(_asset()["notices"]).decode()


def split_number(split: str) -> int:
    """The number of a split in the seeds.

    Raises:
        ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return SPLITS.index(split)


def sample_generator(split: str, index: int) -> np.random.Generator:
    """The random generator of a sample, which depends on its split and index alone, never on what was made before."""
    return np.random.default_rng([split_number(split), index])
