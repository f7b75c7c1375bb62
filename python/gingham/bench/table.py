"""The report as text for a terminal and as Markdown for a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gingham.bench.definition import OURS, load_operator
from gingham.bench.results import Report, Row
from gingham.errors import GinghamError

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
_NOTHING = "-"
_LIMITS = {
    "matmul": "of matmul: the rate of its operations as a share of a large matrix product's",
    "copy": "of copy: the rate of the bytes that it must read and write as a share of a large copy's",
}


def seconds_text(seconds: float) -> str:
    """Three digits with the unit that fits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size or unit == "us":
            value = seconds / size
            return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
    raise AssertionError


def bytes_text(size: float) -> str:
    """Megabytes with the digits that matter."""
    return f"{size / 1e6:.{0 if size >= 1e8 else 1 if size >= 1e6 else 2}f} MB"


def ratio_text(ratio: float | None) -> str:
    """A ratio with three digits, or a dash."""
    return _NOTHING if ratio is None else f"{ratio:.{0 if ratio >= 100 else 1 if ratio >= 10 else 2}f}x"


def _cell(row: Row, peer: str) -> str:
    if peer not in row.timings:
        return _NOTHING
    ratio = row.ratio(peer)
    return seconds_text(row.timings[peer].median) if ratio is None else ratio_text(ratio)


def time_table(report: Report) -> list[list[str]]:
    """Header and lines: Gingham's time, then how many times as long each peer takes."""
    # A peer that ran nowhere has no column; the lines under the table say why.
    peers = [peer for peer in report.peers if peer != OURS and any(peer in row.timings for row in report.rows)]
    header = [report.inputs, "dtype", "layout", "threads", "pass", OURS, *peers, "best peer", f"of {report.limit}"]
    lines = [header]
    for row in report.rows:
        yardstick = report.yardstick(row)
        fraction = row.fraction_of(report.limit, yardstick) if yardstick else None
        ours = seconds_text(row.timings[OURS].median) if OURS in row.timings else _NOTHING
        setting = [row.case, row.dtype, row.layout, str(row.threads), row.direction]
        share = _NOTHING if fraction is None else f"{fraction:.0%}"
        lines.append([*setting, ours, *(_cell(row, peer) for peer in peers), ratio_text(row.ratio_to_best), share])
    return lines


def memory_table(report: Report) -> list[list[str]]:
    """Header and lines: extra memory of each peer, and Gingham's as a share of the baseline's."""
    if not report.memory:
        return []
    present = {peer for memory in report.memory for peer in memory.extra}
    peers = [peer for peer in report.peers if peer in present]
    baseline = report.memory[0].baseline
    lines = [[report.inputs, "dtype", "layout", "threads", "pass", *peers, f"{OURS} of {baseline}"]]
    for memory in report.memory:
        share = memory.share()
        sizes = [bytes_text(memory.extra[peer]) if peer in memory.extra else _NOTHING for peer in peers]
        setting = [memory.case, memory.dtype, memory.layout, str(memory.threads), memory.direction]
        lines.append([*setting, *sizes, _NOTHING if share is None else f"{share:.1%}"])
    return lines


