"""What is measured: an operator, its cases, and the peers it is measured against."""

from __future__ import annotations

import enum
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Function = Callable[..., Tensor]

OURS = "gingham"


class Level(enum.IntEnum):
    """How much is measured; a case belongs to its level and to those above."""

    QUICK = 0
    DEFAULT = 1
    FULL = 2


class Pass(enum.Enum):
    """What one timed call does."""

    FORWARD = "forward"  # no gradient wanted
    RECORDED = "forward, recorded"  # forward of a call whose gradient may be asked for later
    TRAINING = "forward + backward"


class CannotRun(Exception):
    """A peer does not take part; the message is the reason that the report gives."""


@dataclass(frozen=True)
class Case:
    """One input size of an operator.

    Attributes:
        label: how tables name it.
        inputs: draws the input tensors, float32 on the CPU; floating ones are cast to the dtype that is measured.
        keep_dtype: indices of floating inputs that are not made narrower, such as boxes.
        options: what peers need to know beside the tensors.
        operations: least number of floating-point operations (two a multiply-add) of a pass.
        elements: least number of elements that a pass reads and writes.
        level: the smallest level that measures this case.
        headline: measured with every thread count and memory format, not in the first of each only.
        passes: the passes that are measured.
        measure_memory: whether the peak of extra memory is measured too.
        longest_call: seconds that a peer's call may take here, where it is more than the level allows.
    """

    label: str
    inputs: Callable[[torch.Generator], tuple[Tensor, ...]]
    operations: Mapping[Pass, float]
    elements: Mapping[Pass, float]
    options: Mapping[str, Any] = field(default_factory=dict)
    level: Level = Level.DEFAULT
    headline: bool = False
    passes: tuple[Pass, ...] = (Pass.FORWARD, Pass.TRAINING)
    measure_memory: bool = False
    keep_dtype: tuple[int, ...] = ()
    longest_call: float = 0.0


@dataclass(frozen=True)
class Peer:
    """One way to compute the operator.

    Attributes:
        name: the column of the table.
        build: makes the function for a case and a device; raises `CannotRun` (or anything else) if it cannot.
        same_result: False for another operator that serves the same end: timed, but neither compared with the reference
            nor counted when the best peer is chosen.
        operations, memory: estimates for a case and a pass (operations; bytes for 4-byte elements) by which a call that
            would take too long or too much memory is left out.
    """

    name: str
    build: Callable[[Case, torch.device], Function]
    same_result: bool = True
    operations: Callable[[Case, Pass], float] | None = None
    memory: Callable[[Case, Pass], float] | None = None


@dataclass(frozen=True)
class Operator:
    """An operator with its definition, its cases and its peers; the first peer is Gingham's.

    Attributes:
        reference: makes the function that defines the result of a case; it is called in float64.
        differentiable: indices of the inputs whose gradients are taken.
        baseline: the peer whose extra memory is the unit of the memory table.
        limit: what bounds the operator, and is the unit of the table's last column: the rate of a matrix product
            ("matmul"), or of a copy ("copy").
        undecided: share of the results that may differ altogether, for operators that sort: rounding decides the order
            of numbers that are nearly equal.
    """

    name: str
    inputs: str
    cases: tuple[Case, ...]
    peers: tuple[Peer, ...]
    reference: Callable[[Case], Function]
    differentiable: tuple[int, ...]
    baseline: str
    limit: Literal["matmul", "copy"] = "matmul"
    undecided: float = 0.0

    def case(self, label: str) -> Case:
        """The case of this label."""
        return next(case for case in self.cases if case.label == label)

    def peer(self, name: str) -> Peer:
        """The peer of this name."""
        return next(peer for peer in self.peers if peer.name == name)


def load_operator(name: str) -> Operator:
    """The benchmark of an operator by the operator's name."""
    operator: Operator = importlib.import_module(f"gingham.bench.{name}").OPERATOR
    return operator
