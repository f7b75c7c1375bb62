"""What was measured, and the ratios that follow from it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from gingham.bench.definition import OURS

SCHEMA = "gingham-bench/1"


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one number a round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


@dataclass(frozen=True)
class Yardstick:
    """What the machine can do, per second: operations of a large matrix product, bytes read and written by a copy."""

    dtype: str
    threads: int
    matmul: float
    copy: float


@dataclass(frozen=True)
class Row:
    """One case in one setting.

    Attributes:
        direction: what a call did, the value of a `Pass`.
        operations, moved: least floating-point operations and least bytes of a call.
        timings: by peer, of those that ran.
        errors: by peer, the largest deviation from the float64 reference over outputs and gradients, in units of the
            largest value of each.
        failures: by peer, why it did not run.
        other: peers that compute another operator, which the best peer is not chosen from.
    """

    case: str
    dtype: str
    layout: str
    threads: int
    direction: str
    operations: float
    moved: float
    timings: Mapping[str, Timing] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    other: tuple[str, ...] = ()

    def ratio(self, peer: str) -> float | None:
        """How many times as long as Gingham's operator the peer takes."""
        if OURS not in self.timings or peer not in self.timings:
            return None
        return self.timings[peer].median / self.timings[OURS].median

    @property
    def best_peer(self) -> str | None:
        """The fastest peer with the same result."""
        peers = [name for name in self.timings if name != OURS and name not in self.other]
        return min(peers, key=lambda name: self.timings[name].median, default=None)

    @property
    def ratio_to_best(self) -> float | None:
        return None if self.best_peer is None else self.ratio(self.best_peer)

    def fraction_of(self, limit: str, yardstick: Yardstick) -> float | None:
        """The rate of Gingham's operator as a fraction of the matrix product's ("matmul") or the copy's ("copy")."""
        if OURS not in self.timings:
            return None
        amount, rate = (self.operations, yardstick.matmul) if limit == "matmul" else (self.moved, yardstick.copy)
        return amount / self.timings[OURS].median / rate

    def floor(self, yardstick: Yardstick) -> float:
        """Seconds below which the call cannot come: its operations or its bytes at the machine's measured rates."""
        return max(self.operations / yardstick.matmul, self.moved / yardstick.copy)


@dataclass(frozen=True)
class Memory:
    """Peak of the memory beyond inputs, outputs and gradients of one call, in bytes, by peer."""

    case: str
    dtype: str
    layout: str
    threads: int
    direction: str
    extra: Mapping[str, int]
    baseline: str

    def share(self, peer: str = OURS) -> float | None:
        """The peer's extra memory as a share of the baseline's."""
        if peer not in self.extra or not self.extra.get(self.baseline):
            return None
        return self.extra[peer] / self.extra[self.baseline]


@dataclass
class Report:
    """Everything measured for one operator in one run."""

    operator: str
    inputs: str
    machine: Mapping[str, str]
    seed: int
    peers: tuple[str, ...]
    limit: str = "matmul"
    yardsticks: list[Yardstick] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def yardstick(self, row: Row) -> Yardstick | None:
        """The yardstick measured with the row's dtype and threads."""
        same = (stick for stick in self.yardsticks if (stick.dtype, stick.threads) == (row.dtype, row.threads))
        return next(same, None)

    def failures(self) -> list[tuple[str, str, int]]:
        """Every reason why a peer did not run: (peer, reason, number of rows)."""
        counts: dict[tuple[str, str], int] = {}
        for row in self.rows:
            for peer, reason in row.failures.items():
                counts[peer, reason] = counts.get((peer, reason), 0) + 1
        return [(peer, reason, count) for (peer, reason), count in counts.items()]


def from_json(data: Mapping[str, Any]) -> Report:
    """The inverse of `to_json`.

    Raises:
        KeyError, TypeError: the data is not what `to_json` gives.
    """

    def of(kind: Any, plain: Mapping[str, Any]) -> Any:
        return kind(**{f.name: plain[f.name] for f in fields(kind) if f.name in plain})

    rows = []
    for plain in data["rows"]:
        timings = {peer: Timing(tuple(timing["samples"])) for peer, timing in plain["timings"].items()}
        rows.append(of(Row, {**plain, "timings": timings, "other": tuple(plain["other"])}))
    parts = {
        "rows": rows,
        "peers": tuple(data["peers"]),
        "yardsticks": [of(Yardstick, plain) for plain in data["yardsticks"]],
        "memory": [of(Memory, plain) for plain in data["memory"]],
    }
    report: Report = of(Report, {**data, **parts})
    return report


def to_json(report: Report) -> dict[str, Any]:
    """The report as plain data, with the ratios beside the samples they come from."""
    data: dict[str, Any] = {"schema": SCHEMA, **asdict(report)}
    for row, plain in zip(report.rows, data["rows"], strict=True):
        plain["timings"] = {
            peer: {"median": timing.median, "samples": list(timing.samples)} for peer, timing in row.timings.items()
        }
        plain["ratios"] = {peer: row.ratio(peer) for peer in row.timings if peer != OURS}
        plain["best_peer"], plain["ratio_to_best"] = row.best_peer, row.ratio_to_best
        yardstick = report.yardstick(row)
        for limit in ("matmul", "copy"):
            plain[f"fraction_of_{limit}"] = row.fraction_of(limit, yardstick) if yardstick else None
        plain["floor"] = row.floor(yardstick) if yardstick else None
    for memory, plain in zip(report.memory, data["memory"], strict=True):
        plain["share"] = memory.share()
    return data
