"""The table of ``gingham demo --all``: what each method gains over its baseline."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gingham.cli.demos import Comparison, Demo, Score

_COLUMNS = (
    "demo",
    "score",
    "baseline",
    "its result",
    "arm",
    "its result",
    "paired difference",
    "95 % interval",
    "claim",
    "upper bound",
    "training, min",
)


@dataclass(frozen=True)
class Headline:
    """What a demo's first comparison came to, of those whose arms were trained.

    Args:
        comparison: of an arm with its baseline.
        score: that they are compared in.
        difference: by seed, their mean, median and 95 % interval.
        baseline: mean score of the baseline over seeds.
        result: mean score of the arm.
        bounds: mean scores of the arms that see more than the method may.
        seconds: of training, all arms and seeds together.
    """

    comparison: Comparison
    score: Score
    difference: Mapping[str, Any]
    baseline: float
    result: float
    bounds: Mapping[str, float]
    seconds: float

    @property
    def shown(self) -> bool | None:
        """Whether the claim is; None without a claim, or with one seed."""
        return self.comparison.shown_by(self.difference, falls=self.score.lower_is_better)

    def record(self) -> dict[str, Any]:
        """All of it for a JSON file."""
        return {
            "score": self.score.title,
            "baseline": self.comparison.baseline_score or self.comparison.baseline,
            "baseline_result": self.baseline,
            "arm": self.comparison.arm,
            "result": self.result,
            "difference_in_percent": self.comparison.relative,
            "difference": self.difference,
            "floor": self.comparison.floor,
            "shown": self.shown,
            "bounds": self.bounds,
            "seconds": self.seconds,
        }

    def cells(self) -> list[str]:
        """What the table says, from the second column on."""
        comparison, score, places = self.comparison, self.score, self.score.decimals
        unit = " %" if comparison.relative else ""
        change = 1 if comparison.relative else places
        interval = self.difference["interval_95"]
        claim = "-" if comparison.floor is None else comparison.claim(falls=score.lower_is_better)
        if self.shown is not None:
            claim += ": shown" if self.shown else ": NOT shown"
        return [
            score.title,
            comparison.baseline_score or comparison.baseline,
            f"{self.baseline:.{places}f}",
            comparison.arm,
            f"{self.result:.{places}f}",
            f"{self.difference['mean']:+.{change}f}{unit}",
            " to ".join(f"{x:+.{change}f}" for x in interval) + unit if interval else "-",
            claim,
            ", ".join(f"{bound:.{places}f}" for bound in self.bounds.values()) or "-",
            f"{self.seconds / 60:.1f}",
        ]


def headline(
    demo: Demo, results: Iterable[tuple[str, Mapping[str, float]]], differences: Mapping[str, Mapping[str, Any]]
) -> Headline:
    """The headline of a demo's runs.

    Args:
        demo: that was run.
        results: each run's arm and scores.
        differences: by the name of each comparison whose arms were trained, of which there is one at least.
    """
    by_arm: dict[str, list[Mapping[str, float]]] = {}
    for arm, scores in results:
        by_arm.setdefault(arm, []).append(scores)
    comparison = next(comparison for comparison in demo.comparisons if comparison.name in differences)
    score = demo.score_of(comparison)

    def mean(arm: str, title: str) -> float:
        return statistics.mean(scores[title] for scores in by_arm[arm])

    return Headline(
        comparison,
        score,
        differences[comparison.name],
        baseline=mean(comparison.baseline, comparison.baseline_score or score.title),
        result=mean(comparison.arm, score.title),
        bounds={arm: mean(arm, score.title) for arm in demo.bounds if arm in by_arm},
        seconds=sum(scores["seconds"] for runs in by_arm.values() for scores in runs),
    )


def table(headlines: Mapping[str, Headline]) -> list[str]:
    """Lines of Markdown, a row for each demo, which leads to the results in its folder."""
    rows = [[f"[{name}]({name}/results.md)", *found.cells()] for name, found in headlines.items()]
    return [f"| {' | '.join(row)} |" for row in [_COLUMNS, ["---"] * len(_COLUMNS), *rows]]
