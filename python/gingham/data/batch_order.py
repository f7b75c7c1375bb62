"""Batches in an order that follows from (seed, epoch), begun wherever a training was interrupted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TypeVar

from torch.utils.data import Sampler

#: (epoch, index), or (epoch, index, copy) where an item comes several times in an epoch.
Position = tuple[int, ...]

P = TypeVar("P", bound=Position)


def mixed_seed(seed: int, number: int) -> int:
    """A seed that follows from another and a number, such as that of an epoch.

    Example:
        >>> mixed_seed(0, 3), mixed_seed(1, 3)
        (3, 1000006)
    """
    return (seed * 1_000_003 + number) % 2**63  # what torch.manual_seed takes


class OrderedBatches(Sampler[list[P]], ABC):
    """Batches that are the same whenever an epoch is drawn; every epoch has equally many.

    One pass gives as many batches as an epoch has, beginning after those that were trained: after the seventh batch of
    an epoch of ten it gives three of that epoch and seven of the next.

    Args:
        trained: gives the number of batches trained so far in all epochs, asked for when a pass begins.
    """

    def __init__(self, trained: Callable[[], int] = lambda: 0) -> None:
        self.trained = trained

    @abstractmethod
    def __len__(self) -> int:
        """Batches of an epoch."""

    @abstractmethod
    def batches(self, epoch: int) -> list[list[P]]:
        """This process's share of each batch of an epoch."""

    def __iter__(self) -> Iterator[list[P]]:
        first = self.trained()
        drawn: list[list[P]] = []
        for number in range(first, first + len(self)):
            epoch, batch = divmod(number, len(self))
            if batch == 0 or not drawn:
                drawn = self.batches(epoch)
            yield drawn[batch]
