"""``gingham demo``: a method, or every one, and its baseline on the embedded world, over paired seeds."""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from gingham.cli.demo_overview import Headline, headline, table
from gingham.cli.demos import DEMOS, Comparison, Demo, Length
from gingham.cli.strict_json import strict_json
from gingham.errors import GinghamError

SHOWN = (
    "Shown: the mean (or the median, where that is claimed) reaches what is claimed, and the 95 % interval is clear of "
    "zero; where a loss is claimed to be small, the interval is clear of that loss."
)
_GALLERIES = "galleries.png"  # what a run of retrieval leaves beside its scores


class DemoError(GinghamError, ValueError):
    """A demo that does not exist, or options that do not fit together."""


class Run(NamedTuple):
    """One arm with one seed."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.arm.lower()).strip("-") + f"_seed{self.seed}"


def main(words: list[str]) -> int:
    """Trains the arms, prints the table, writes results and pictures."""
    parser = argparse.ArgumentParser(
        prog="gingham demo",
        description="Train a method as its configuration for the embedded world says, and its baselines, which differ "
        "in the options of cli/demos.py only. Writes results.md, results.json, predictions.png and a folder per run.",
    )
    parser.add_argument("method", nargs="?", help=f"which method: {', '.join(DEMOS)} (default ccnet)")
    parser.add_argument(
        "--all",
        action="store_true",
        help="every method against its main baseline and upper bounds, each in a folder of --out, and one table",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="fewer arms or epochs: minutes")
    length.add_argument("--smoke", action="store_true", help="only that it runs: seconds")
    parser.add_argument("--seeds", type=int, default=1, help="train every arm with seeds 0 to SEEDS-1 (default 1)")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="which arms of a method to train (default: all)")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one per core)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo"),
        metavar="DIR",
        help="folder of results (default demo); finished runs of the same settings and versions in it are not repeated",
    )
    options = parser.parse_args(words)
    for name in ("seeds", "jobs"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise DemoError(f"--{name} must be 1 or more, got {number}")
    command = shlex.join(["gingham", "demo", *words])
    if not options.all:
        _run(options.method or "ccnet", options, command, options.out)
        return 0
    if options.method or options.arms:
        raise DemoError(f"--all runs every method: leave out {'--arms' if options.arms else options.method}")
    headlines: dict[str, Headline] = {}
    for name, demo in DEMOS.items():
        print(f"{name}: {demo.title}", flush=True)
        results, differences = _run(name, options, command, options.out / name)
        headlines[name] = headline(demo, [(run.arm, scores) for run, scores in results.items()], differences)
        _write_overview(headlines, command, options)
    return 0


def _run(
    method: str, options: argparse.Namespace, command: str, out: Path
) -> tuple[dict[Run, dict[str, float]], dict[str, dict[str, Any]]]:
    """Scores of a method's runs, trained unless they were before, and their differences; results are left in `out`."""
    if method not in DEMOS:
        raise DemoError(f"no demo of {method!r}: there are {', '.join(DEMOS)}")
    demo = DEMOS[method]
    chosen = demo.smoke if options.smoke else demo.quick if options.quick else Length()
    every = demo.headline_arms if options.all else tuple(demo.arms)
    arms = _arms(demo, options.arms or chosen.arms or every)
    try:
        for folder in (options.out, out):
            folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DemoError(f"--out {options.out}: {error.filename} is a file, but a folder is needed there") from error
    runs = {Run(arm, seed): _settings(demo, Run(arm, seed), chosen) for seed in range(options.seeds) for arm in arms}
    results = _train_all(method, runs, out, options.jobs)
    differences = _write_results(demo, command, runs, results, out)
    _pictures(arms, runs, out)
    return results, differences


def _arms(demo: Demo, names: tuple[str, ...]) -> list[str]:
    """The arms of these names, in the demo's order."""
    unknown = [name for name in names if name not in demo.arms]
    if unknown or len(set(names)) < len(names):
        raise DemoError(f"--arms must be different names of {', '.join(demo.arms)}, got {' '.join(names)}")
    return [name for name in demo.arms if name in names]


