"""When the cycles of self-correction begin and end, and the learning rate in them.

Paper: Li et al., Self-Correction for Human Parsing, https://arxiv.org/abs/1910.09777, with the numbers of the
official code.
"""

import math


def cyclical_rate(
    epoch: int,
    *,
    peak: float = 7e-3,
    low: float = 7e-5,
    warmup: int = 10,
    start: int = 100,
    cycle: int = 10,
    cycle_peak: float = 3.5e-3,
) -> float:
    """The learning rate of an epoch: a linear rise, a cosine descent, then a shorter one for every cycle.

    Args:
        epoch: 0 for the first.
        peak: the learning rate after the rise.
        low: what the rise begins with and every descent heads for; the last epoch of a descent does not reach it.
        warmup: epochs of the rise, 0 to `start`.
        start: epochs before the first cycle, 1 or more.
        cycle: epochs of a cycle, 1 or more.
        cycle_peak: the learning rate at the beginning of a cycle.

    Returns:
        The learning rate, in the unit of `peak`.

    Raises:
        ValueError: epochs outside their range.

    Source: the official code.

    Example:
        >>> [round(cyclical_rate(epoch), 6) for epoch in (0, 5, 10, 55, 100, 105, 110)]
        [7e-05, 0.003535, 0.007, 0.003535, 0.0035, 0.001785, 0.0035]
    """
    _check(start, cycle)
    if not 0 <= warmup <= start:
        raise ValueError(f"warmup must be 0 to start {start}, got {warmup}")
    if epoch < warmup:
        return low + epoch * (peak - low) / warmup
    if epoch < start:
        return _descent(peak, low, (epoch - warmup) / (start - warmup))
    return _descent(cycle_peak, low, (epoch - start) % cycle / cycle)


def _descent(high: float, low: float, progress: float) -> float:
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * progress))


def cycles_after(epochs: int, *, start: int = 100, cycle: int = 10) -> int:
    """How many snapshots the average holds after so many epochs: one at `start`, and one for every cycle since.

    Args:
        epochs: that are over, 0 or more.
        start: epochs before the first cycle, 1 or more.
        cycle: epochs of a cycle, 1 or more.

    Returns:
        Their number.

    Raises:
        ValueError: `start` or `cycle` below 1.

    Source: the official code.

    Example:
        >>> [cycles_after(epochs) for epochs in (99, 100, 109, 110, 150)]
        [0, 1, 1, 2, 6]
    """
    _check(start, cycle)
    return 0 if epochs < start else (epochs - start) // cycle + 1


def _check(start: int, cycle: int) -> None:
    for name, value in (("start", start), ("cycle", cycle)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
