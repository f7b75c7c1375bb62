"""The scores of each class after an evaluation, printed and as a file."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from gingham.methods.dap.recipe import ClassificationScores
from gingham.metrics import BoundaryScores, DetectionScores, FewShotScores, RetrievalScores, SegmentationScores

Row = Mapping[str, str]


def class_table(scores: SegmentationScores, boundary: BoundaryScores | None, names: Sequence[str]) -> list[Row]:
    """One row for each class and one for their mean, in percent; "-" where a class occurs nowhere.

    Args:
        scores: of an evaluation.
        boundary: the boundary IoU of the same evaluation, or None.
        names: of the classes.
    """
    columns = {
        "IoU": [*scores.iou.tolist(), scores.miou.item()],
        "accuracy": [*scores.accuracy.tolist(), scores.mean_accuracy.item()],
    }
    if boundary is not None:
        columns["boundary IoU"] = [*boundary.iou.tolist(), boundary.mean.item()]
    return _rows(columns, names)


def detection_table(scores: DetectionScores, names: Sequence[str]) -> list[Row]:
    """One row for each class of objects and one for their mean, in percent; "-" where there are no objects.

    Args:
        scores: of an evaluation.
        names: of the classes, that of label 1 first.
    """
    columns = {
        "AP": [*scores.class_ap.tolist(), scores.ap.item()],
        "AP50": [*scores.class_ap50.tolist(), scores.ap50.item()],
    }
    return _rows(columns, names)


def retrieval_lines(scores: RetrievalScores) -> list[str]:
    """The scores of a retrieval in percent, a line for the plain ones and one for those after re-ranking.

    Args:
        scores: of an evaluation.
    """
    lines = []
    for kind, one in (("", scores), ("re-ranked: ", scores.reranked)):
        if one is not None:
            ranks = ", ".join(f"rank {rank} {_percent(one.at(rank).item())}" for rank in (1, 5, 10, 20))
            lines.append(
                f"{kind}mAP {_percent(one.mean_ap.item())}, {ranks}, mINP {_percent(one.mean_inp.item())}; "
                f"{int(one.scored)} queries scored, {int(one.skipped)} skipped"
            )
    return lines


def classification_table(scores: ClassificationScores, names: Sequence[str]) -> list[Row]:
    """One row for each class and one for all images, in percent; the latter is no mean over the classes.

    Args:
        scores: of an evaluation.
        names: of the classes.
    """
    values = [*scores.class_accuracy.tolist(), scores.accuracy.item()]
    return [
        {"class": name, "accuracy": _percent(share)} for name, share in zip([*names, "all images"], values, strict=True)
    ]


def few_shot_table(scores: FewShotScores, names: Sequence[str]) -> list[Row]:
    """One row for each novel class, one for their mean and one for FB-IoU, in percent, and the number of episodes.

    Args:
        scores: of an evaluation.
        names: of the classes that were evaluated.
    """
    number = scores.episodes.reshape(-1).tolist()
    ious = [*scores.iou.reshape(-1).tolist(), scores.miou.item(), scores.fb_iou.item()]
    counts = [*number, sum(number), sum(number)]
    return [
        {"class": name, "IoU": _percent(iou), "episodes": str(count)}
        for name, iou, count in zip([*names, "mean", "foreground and background"], ious, counts, strict=True)
    ]


def _rows(columns: Mapping[str, Sequence[float]], names: Sequence[str]) -> list[Row]:
    return [
        {"class": name} | {title: _percent(values[index]) for title, values in columns.items()}
        for index, name in enumerate([*names, "mean"])
    ]


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.2f}"


def print_class_table(rows: Sequence[Row]) -> None:
    """Print the table in columns, names to the left and figures to the right."""
    widths = {title: max(len(title), *(len(row[title]) for row in rows)) for title in rows[0]}
    for row in [{title: title for title in widths}, *rows]:
        aligned = {title: str.ljust if title == "class" else str.rjust for title in widths}
        print("  ".join(aligned[title](row[title], width) for title, width in widths.items()))


def write_class_table(path: Path, rows: Sequence[Row]) -> None:
    """Write the table as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
