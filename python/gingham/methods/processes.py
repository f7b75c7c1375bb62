"""How the processes of a training come to the same: found once for all, and networks with the same statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import lightning
import torch.distributed as dist
from torch import nn

T = TypeVar("T")


def several_processes() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def share_buffers(network: nn.Module) -> None:
    """Give a network the buffers of the first process, which are those that a checkpoint holds.

    After a training step the batch norms of every process have seen different images. Every process has to come here.
    """
    if several_processes():
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)


def in_first(trainer: lightning.Trainer, make: Callable[[], T]) -> T:
    """What the first process makes, in all of them; where that fails, all of them fail."""
    outcome: Any = None
    if trainer.is_global_zero:
        try:
            outcome = make()
        except Exception as error:  # of whatever kind, the others wait for it
            outcome = error
    outcome = trainer.strategy.broadcast(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    made: T = outcome
    return made
