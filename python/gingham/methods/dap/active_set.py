"""Which samples an epoch of Drop-and-Pick visits: the losses that are known, and the set that shrinks by them.

for each epoch e:
    active <- all, or what is left after k samples with the smallest (loss, index) are dropped, or as before
    train on a permutation of active that follows from (seed, e); loss[i] <- the loss that sample i had in it

The losses are those of the training itself: nothing is ever looked at only to be scored. Where a cycle begins, all
samples are visited, so that every loss is fresh when it is ranked.
"""

from __future__ import annotations

import zlib
from dataclasses import asdict
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from gingham.errors import CheckpointError
from gingham.methods.dap.schedule import Schedule

Drop = Literal["easiest", "hardest", "random"]


class ActiveSet:
    """The samples of each epoch, which follow from the losses that were recorded in those before.

    Args:
        schedule: when samples are dropped and picked.
        fraction: rho, the share of a drop, 0 to 1.
        drop: which samples: the "easiest" (smallest loss, the method), the "hardest", or as many that are "random",
            drawn anew for every epoch. The last two are what the method is compared with.
        smoothing: a, the share of a new loss in what is kept, loss <- a new + (1 - a) old, above 0 to 1.
        skip_hardest: share of all samples, those with the largest losses, that is dropped first in every cycle, within
            the same number of samples; 0 to 1. Mislabelled samples are among them.
        class_floor: share of each class's samples that is never dropped, 0 to 1; it needs `labels`.
        labels: the class of every sample, int64 [N], or None.
        seed: of "random".

    Raises:
        ValueError: an option outside its range, or a floor without labels.

    Example:
        >>> losses = torch.tensor([0.9, 0.1, 0.5, 0.3, 0.7, 0.2, 0.8, 0.4])
        >>> chosen = ActiveSet(Schedule(length=8, epochs=4, warmup=0, cycle=4), 0.25)
        >>> for epoch in range(4):
        ...     visited = chosen.indices(epoch)
        ...     unknown = chosen.record(visited, losses[visited])
        ...     print(visited.tolist())
        [0, 1, 2, 3, 4, 5, 6, 7]
        [0, 2, 3, 4, 6, 7]
        [0, 2, 4, 6, 7]
        [0, 2, 4, 6]
    """

    def __init__(
        self,
        schedule: Schedule,
        fraction: float,
        *,
        drop: Drop = "easiest",
        smoothing: float = 1.0,
        skip_hardest: float = 0.0,
        class_floor: float = 0.0,
        labels: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must be 0 to 1, got {fraction}")
        check_options(drop, smoothing, skip_hardest, class_floor)
        if class_floor and (labels is None or len(labels) != schedule.length):
            raise ValueError("class_floor needs the class of every sample")
        self.schedule, self.fraction, self.drop, self.seed = schedule, fraction, drop, seed
        self.smoothing, self.skip_hardest, self.class_floor = smoothing, skip_hardest, class_floor
        self.labels = None if labels is None else labels.to(torch.int64)
        self.losses = torch.full((schedule.length,), torch.inf)  # +inf: not known, and so never dropped
        self.active = torch.ones(schedule.length, dtype=torch.bool)
        self.visited = torch.zeros(schedule.length, dtype=torch.bool)  # in the epoch
        #: The number of samples of every epoch so far, the one that is going on included.
        self.sizes = [schedule.length]
        #: The number of visits that were recorded so far.
        self.visits = 0
        self._skipped = 0  # of the hardest, in the cycle

    @property
    def epoch(self) -> int:
        """The epoch that is going on."""
        return len(self.sizes) - 1

    def count(self, epoch: int) -> int:
        """The number of samples that an epoch visits.

        Args:
            epoch: up to the one after that which is going on, which then begins; after the training N.
        """
        if epoch >= self.schedule.epochs:
            return self.schedule.length
        self._begin(epoch)
        return self.sizes[epoch]

    def indices(self, epoch: int) -> Tensor:
        """The samples that an epoch visits, in ascending order, int64.

        Args:
            epoch: the one that is going on, or the next, which then begins.
        """
        if epoch >= self.schedule.epochs:
            return torch.arange(self.schedule.length)
        self._begin(epoch)
        if epoch != self.epoch:
            raise ValueError(f"epoch must be {self.epoch}, which is going on, or the next, got {epoch}")
        return self.active.nonzero().flatten()

    def record(self, indices: Tensor, losses: Tensor) -> int:
        """Keep the losses of samples that were visited. Of a sample that comes twice in an epoch, the first counts.

        Args:
            indices: int64 [n], each 0 to N - 1, on any device.
            losses: of these samples, floating [n], on any device; their gradients are left alone. What is not finite
                is kept as unknown: such a sample is not dropped.

        Returns:
            How many losses were not finite.

        Raises:
            ValueError: not as many losses as indices, or an index that no sample has.
        """
        if indices.shape != losses.shape or indices.ndim != 1:
            raise ValueError(f"losses must be one for each index, got {list(losses.shape)} for {list(indices.shape)}")
        indices, losses = indices.cpu(), losses.detach().cpu()
        strange = indices[(indices < 0) | (indices >= self.schedule.length)]
        if len(strange):
            raise ValueError(f"indices must be 0 to {self.schedule.length - 1}, got {int(strange[0])}")
        where = torch.from_numpy(np.unique(indices.numpy(), return_index=True)[1])
        indices, losses = indices[where], losses[where].to(torch.float32)
        fresh = ~self.visited[indices]
        indices, losses = indices[fresh], losses[fresh]
        self.visited[indices] = True
        self.visits += len(indices)
        finite = losses.isfinite()
        old = self.losses[indices]
        blended = torch.lerp(torch.where(old.isfinite(), old, losses), losses, self.smoothing)
        self.losses[indices] = torch.where(finite, losses if self.smoothing == 1 else blended, torch.inf)
        return int((~finite).sum())

    # -------------------------------------------------------------------------------------------- between epochs

    def _begin(self, epoch: int) -> None:
        if epoch <= self.epoch:
            return
        if epoch > self.epoch + 1:
            raise ValueError(f"epoch must be at most {self.epoch + 1}, the next, got {epoch}")
        step = self.schedule.step(epoch)
        if step == "all":
            self.active.fill_(True)
            self._skipped = 0
        elif self.drop == "random":
            self._draw(epoch, step == "drop")
        elif step == "drop":
            self._shrink()
        self.visited.fill_(False)
        self.sizes.append(int(self.active.sum()))

    def _draw(self, epoch: int, shrink: bool) -> None:
        size = self.sizes[-1]
        size -= self.schedule.dropped(size, self.fraction) if shrink else 0
        generator = np.random.default_rng([abs(self.seed), epoch])
        self.active.fill_(False)
        self.active[torch.from_numpy(generator.permutation(self.schedule.length)[:size])] = True

    def _shrink(self) -> None:
        candidates = (self.active & self.losses.isfinite()).nonzero().flatten()
        values = self.losses[candidates]
        if self.drop == "hardest":
            values = -values
        ascending = candidates[torch.sort(values, stable=True).indices]  # ties: the lower index first
        count = min(self.schedule.dropped(self.sizes[-1], self.fraction), len(ascending))
        hardest = min(count, int(self.skip_hardest * self.schedule.length + 1e-9) - self._skipped)
        if hardest > 0:
            gone = self._droppable(ascending.flip(0))[:hardest]
            self.active[gone] = False
            self._skipped += len(gone)
            count -= len(gone)
            ascending = ascending[self.active[ascending]]
        self.active[self._droppable(ascending)[:count]] = False

    def _droppable(self, ordered: Tensor) -> Tensor:
        """Those of samples in the order in which they would go whose class has enough others left."""
        if not self.class_floor or self.labels is None:
            return ordered
        classes = int(self.labels.max()) + 1
        floor = torch.ceil(self.class_floor * torch.bincount(self.labels, minlength=classes) - 1e-9).long()
        spare = torch.bincount(self.labels[self.active], minlength=classes) - floor
        labels = self.labels[ordered]
        by_class = torch.sort(labels, stable=True).indices
        counts = torch.bincount(labels, minlength=classes)
        first = torch.cumsum(counts, 0) - counts
        rank = torch.empty_like(labels)
        rank[by_class] = torch.arange(len(labels)) - first[labels[by_class]]
        return ordered[rank < spare[labels]]

    # -------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as plain values and tensors."""
        return {
            "options": self._options(),
            "losses": self.losses.clone(),
            "active": torch.from_numpy(np.packbits(self.active.numpy())),
            "visited": torch.from_numpy(np.packbits(self.visited.numpy())),
            "sizes": list(self.sizes),
            "visits": self.visits,
            "skipped": self._skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            CheckpointError: the state is of another data set, or of other options.
        """
        for name, value in self._options().items():
            if (before := state["options"].get(name)) != value:
                what = "another data set" if name in ("length", "labels") else f"{name} {before}, not {value}"
                detail = f" ({before} samples, not {value})" if name == "length" else ""
                raise CheckpointError(f"the checkpoint is of a drop-and-pick training with {what}{detail}")
        self.losses.copy_(state["losses"])
        for name in ("active", "visited"):
            bits = np.unpackbits(state[name].numpy(), count=self.schedule.length)
            getattr(self, name).copy_(torch.from_numpy(bits).bool())
        self.sizes, self.visits, self._skipped = list(state["sizes"]), state["visits"], state["skipped"]

    def _options(self) -> dict[str, Any]:
        names = ("fraction", "drop", "smoothing", "skip_hardest", "class_floor", "seed")
        fingerprint = None if self.labels is None else zlib.crc32(self.labels.numpy().tobytes())
        return {**asdict(self.schedule), **{name: getattr(self, name) for name in names}, "labels": fingerprint}


def check_options(drop: Drop, smoothing: float, skip_hardest: float, class_floor: float) -> None:
    """Raise a ValueError that names the first of these options of an `ActiveSet` that is outside its range."""
    if drop not in get_args(Drop):
        raise ValueError(f"drop must be one of {', '.join(get_args(Drop))}, got {drop!r}")
    if not 0 < smoothing <= 1:
        raise ValueError(f"smoothing must be above 0 and at most 1, got {smoothing}")
    for name, share in (("skip_hardest", skip_hardest), ("class_floor", class_floor)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be 0 to 1, got {share}")
    if skip_hardest and drop != "easiest":
        raise ValueError(f"skip_hardest must be 0 where drop is {drop!r}, got {skip_hardest}")
    if drop == "random" and (smoothing != 1 or class_floor):
        raise ValueError("smoothing and class_floor do nothing where drop is 'random'; leave them out")