def _settings(demo: Demo, run: Run, length: Length) -> dict[str, Any]:
    """Recipe, data and trainer of a run: the packaged configuration with the changes of arm, length and seed."""
    import yaml

    from gingham.cli.options import config_file

    config = yaml.safe_load(Path(config_file(demo.config)).read_text())
    changes = {**length.options, **demo.arms[run.arm], "data.init_args.seed": run.seed}
    if length.lengths is not None:
        changes["data.init_args.lengths"] = list(length.lengths)
    for path, value in changes.items():
        *parents, last = path.split(".")
        entry: Any = config
        for parent in parents:
            entry = entry[int(parent) if isinstance(entry, list) else parent]
        entry[last] = value
    return {name: config[name] for name in ("model", "data", "trainer")}


def _versions() -> dict[str, str]:
    """What else the scores depend on: code and torch."""
    from gingham import info

    report = info()
    return {"gingham": report["version"], "commit": report["git commit"], "torch": report["torch"]}


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of `path` once it is complete."""
    part = path.with_name(f".part-{path.name}")
    yield part
    part.replace(path)


def _write(path: Path, text: str) -> None:
    with _whole(path) as part:
        part.write_text(text)


def _train_all(
    method: str, runs: dict[Run, dict[str, Any]], out: Path, jobs: int | None
) -> dict[Run, dict[str, float]]:
    """Scores of every run; those not kept are trained ``jobs`` at a time in processes that share the cores."""
    kept = {run: _kept(out / run.name, settings) for run, settings in runs.items()}
    waiting = {run: settings for run, settings in runs.items() if kept[run] is None}
    trained: dict[Run, dict[str, float]] = {}
    if waiting:
        cores = len(os.sched_getaffinity(0))
        jobs = min(jobs or cores, len(waiting))
        spawn = multiprocessing.get_context("spawn")
        # Only this process heeds Ctrl-C, and ends the others.
        with ProcessPoolExecutor(
            jobs, spawn, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
        ) as pool:
            threads = max(1, cores // jobs)
            started = {
                run: pool.submit(_train, method, run, settings, out, threads) for run, settings in waiting.items()
            }
            try:
                trained = {run: future.result() for run, future in started.items()}
            except BaseException as error:
                # Otherwise the pool would first train all runs that are left.
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.kill()  # Lightning would take a milder signal for a reason to go on
                if isinstance(error, BrokenProcessPool):
                    raise DemoError("a training process was killed: with too little memory, try --jobs 1") from error
                raise
    return {run: scores or trained[run] for run, scores in kept.items()}


def _made_of(settings: dict[str, Any]) -> dict[str, Any]:
    return {"settings": settings, "versions": _versions()}


def _kept(folder: Path, settings: dict[str, Any]) -> dict[str, float] | None:
    """The scores of an earlier run with the same settings and versions, if there was one."""
    file, made_of = folder / "result.json", _made_of(settings)
    if not file.is_file():
        return None
    kept = json.loads(file.read_text())
    return dict(kept["scores"]) if {name: kept.get(name) for name in made_of} == made_of else None


def _train(method: str, run: Run, settings: dict[str, Any], out: Path, threads: int) -> dict[str, float]:
    """Scores on the test split."""
    import lightning
    import torch
    from lightning.pytorch.loggers import CSVLogger

    from gingham.cli.options import instantiate

    demo = DEMOS[method]
    folder = out / run.name
    shutil.rmtree(folder, ignore_errors=True)  # what an unfinished run left, or one of other settings
    for category in (UserWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(threads)
    name = f"{run.arm}, seed {run.seed}"
    print(f"training {name}", flush=True)
    lightning.seed_everything(run.seed, verbose=False)
    parts = instantiate(settings, source=demo.config)
    show = _epoch_lines(name, settings["trainer"]["max_epochs"], demo.scores[0].title, demo.scores[0].metric)
    trainer = lightning.Trainer(
        **{option: value for option, value in settings["trainer"].items() if option != "callbacks"},
        logger=CSVLogger(folder, name="", version="log"),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[*parts.callbacks, show],
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    start = time.perf_counter()
    trainer.fit(parts.model, parts.data)
    seconds = time.perf_counter() - start
    measured = trainer.test(parts.model, datamodule=parts.data, verbose=False)[0]
    scores = {score.title: score.factor * measured[f"test_{score.metric}"] for score in demo.scores}
    scores["seconds"] = seconds
    with _whole(folder / "weights.pt") as part:
        torch.save(parts.model.state_dict(), part)
    galleries = getattr(getattr(parts.model, "scores", {}).get("test"), "galleries", None)
    if galleries is not None:
        from gingham.cli.galleries import gallery_sheet

        with _whole(folder / _GALLERIES) as part:
            gallery_sheet(parts.data.dataset("test"), galleries).save(part)
    _write(folder / "result.json", json.dumps(_made_of(settings) | {"scores": scores}, indent=2))
    return scores


def _epoch_lines(name: str, epochs: int, title: str, metric: str) -> Any:
    """A Lightning callback that prints one line an epoch, which several runs at a time can share a terminal with."""
    from lightning.pytorch.callbacks import LambdaCallback

    start = time.perf_counter()

    def show(trainer: Any, _: Any) -> None:
        value = 100 * trainer.callback_metrics[f"val_{metric}"].item()
        seconds = time.perf_counter() - start
        line = f"{name}: epoch {trainer.current_epoch + 1} of {epochs}, {seconds:.0f} s"
        print(f"{line}, validation {title} {value:.1f}", flush=True)

    return LambdaCallback(on_validation_end=show)


def _write_results(
    demo: Demo,
    command: str,
    runs: dict[Run, dict[str, Any]],
    results: dict[Run, dict[str, float]],
    out: Path,
) -> dict[str, dict[str, Any]]:
    """The differences of each comparison; prints results.md, and writes it and results.json."""
    import torch

    from gingham.bench.machine import describe

    machine = describe(torch.device("cpu"))
    differences = _differences(demo, results)
    course = {run.name: _course(out / run.name / "log" / "metrics.csv", demo.course) for run in runs}
    made_with = {"command": command, "commit": machine.get("commit"), "machine": machine, "differences": differences}
    each = {
        run.name: {"settings": settings, "scores": results[run]}
        | ({demo.course: course[run.name]} if demo.course and course[run.name] else {})
        for run, settings in runs.items()
    }
    _write(out / "results.json", strict_json(made_with | each))
    report = "\n".join(
        [
            *_heading(demo, command, machine, runs),
            "",
            *_table(demo, results),
            "",
            *_comparison_lines(demo, differences),
            *_course_lines(demo, results, course),
        ]
    )
    print(report)
    _write(out / "results.md", report + "\n")
    return differences


def _write_overview(headlines: Mapping[str, Headline], command: str, options: argparse.Namespace) -> None:
    """Prints the table of the demos that are done, and writes it with results.json into the folder of all demos."""
    import torch

    from gingham.bench.machine import describe

    machine = describe(torch.device("cpu"))
    made_with = {"command": command, "commit": machine.get("commit"), "machine": machine, "seeds": options.seeds}
    demos = {name: headline.record() for name, headline in headlines.items()}
    _write(options.out / "results.json", strict_json(made_with | {"demos": demos}))
    done = "" if len(headlines) == len(DEMOS) else f"; so far {len(headlines)} of {len(DEMOS)} demos"
    means = "one seed" if options.seeds == 1 else f"means of {options.seeds} seeds"
    lines = [f"Each method and its baseline on the embedded world, test split, {means}{done}: `{command}`."]
    report = "\n".join([*lines, _made_on(machine), "", *table(headlines), "", SHOWN])
    print(report)
    print(f"results of all: {options.out / 'results.md'} and {options.out / 'results.json'}", flush=True)
    _write(options.out / "results.md", report + "\n")


def _differences(demo: Demo, results: Mapping[Run, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Paired differences of a score for each comparison: by seed, mean, median, 95 % t-interval."""
    from scipy.stats import t

    seeds = sorted({run.seed for run in results})
    arms = {run.arm for run in results}
    found = {}
    for comparison in demo.comparisons:
        if not {comparison.arm, comparison.baseline} <= arms:
            continue
        pairs = [_difference(demo, comparison, results, seed) for seed in seeds]
        mean, interval = statistics.mean(pairs), None
        if len(pairs) > 1:
            half = float(t.ppf(0.975, len(pairs) - 1)) * statistics.stdev(pairs) / len(pairs) ** 0.5
            interval = [mean - half, mean + half]
        found[comparison.name] = {
            "by_seed": pairs,
            "mean": mean,
            "median": statistics.median(pairs),
            "interval_95": interval,
        }
    return found


