"""The `gingham bench` command."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from gingham.bench import OPERATORS
from gingham.bench.definition import CannotRun, Case, Level, Operator, load_operator
from gingham.bench.machine import describe, load_warning, measure_yardstick
from gingham.bench.measure import LAYOUTS, Budget, Expectations, Setting, measure_row
from gingham.bench.memory import measure_memory
from gingham.bench.plot import draw_ratios
from gingham.bench.results import Report, from_json, to_json
from gingham.bench.table import markdown, split_at_markers, summary, text, write_between_markers
from gingham.errors import GinghamError

BUDGETS = {
    Level.QUICK: Budget(seconds=1.0, rounds=15, longest_call=1.0),
    Level.DEFAULT: Budget(seconds=3.0, rounds=50, longest_call=5.0),
    Level.FULL: Budget(seconds=6.0, rounds=100, longest_call=30.0),
}
_QUICK_SECONDS = 80.0  # for all operators together, so that a quick run ends within two minutes
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gingham bench",
        description="Time Gingham's operators against what you would use instead, on this machine.",
    )
    parser.add_argument("operators", nargs="*", metavar="operator", help=f"which ones (default: all of {OPERATORS})")
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--quick", action="store_true", help="one paper size and a tiny one of each, in two minutes")
    level.add_argument("--full", action="store_true", help="every size, layout and thread count; takes hours")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype", default="float32,bfloat16", help=f"some of {','.join(_DTYPES)} (default: %(default)s)"
    )
    parser.add_argument("--threads", help="thread counts, such as 1,2 (default: 1 and all; 1 with --quick)")
    parser.add_argument("--layout", help=f"some of {','.join(LAYOUTS)} (default: both; the first with --quick)")
    parser.add_argument(
        "--seconds",
        type=float,
        help="begin no new row later than this, each operator having its share, and one row (default: 80 with --quick)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured, samples included")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios (PNG, SVG or PDF)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the tables between the page's bench markers")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="put one table of all there, in the same way")
    parser.add_argument(
        "--from", type=Path, nargs="+", metavar="FILE", dest="files", help="take what --json wrote instead of measuring"
    )
    parser.add_argument("--list", action="store_true", help="print the operators and stop")
    return parser


def _words(option: str, given: str, known: Sequence[str]) -> list[str]:
    words = [word.strip() for word in given.split(",")]
    for word in words:
        if word not in known:
            raise GinghamError(f"{option}: expected some of {', '.join(known)}; got {word!r}")
    return words


def _thread_counts(given: str | None, level: Level, device: torch.device) -> list[int]:
    if given is None:
        return [1] if level is Level.QUICK or device.type == "cuda" else sorted({1, torch.get_num_threads()})
    try:
        counts = [int(word) for word in given.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1 or max(counts) > 4 * (os.cpu_count() or 1):
        raise GinghamError(
            f"--threads: expected counts from 1 to {4 * (os.cpu_count() or 1)}, such as 1,2; got {given!r}"
        )
    return counts


def plan(
    operator: Operator,
    level: Level,
    device: torch.device,
    dtypes: Sequence[str],
    layouts: Sequence[str],
    threads: Sequence[int],
) -> Iterator[tuple[Case, Setting]]:
    """The rows of a run: headline cases (with FULL, all) in every setting, others in the first layout and count."""
    for case in operator.cases:
        if case.level > level:
            continue
        everything = case.headline or level is Level.FULL
        for count in threads if everything else threads[:1]:
            for layout in layouts if everything else layouts[:1]:
                for dtype in dtypes:
                    for direction in case.passes:
                        yield case, Setting(getattr(torch, dtype), layout, count, direction, device)


def measure_operator(
    operator: Operator,
    rows: Sequence[tuple[Case, Setting]],
    level: Level,
    budget: Budget,
    *,
    seconds: float | None = None,
) -> Report:
    """Measure the rows of a plan; with `seconds`, begin none but the first after that time and say how many miss it."""
    device = rows[0][1].device
    report = Report(
        operator=operator.name,
        inputs=operator.inputs,
        machine=describe(device),
        seed=secrets.randbelow(2**31),
        peers=tuple(peer.name for peer in operator.peers),
        limit=operator.limit,
    )
    expectations = Expectations(operator, report.seed)
    began = time.monotonic()
    for number, (case, setting) in enumerate(rows):
        if seconds is not None and number > 0 and time.monotonic() - began > seconds:
            left_out = len(rows) - number
            were = "row was" if left_out == 1 else "rows were"
            report.notes.append(f"{left_out} {were} left out, the time for new ones being over")
            break
        how = f"{setting.dtype_name}, {setting.layout}, threads={setting.threads}, {setting.direction.value}"
        _progress(f"{operator.name} {number + 1}/{len(rows)}: {case.label}, {how}")
        before = torch.get_num_threads()
        torch.set_num_threads(setting.threads)
        try:
            key = (setting.dtype_name, setting.threads)
            if key not in {(stick.dtype, stick.threads) for stick in report.yardsticks}:
                report.yardsticks.append(measure_yardstick(setting.dtype, setting.threads, device))
            yardstick = next(stick for stick in report.yardsticks if (stick.dtype, stick.threads) == key)
            report.rows.append(measure_row(operator, case, setting, budget, yardstick, expectations))
        finally:
            torch.set_num_threads(before)
    for case, setting in rows:
        if not case.measure_memory or setting.direction is not case.passes[0] or setting.threads != rows[0][1].threads:
            continue
        if level is Level.QUICK and report.memory:
            break
        _progress(f"{operator.name}: memory of {case.label}, {setting.dtype_name}, {setting.layout}")
        try:
            report.memory += measure_memory(operator, case, setting, level)
        except CannotRun as reason:
            report.notes.append(str(reason))
            break
    _progress("")
    return report


def _progress(message: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)


def _run(options: argparse.Namespace) -> None:
    if options.list:
        print("\n".join(OPERATORS))
        return
    level = Level.QUICK if options.quick else Level.FULL if options.full else Level.DEFAULT
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise GinghamError("--device cuda: torch finds no CUDA device here; leave the option out to measure on the CPU")
    dtypes = _words("--dtype", options.dtype, _DTYPES)
    known = tuple(LAYOUTS)
    layouts = (
        _words("--layout", options.layout, known) if options.layout else known[: 1 if level is Level.QUICK else None]
    )
    threads = _thread_counts(options.threads, level, device)
    for name in options.operators:
        if name not in OPERATORS:
            raise GinghamError(f"operator: expected some of {', '.join(OPERATORS)}; got {name!r}")
    for page in (options.markdown, options.summary):
        if page:
            split_at_markers(page)  # an unfit page is reported before the measuring, not after
    for option, file in (("--json", options.json), ("--plot", options.plot)):
        _require_writable(option, file)
    if options.files:
        if options.operators:
            raise GinghamError("operator: none can be chosen from what --from reads; leave them out")
        _write([report for path in options.files for report in _read(path)], options)
        return

    reports = []
    names = options.operators or OPERATORS
    total = _QUICK_SECONDS if options.seconds is None and level is Level.QUICK else options.seconds
    warning = load_warning()  # before the first operator: later on the load is our own
    began = time.monotonic()
    for number, name in enumerate(names):
        operator = load_operator(name)
        rows = list(plan(operator, level, device, dtypes, list(layouts), threads))
        # What one operator leaves of its share is the others'.
        seconds = None if total is None else (total - (time.monotonic() - began)) / (len(names) - number)
        reports.append(measure_operator(operator, rows, level, BUDGETS[level], seconds=seconds))
        if warning is not None:
            reports[-1].notes.insert(0, warning)
        print(text(reports[-1]), flush=True)
    _write(reports, options)


def _require_writable(option: str, file: Path | None) -> None:
    if file is None:
        return
    if file.is_dir() or not file.parent.is_dir():
        raise GinghamError(
            f"{option} {file}: {'is a folder' if file.is_dir() else f'there is no folder {file.parent}'}"
        )
    if option == "--plot" and file.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise GinghamError(f"--plot {file}: expected a file that ends in .png, .svg or .pdf")


def _read(path: Path) -> list[Report]:
    try:
        reports = json.loads(path.read_text())
        if not isinstance(reports, list):
            raise TypeError("a list was expected")
        return [from_json(data) for data in reports]
    except OSError as error:
        raise GinghamError(f"--from: cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GinghamError(f"--from: {path} is not what gingham bench --json writes ({error!r})") from error


def _write(reports: list[Report], options: argparse.Namespace) -> None:
    if options.json:
        options.json.write_text(json.dumps([to_json(report) for report in reports], indent=1) + "\n")
    if options.markdown:
        write_between_markers(options.markdown, "\n\n".join(markdown(report) for report in reports))
    if options.summary:
        write_between_markers(options.summary, summary(reports))
    if options.plot:
        draw_ratios(reports, options.plot)


def run(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, measure, print and write. Raises GinghamError or OSError, which `gingham` prints."""
    _run(_parser().parse_args(arguments))
    return 0
