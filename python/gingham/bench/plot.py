"""The ratios as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gingham.bench.definition import OURS
from gingham.bench.results import Report
from gingham.errors import GinghamError


def draw_ratios(reports: Sequence[Report], path: Path) -> None:
    """Write a bar chart, one group a row of the table, one bar a peer, on a logarithmic axis.

    Raises:
        GinghamError: matplotlib is missing, nothing was measured, or the file type is unknown.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GinghamError("--plot needs matplotlib: pip install 'gingham[bench]'") from error

    rows = [(report, row) for report in reports for row in report.rows if OURS in row.timings]
    if not rows:
        raise GinghamError("--plot: no row has a time of Gingham's operator to compare with")
    peers = list(dict.fromkeys(peer for _, row in rows for peer in row.timings if peer != OURS))
    figure = Figure(figsize=(9, 1.2 + 0.16 * len(rows) * (len(peers) + 1)), layout="constrained")
    axes = figure.subplots()
    thickness = 0.8 / max(1, len(peers))
    for index, peer in enumerate(peers):
        bars = [(position, row.ratio(peer) or 1.0) for position, (_, row) in enumerate(rows) if peer in row.timings]
        positions = [position + (index - (len(peers) - 1) / 2) * thickness for position, _ in bars]
        ratios = [ratio for _, ratio in bars]
        # Bars start at 1: to the right gingham is faster, to the left the peer.
        drawn = axes.barh(positions, [ratio - 1.0 for ratio in ratios], left=1.0, height=thickness, label=peer)
        axes.bar_label(drawn, [f"{ratio:.3g}" for ratio in ratios], fontsize=6, padding=2)
    labels = [f"{row.case}\n{row.dtype}, {row.layout}, {row.threads} thr., {row.direction}" for _, row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(left=min(0.5, axes.get_xlim()[0]), right=max(2.0, 1.3 * axes.get_xlim()[1]))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("time of the peer / time of gingham")
    axes.set_title(
        ", ".join(dict.fromkeys(f"{r.operator} on {r.machine.get('gpu', r.machine['cpu'])}" for r in reports))
    )
    axes.legend(fontsize=7)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise GinghamError(f"--plot: cannot write {path}: {error}") from error