def _difference(demo: Demo, comparison: Comparison, results: Mapping[Run, Mapping[str, float]], seed: int) -> float:
    title = demo.score_of(comparison).title
    score = results[Run(comparison.arm, seed)][title]
    baseline = results[Run(comparison.baseline, seed)][comparison.baseline_score or title]
    if not comparison.relative:
        return score - baseline
    return 100 * (score - baseline) / baseline if baseline else math.nan


def _heading(demo: Demo, command: str, machine: Mapping[str, str], runs: Mapping[Run, Mapping[str, Any]]) -> list[str]:
    from gingham.cli.options import instantiate

    settings = next(iter(runs.values()))
    data = instantiate(settings, source=demo.config).data
    asked = settings["data"]["init_args"]["lengths"][0]
    length = data.training_length() if hasattr(data, "training_length") else asked  # of data that may have fewer
    return [
        f"{demo.title}, test split; {length} training {demo.unit}, {_epochs(runs)}: `{command}`.",
        _made_on(machine),
    ]


def _epochs(runs: Mapping[Run, Mapping[str, Any]]) -> str:
    """How many epochs most arms train, and which train others."""
    by_arm = {run.arm: int(settings["trainer"]["max_epochs"]) for run, settings in runs.items()}
    usual = statistics.mode(by_arm.values())
    others = [f"{arm}: {epochs}" for arm, epochs in by_arm.items() if epochs != usual]
    return f"{usual} epochs" + (f" ({', '.join(others)})" if others else "")


