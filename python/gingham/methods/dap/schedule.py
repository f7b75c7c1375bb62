"""How many samples each epoch of Drop-and-Pick visits, and which share to drop so that they fit a budget.

Paper: Cheng et al., https://arxiv.org/abs/1811.09347: "Revisiting Pre-training: An Efficient Training Method for Image
Classification" (DaP), in its second version "A Simple Non-i.i.d. Sampling Approach for Efficient Training and Better
Generalization" (DaR).

warm-up epochs: all samples
then cycles of C epochs:
    first epoch: all samples                                                                          pick
    every `interval` epochs after it: without floor(fraction * those that are left)                   drop
last `final` epochs: all samples

That there is a warm-up, that cycles begin with all samples and that they shrink in steps is the paper's. Its numbers,
and what a fraction is of, could not be read: every value here is an option with a default of our own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Basis = Literal["survivors", "original"]
Step = Literal["all", "drop", "keep"]


@dataclass(frozen=True)
class Schedule:
    """When samples are dropped and picked.

    Args:
        length: N, samples of the data set, 1 or more.
        epochs: of the whole training, 1 or more.
        warmup: epochs with all samples before the first cycle, 0 or more.
        cycle: epochs in a cycle, 1 or more. One that outlasts the training drops and never picks.
        interval: epochs between two drops in a cycle, 1 or more.
        basis: what a fraction is of: the "survivors" of the drops before, or the "original" data set.
        final: last epochs with all samples, 0 or more.
        min_active: samples that are always left, 1 or more.

    Raises:
        ValueError: a number outside its range.

    Example:
        >>> schedule = Schedule(length=8, epochs=8, warmup=0, cycle=4)
        >>> schedule.sizes(0.25), schedule.ratio(0.25)
        ([8, 6, 5, 4, 8, 6, 5, 4], 0.71875)
    """

    length: int
    epochs: int
    warmup: int = 10
    cycle: int = 5
    interval: int = 1
    basis: Basis = "survivors"
    final: int = 0
    min_active: int = 1

    def __post_init__(self) -> None:
        for name, least in (("length", 1), ("epochs", 1), ("warmup", 0), ("cycle", 1), ("interval", 1), ("final", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}")
        if self.min_active < 1:
            raise ValueError(f"min_active must be 1 or more, got {self.min_active}")
        if self.basis not in ("survivors", "original"):
            raise ValueError(f"basis must be 'survivors' or 'original', got {self.basis!r}")

    def step(self, epoch: int) -> Step:
        """What happens before an epoch: it has all samples, some are dropped, or they stay as they are.

        Args:
            epoch: 0 for the first; those after the training have all samples.
        """
        place = (epoch - self.warmup) % self.cycle
        if epoch < self.warmup or epoch >= self.epochs - self.final or place == 0:
            return "all"
        return "drop" if place % self.interval == 0 else "keep"

    def dropped(self, active: int, fraction: float) -> int:
        """How many samples a drop takes away.

        Args:
            active: samples before it.
            fraction: rho, 0 to 1.
        """
        whole = active if self.basis == "survivors" else self.length
        count = math.floor(fraction * whole + 1e-9)  # 0.29 * 100 is a hair below 29
        return max(0, min(count, active - self.min_active))

    def sizes(self, fraction: float) -> list[int]:
        """The number of samples that every epoch visits.

        Args:
            fraction: rho, 0 to 1.
        """
        sizes: list[int] = []
        for epoch in range(self.epochs):
            step = self.step(epoch)
            active = self.length if step == "all" else sizes[-1]
            sizes.append(active - self.dropped(active, fraction) if step == "drop" else active)
        return sizes

    def ratio(self, fraction: float) -> float:
        """B, the visits of the training as a share of those with all samples in every epoch.

        Args:
            fraction: rho, 0 to 1.
        """
        return sum(self.sizes(fraction)) / (self.epochs * self.length)

    def fraction_for(self, budget: float) -> float:
        """The smallest fraction whose training stays within a budget, by bisection on the exact numbers of samples.

        Args:
            budget: B, above 0 to 1. Each visit costs a forward and a backward pass: it is the share of computation.

        Returns:
            rho, 0 to 1.

        Raises:
            ValueError: the epochs with all samples alone exceed the budget.

        Example:
            >>> round(Schedule(length=1_281_167, epochs=90).fraction_for(0.75), 4)
            0.166
        """
        if not 0 < budget <= 1:
            raise ValueError(f"budget must be above 0 and at most 1, got {budget}")
        allowed = math.floor(budget * self.epochs * self.length + 1e-6)
        if sum(self.sizes(0.0)) <= allowed:
            return 0.0
        if sum(self.sizes(1.0)) > allowed:
            raise ValueError(
                f"budget must be at least {self.ratio(1.0):.4f}, which the epochs with all samples and min_active "
                f"take of {self.epochs} epochs, got {budget}"
            )
        low, high = 0.0, 1.0  # the visits never rise with the fraction
        while (middle := (low + high) / 2) not in (low, high):
            if sum(self.sizes(middle)) <= allowed:
                high = middle
            else:
                low = middle
        return high
