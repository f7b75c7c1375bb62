"""What the values of a label file mean: the classes, their colours, and the way from file values to class indices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from gingham.errors import DataError

#: The class index of pixels that neither the loss nor the metrics look at.
IGNORE_INDEX = 255

_NOT_A_LABEL = -1

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class LabelSpace:
    """The classes of a data set and the values that stand for them in its label files.

    Args:
        names: one name for each class; a class index is a position in it.
        palette: one RGB colour, 0 to 255, for each class.
        values: the value in a label file, 0 to 254, that stands for each class; by default the class index itself.
        ignored: further file values that become `IGNORE_INDEX`; 255 always does.
        mirror_pairs: pairs of class indices that change places when a picture is mirrored, such as left and right arm.

    Raises:
        ValueError: the lengths differ, a file value is used twice or lies outside 0 to 255, or a class is in two pairs.

    Example:
        >>> space = LabelSpace(("cat", "dog"), ((200, 0, 0), (0, 0, 200)), values=(7, 9), ignored=(0,))
        >>> space.decode(np.array([[0, 7, 9]], np.uint8), "example.png")
        tensor([[255,   0,   1]])
    """

    names: tuple[str, ...]
    palette: tuple[Colour, ...]
    values: tuple[int, ...] = ()
    ignored: tuple[int, ...] = ()
    mirror_pairs: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.values:
            object.__setattr__(self, "values", tuple(range(len(self.names))))
        if not len(self.names) == len(self.palette) == len(self.values):
            raise ValueError(
                f"names, palette and values must have one entry for each class, "
                f"got {len(self.names)}, {len(self.palette)} and {len(self.values)}"
            )
        known = [*self.values, *self.ignored]
        if len(set(known)) != len(known) or not all(0 <= value <= 255 for value in known) or 255 in self.values:
            raise ValueError(
                f"file values must be distinct, 0 to 254 for a class and 0 to 255 when ignored, got {known}"
            )
        paired = [index for pair in self.mirror_pairs for index in pair]
        if len(set(paired)) != len(paired) or not all(0 <= index < self.num_classes for index in paired):
            raise ValueError(f"mirror_pairs must hold different class indices, got {self.mirror_pairs}")

    @property
    def num_classes(self) -> int:
        return len(self.names)

    @cached_property
    def _class_of_value(self) -> NDArray[np.int64]:
        table = np.full(256, _NOT_A_LABEL, np.int64)
        table[list(self.values)] = np.arange(self.num_classes)
        table[[*self.ignored, IGNORE_INDEX]] = IGNORE_INDEX
        return table

    @cached_property
    def _value_of_class(self) -> NDArray[np.uint8]:
        table = np.full(256, IGNORE_INDEX, np.uint8)
        table[: self.num_classes] = self.values
        return table

    def decode(self, values: NDArray[np.uint8], source: str | Path) -> torch.Tensor:
        """Turn the values of a label file [H, W] into class indices [H, W], int64, ignored pixels 255.

        Args:
            values: the file's values.
            source: the file's name, for the error text.

        Raises:
            DataError: the file holds a value that no class and no ignored value stands for.
        """
        label = self._class_of_value[values]
        if (label == _NOT_A_LABEL).any():
            wrong = np.unique(values[label == _NOT_A_LABEL])
            noun = "label value" if len(wrong) == 1 else "label values"
            known = sorted({*self.values, *self.ignored, IGNORE_INDEX})
            raise DataError(f"{source}: {noun} {_ranges(wrong)} outside the label space, expected {_ranges(known)}")
        return torch.from_numpy(label)

    def encode(self, label: torch.Tensor) -> NDArray[np.uint8]:
        """Turn class indices [H, W] into the values of a label file [H, W], uint8: the way back from `decode`."""
        values: NDArray[np.uint8] = self._value_of_class[label.numpy()]
        return values


def mirror_labels(label: torch.Tensor, mirror_pairs: Iterable[tuple[int, int]]) -> torch.Tensor:
    """Exchange the classes of each pair, as a mirrored picture needs it; the pixels stay where they are.

    Args:
        label: class indices of any shape; it is not changed.
        mirror_pairs: of the `LabelSpace`.

    Example:
        >>> mirror_labels(torch.tensor([14, 15, 5, 255]), ((14, 15),))
        tensor([ 15,  14,   5, 255])
    """
    result = label.clone()
    for left, right in mirror_pairs:
        result[label == left] = right
        result[label == right] = left
    return result


def _ranges(values: Iterable[int]) -> str:
    """Write sorted numbers compactly: 0, 1, 2, 5 as "0-2, 5"."""
    runs: list[list[int]] = []
    for value in values:
        if runs and int(value) == runs[-1][1] + 1:
            runs[-1][1] = int(value)
        else:
            runs.append([int(value), int(value)])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def bit_interleaved_palette(count: int) -> tuple[Colour, ...]:
    """The colours of the VOC development kit: the bits of the class index dealt out to red, green and blue.

    Example:
        >>> bit_interleaved_palette(4)
        ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    """
    palette = []
    for index in range(count):
        colour = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                colour[channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
        palette.append((colour[0], colour[1], colour[2]))
    return tuple(palette)