def _made_on(machine: Mapping[str, str]) -> str:
    on = ("cpu", "cores", "gingham", "commit", "torch", "python")
    return "On " + ", ".join(f"{name} {machine[name]}" for name in on if name in machine) + "."


def _table(demo: Demo, results: Mapping[Run, Mapping[str, float]]) -> list[str]:
    """One row an arm: the first score by seed, its mean and spread, the means of the others."""
    first, *others = demo.scores
    columns = [f"{first.title} by seed", "mean", "spread", *(score.title for score in others), "training, s"]
    lines = [f"| arm | {' | '.join(columns)} |", "| --- " * (1 + len(columns)) + "|"]
    for arm in [name for name in demo.arms if any(run.arm == name for run in results)]:
        measured = [scores for run, scores in results.items() if run.arm == arm]
        values, places = [scores[first.title] for scores in measured], first.decimals
        spread = f"{statistics.stdev(values):.{places}f}" if len(values) > 1 else "-"
        cells = [" ".join(f"{x:.{places}f}" for x in values), f"{statistics.mean(values):.{places}f}", spread]
        for score in others:
            cells.append(f"{statistics.mean(scores[score.title] for scores in measured):.{score.decimals}f}")
        cells.append(f"{statistics.mean(scores['seconds'] for scores in measured):.0f}")
        name = f"{arm} (upper bound)" if arm in demo.bounds else arm
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _comparison_lines(demo: Demo, differences: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for comparison in demo.comparisons:
        if (difference := differences.get(comparison.name)) is None:
            continue
        places = 1 if comparison.relative else demo.score_of(comparison).decimals
        text = f"{comparison.name}: " + " ".join(f"{x:+.{places}f}" for x in difference["by_seed"])
        text += f"; mean {difference['mean']:+.{places}f}, median {difference['median']:+.{places}f}"
        if difference["interval_95"] is not None:
            text += ", 95 % interval " + " to ".join(f"{x:+.{places}f}" for x in difference["interval_95"])
        lines.append(text + _verdict(comparison, difference, falls=demo.score_of(comparison).lower_is_better))
    if any(" claimed: " in line for line in lines):
        lines += ["", SHOWN]
    return lines


def _verdict(comparison: Comparison, difference: Mapping[str, Any], *, falls: bool) -> str:
    """Whether a claim is shown, in words."""
    shown = comparison.shown_by(difference, falls=falls)
    return "" if shown is None else f"; {comparison.claim(falls=falls)} claimed: {'shown' if shown else 'NOT shown'}"


def _course(metrics: Path, name: str | None) -> list[float]:
    """The values that a metric had during training."""
    if name is None:
        return []
    with metrics.open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def _course_lines(
    demo: Demo, results: Mapping[Run, Mapping[str, float]], course: Mapping[str, list[float]]
) -> list[str]:
    """The mean course of a metric for each arm that has it."""
    if demo.course is None or not any(course.values()):
        return []
    lines = ["", f"Mean {demo.course} during training, times 100:", ""]
    for arm in demo.arms:
        rows = [course[run.name] for run in results if run.arm == arm and course[run.name]]
        if rows:
            lines.append(f"- {arm}: " + " ".join(f"{100 * statistics.mean(x):.1f}" for x in zip(*rows, strict=True)))
    return lines


def _pictures(arms: list[str], runs: dict[Run, dict[str, Any]], out: Path) -> None:
    """The first test pictures, or galleries, as the arms of seed 0 see them, and the curves of those runs."""
    from gingham.cli.pictures import save_curves

    first = {arm: out / Run(arm, 0).name for arm in arms}
    for folder in first.values():
        with _whole(folder / "curves.png") as part:
            save_curves(part, folder / "log" / "metrics.csv")
    retrieves = all((folder / _GALLERIES).is_file() for folder in first.values())
    with _whole(out / "predictions.png") as part:
        (_gallery_sheets(first) if retrieves else _panels(arms, runs, out)).save(part)
    print(f"results: {out / 'results.md'} and {out / 'results.json'}")
    print(f"pictures: {out / 'predictions.png'} and {out / '*_seed0' / 'curves.png'}")


def _gallery_sheets(folders: Mapping[str, Path]) -> Any:
    """The galleries that each arm's run left in its folder."""
    from PIL import Image

    from gingham.cli.galleries import stacked

    whole = stacked({arm: Image.open(folder / _GALLERIES) for arm, folder in folders.items()})
    return whole.quantize(256, dither=Image.Dither.NONE)  # of noisy photographs, which else fill megabytes


def _panels(arms: list[str], runs: dict[Run, dict[str, Any]], out: Path) -> Any:
    """The first test pictures with what each arm predicts."""
    import torch

    from gingham.cli.options import instantiate
    from gingham.cli.pictures import draw_panels, known

    rows: list[tuple[Any, dict[str, Any]]] = []
    for run in (Run(arm, 0) for arm in arms):
        parts = instantiate(runs[run], source=run.name)
        dataset = parts.data.dataset("test")
        items = [dataset[i] for i in range(min(6, len(dataset)))]
        rows = rows or [known(dataset, i, item) for i, item in enumerate(items)]
        parts.model.load_state_dict(torch.load(out / run.name / "weights.pt", weights_only=True))
        parts.model.eval()
        with torch.inference_mode():
            for item, (_, views) in zip(items, rows, strict=True):
                views[run.arm] = next(iter(parts.model.views(item).values()))
    return draw_panels(rows, dataset.class_names, dataset.palette)