def _aligned(lines: Sequence[Sequence[str]], *, words: int) -> list[str]:
    """Columns of equal width: the first `words` of them to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    aligned = [
        "  ".join(
            cell.ljust(w) if i < words else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return [aligned[0].rstrip(), "  ".join("-" * width for width in widths), *(line.rstrip() for line in aligned[1:])]


def _machine_text(report: Report) -> str:
    return ", ".join(f"{name} {value}" for name, value in report.machine.items())


def _yardstick_texts(report: Report) -> list[str]:
    return [
        f"{stick.dtype}, {stick.threads} thread{'s' * (stick.threads > 1)}: "
        f"matrix product {stick.matmul / 1e9:,.0f} GFLOP/s, copy {stick.copy / 1e9:.1f} GB/s"
        for stick in report.yardsticks
    ]


def _explanations(report: Report) -> list[str]:
    texts = [
        f"{OURS}: median time of a call. A peer's column: how many times as long it takes (above 1, {OURS} is faster); "
        f"best peer: the fastest one with the same result; {_LIMITS[report.limit]}.",
    ]
    other = sorted({peer for row in report.rows for peer in row.other})
    if other:
        texts.append(f"{', '.join(other)}: another operator for the same end, timed but not counted as a peer.")
    for peer, reason, count in report.failures():
        texts.append(f"{peer}, {count} of {len(report.rows)} rows: {reason.rstrip('.')}.")
    return texts + [f"{note}." for note in report.notes]


def text(report: Report) -> str:
    """The report for a terminal."""
    parts = [report.operator, _machine_text(report), *_yardstick_texts(report), ""]
    if report.rows:
        parts += [*_aligned(time_table(report), words=3), ""]
    if report.memory:
        parts += ["Peak memory beyond inputs, outputs and gradients", *_aligned(memory_table(report), words=3), ""]
    return "\n".join(parts + _explanations(report))


def _markdown_table(lines: Sequence[Sequence[str]], *, words: int) -> list[str]:
    header, *body = lines
    rule = [":---" if i < words else "---:" for i in range(len(header))]
    return ["| " + " | ".join(line) + " |" for line in (header, rule, *body)]


def markdown(report: Report) -> str:
    """The report for a page: tables, then what they were measured on and with."""
    parts = [f"`{report.operator}` on {_machine_text(report)}.", ""]
    if report.rows:
        parts += [*_markdown_table(time_table(report), words=3), ""]
    if report.memory:
        parts += [
            "Peak memory beyond inputs, outputs and gradients:",
            "",
            *_markdown_table(memory_table(report), words=3),
            "",
        ]
    parts += [f"- {line}" for line in (*_yardstick_texts(report), *_explanations(report))]
    return "\n".join(parts)


def summary(reports: Sequence[Report]) -> str:
    """One table for all operators: their headline cases on one thread in the first memory format."""
    lines = [["operator", "size", "dtype", "pass", OURS, "best peer", "how many times as long", "others"]]
    for report in reports:
        operator = load_operator(report.operator)
        headlines = {case.label for case in operator.cases if case.headline}
        settings = {(row.layout, row.threads) for row in report.rows if row.case in headlines}
        chosen = min(settings, key=lambda setting: (setting[1], setting[0] != "contiguous"), default=None)
        for row in report.rows:
            if row.case not in headlines or (row.layout, row.threads) != chosen or OURS not in row.timings:
                continue
            others = [
                f"{f'({peer})' if peer in row.other else peer} {ratio_text(row.ratio(peer))}"
                for peer in report.peers
                if peer not in (OURS, row.best_peer)
            ]
            lines.append(
                [
                    f"`{report.operator}`",
                    row.case,
                    row.dtype,
                    row.direction,
                    seconds_text(row.timings[OURS].median),
                    row.best_peer or _NOTHING,
                    ratio_text(row.ratio_to_best),
                    "; ".join(others) or _NOTHING,
                ]
            )
    legend = "In brackets: of another result, and no peer. A dash: did not run, or was left out for its time or memory."
    machines = sorted({_machine_text(report) for report in reports})
    return "\n".join([*_markdown_table(lines, words=4), "", legend, *(f"On {machine}." for machine in machines)])


def split_at_markers(path: Path) -> tuple[str, str]:
    """What stands before and after the part of a Markdown file that a benchmark fills.

    Raises:
        GinghamError: the file cannot be read or lacks the markers.
    """
    try:
        page = path.read_text(encoding="utf-8")
    except OSError as error:
        raise GinghamError(f"cannot read {path}: {error.strerror}") from error
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise GinghamError(f"{path} needs one line {BEGIN} and after it one line {END}")
    before, rest = page.split(BEGIN)
    return before, rest.split(END)[1]


def write_between_markers(path: Path, content: str) -> None:
    """Replace what stands between the two marker lines of a Markdown file."""
    before, after = split_at_markers(path)
    path.write_text(f"{before}{BEGIN}\n{content}\n{END}{after}", encoding="utf-8")
