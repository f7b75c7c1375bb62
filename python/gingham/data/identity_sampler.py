"""Batches of some persons with some items each, which losses that compare items need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gingham.data.batch_order import OrderedBatches, mixed_seed

#: What an epoch is, see `IdentityBatches`.
IdentityEpoch = Literal["persons", "items"]


class IdentityBatches(OrderedBatches[tuple[int, int, int]]):
    """Batches of P different persons with K items each, K by K; each process takes its share of the persons.

    An epoch of "persons" visits every person once, with K items drawn anew. An epoch of "items" divides the items of
    every person into runs of K at random, and visits every run once, but for the few that do not fill a batch of
    different persons. A person who has fewer than K items has one run, drawn with replacement; of others the items that
    do not fill a run are left out, other ones in each epoch.

    Its positions are (epoch, index, copy), so that an item that comes twice is augmented in two ways.

    Args:
        persons: [N], of the items; those of negative numbers are left out.
        persons_per_batch: P in a batch of one process, 1 or more.
        items_per_person: K, 1 or more.
        seed: of the order.
        epoch: what an epoch is, "persons" or "items".
        rank: of this process.
        world_size: number of processes.
        trained: gives the number of batches trained so far in all epochs, asked for when a pass begins.

    Raises:
        ValueError: an argument outside its range.

    Source: "persons" after the sampler of https://github.com/jiyanggao/Video-Person-ReID; "items" does what that of
        https://github.com/KaiyangZhou/deep-person-reid does, with epochs of equal length.

    Example:
        >>> batches = IdentityBatches([0, 0, 0, 1, 1, 2], persons_per_batch=2, items_per_person=2, seed=0)
        >>> [[index for _, index, _ in batch] for batch in batches]
        [[5, 5, 2, 0]]
    """

    def __init__(
        self,
        persons: ArrayLike,
        persons_per_batch: int,
        items_per_person: int,
        seed: int,
        *,
        epoch: IdentityEpoch = "persons",
        rank: int = 0,
        world_size: int = 1,
        trained: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__(trained)
        for name, value in (("persons_per_batch", persons_per_batch), ("items_per_person", items_per_person)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if epoch not in ("persons", "items"):
            raise ValueError(f"epoch must be 'persons' or 'items', got {epoch!r}")
        numbers = np.asarray(persons, np.int64)
        order = np.argsort(numbers, kind="stable")
        starts = np.flatnonzero(np.diff(numbers[order], prepend=numbers.min(initial=0) - 1))
        parts = np.split(order, starts[1:])
        self._items = [part for part in parts if len(part) and numbers[part[0]] >= 0]
        self.persons_per_batch, self.items_per_person = persons_per_batch, items_per_person
        self.seed, self.epoch, self.rank, self.world_size = seed, epoch, rank, world_size
        runs = np.array([max(1, len(part) // items_per_person) for part in self._items], np.int64)
        self._runs = np.ones_like(runs) if epoch == "persons" else runs
        self._length = _most_batches(self._runs, persons_per_batch * world_size)

    def __len__(self) -> int:
        return self._length

    def batches(self, epoch: int) -> list[list[tuple[int, int, int]]]:
        rng = np.random.default_rng(mixed_seed(self.seed, epoch))
        group = self.persons_per_batch * self.world_size
        share = np.s_[self.rank * self.persons_per_batch : (self.rank + 1) * self.persons_per_batch]
        runs = [self._divide(rng, items) for items in self._items]
        left = _exact(rng, np.minimum(self._runs, self._length), group * self._length)
        found = []
        for number in range(self._length, 0, -1):
            chosen = _choose(rng, left, group, number)
            left[chosen] -= 1
            found.append([(epoch, *place) for person in chosen[share] for place in runs[person][left[person]]])
        return found

    def _divide(self, rng: np.random.Generator, items: NDArray[np.int64]) -> list[list[tuple[int, int]]]:
        """The items of a person in runs of K, each with the number of its copy."""
        count = self.items_per_person
        if len(items) < count:
            copies: dict[int, int] = {}
            run = []
            for item in rng.choice(items, count).tolist():
                copies[item] = copies.get(item, -1) + 1
                run.append((item, copies[item]))
            return [run]
        shuffled = rng.permutation(items).tolist()
        return [[(item, 0) for item in shuffled[at : at + count]] for at in range(0, len(items) - count + 1, count)]


def _most_batches(runs: NDArray[np.int64], group: int) -> int:
    """How many batches of so many different persons the runs make: the largest L with sum(min(runs, L)) >= group L."""
    length = 0
    while np.minimum(runs, length + 1).sum() >= group * (length + 1):
        length += 1
    return length


def _exact(rng: np.random.Generator, runs: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """The runs of each person, without some at random, so that so many are left."""
    drawn = rng.permutation(np.repeat(np.arange(len(runs)), runs))[:total]
    return np.bincount(drawn, minlength=len(runs))


def _choose(rng: np.random.Generator, left: NDArray[np.int64], group: int, number: int) -> NDArray[np.intp]:
    """Different persons for the first of `number` batches, such that the runs that are left fill the others.

    Who has a run for each batch has to be in it; of the others, who has more runs is likelier to be.
    """
    keys = rng.exponential(size=len(left)) / np.maximum(left, 1)
    keys[left == 0] = np.inf
    keys[left == number] = -1
    chosen = np.argsort(keys, kind="stable")[:group]
    return rng.permutation(chosen)
