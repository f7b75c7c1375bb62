"""``gingham demo``: a method and its baseline on the embedded world, over paired seeds."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import os
import shlex
import signal
import statistics
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from gingham.errors import GinghamError

_CONFIG = "ccnet_world"


class DemoError(GinghamError, ValueError):
    """A demo that does not exist, or options that do not fit together."""


class Run(NamedTuple):
    """One arm with one seed."""

    loops: int
    seed: int

    @property
    def name(self) -> str:
        return f"loops{self.loops}_seed{self.seed}"


class Length(NamedTuple):
    """What the demo changes in the packaged configuration besides loops and seed. None leaves what is there."""

    epochs: int | None = None
    scenes: tuple[int, int, int] | None = None  # in train, val and test


FULL = Length()
QUICK = Length(epochs=6, scenes=(1600, 300, 300))
SMOKE = Length(epochs=1, scenes=(64, 16, 16))


def main(words: list[str]) -> int:
    """Trains the arms, prints the table, writes results and pictures."""
    parser = argparse.ArgumentParser(
        prog="gingham demo",
        description=f"Train CCNet as the configuration {_CONFIG} says, with R loops of criss-cross attention and "
        "without, on the embedded cue scenes. Writes results.md, results.json, predictions.png and a folder per run.",
    )
    parser.add_argument("method", nargs="?", default="ccnet", help="which method (so far: ccnet)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="R=0 and R=2, few epochs: minutes")
    length.add_argument("--smoke", action="store_true", help="only that it runs: seconds")
    parser.add_argument("--seeds", type=int, default=1, help="train every arm with seeds 0 to SEEDS-1 (default 1)")
    parser.add_argument(
        "--arms",
        type=int,
        nargs="+",
        metavar="R",
        help="numbers of loops to compare (default 0 1 2; quick, smoke: 0 2)",
    )
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one per core)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo"),
        metavar="DIR",
        help="folder of results (default demo); finished runs of the same settings and versions in it are not repeated",
    )
    options = parser.parse_args(words)
    if options.method != "ccnet":
        raise DemoError(f"no demo of {options.method!r}: so far there is ccnet")
    for name in ("seeds", "jobs"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise DemoError(f"--{name} must be 1 or more, got {number}")
    arms = sorted(options.arms or ([0, 2] if options.quick or options.smoke else [0, 1, 2]))
    if arms[0] < 0 or len(set(arms)) < len(arms):
        raise DemoError(f"--arms must be different numbers, 0 or more, got {' '.join(map(str, options.arms))}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DemoError(f"--out {options.out}: {error.filename} is a file, but a folder is needed there") from error
    chosen = SMOKE if options.smoke else QUICK if options.quick else FULL
    runs = {Run(arm, seed): _settings(Run(arm, seed), chosen) for seed in range(options.seeds) for arm in arms}
    results = dict(zip(runs, _train_all(runs, options.out, options.jobs), strict=True))
    _write_results(shlex.join(["gingham", "demo", *words]), runs, results, options.out)
    _pictures(arms, runs, options.out)
    return 0


def _settings(run: Run, length: Length) -> dict[str, Any]:
    """The options of recipe, data and trainer: the packaged configuration with this run's changes."""
    import yaml

    from gingham.cli.training import config_file

    config = yaml.safe_load(Path(config_file(_CONFIG)).read_text())
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    model["network"]["loops"] = run.loops
    data["seed"] = run.seed
    if length.scenes is not None:
        data["lengths"] = list(length.scenes)
    if length.epochs is not None:
        config["trainer"]["max_epochs"] = length.epochs
    return {"model": model, "data": data, "trainer": config["trainer"]}


def _recipe(settings: dict[str, Any]) -> Any:
    from gingham.methods.ccnet.recipe import CCNetRecipe

    return CCNetRecipe(**settings["model"])


def _data(settings: dict[str, Any]) -> Any:
    from gingham.methods.segmentation_data import SegmentationData

    return SegmentationData(**settings["data"])


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


def _write_json(path: Path, content: Any) -> None:
    with _whole(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")


def _train_all(runs: dict[Run, dict[str, Any]], out: Path, jobs: int | None) -> list[dict[str, float]]:
    """Scores of every run, trained ``jobs`` at a time in processes of their own that share the cores."""
    cores = len(os.sched_getaffinity(0))
    jobs = min(jobs or cores, len(runs))
    spawn = multiprocessing.get_context("spawn")
    # Only this process heeds Ctrl-C, and ends the others.
    with ProcessPoolExecutor(jobs, spawn, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        started = [pool.submit(_train, run, settings, out, max(1, cores // jobs)) for run, settings in runs.items()]
        try:
            return [run.result() for run in started]
        except BaseException as error:
            # Otherwise the pool would first train all runs that are left.
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()  # Lightning would take a milder signal for a reason to go on
            if isinstance(error, BrokenProcessPool):
                raise DemoError("a training process was killed: with too little memory, try --jobs 1") from error
            raise


def _train(run: Run, settings: dict[str, Any], out: Path, threads: int) -> dict[str, float]:
    """Scores on the test split; those of an earlier run with the same settings and versions if there are any."""
    import lightning
    import torch
    from lightning.pytorch.loggers import CSVLogger

    folder = out / run.name
    file = folder / "result.json"
    made_of = {"settings": settings, "versions": _versions()}
    if file.is_file():
        kept = json.loads(file.read_text())
        if {name: kept.get(name) for name in made_of} == made_of:
            return dict(kept["scores"])
        file.unlink()  # before what it describes is replaced
    for category in (UserWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(threads)
    name = f"R={run.loops}, seed {run.seed}"
    print(f"training {name}", flush=True)
    lightning.seed_everything(run.seed, verbose=False)
    recipe, data = _recipe(settings), _data(settings)
    trainer = lightning.Trainer(
        **settings["trainer"],
        logger=CSVLogger(folder, name="", version="log"),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[_epoch_lines(name, settings["trainer"]["max_epochs"])],
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    start = time.perf_counter()
    trainer.fit(recipe, data)
    seconds = time.perf_counter() - start
    measured = trainer.test(recipe, datamodule=data, verbose=False)[0]
    scores = {"trousers_iou": 100 * measured["test_focus_iou"], "miou": 100 * measured["test_miou"], "seconds": seconds}
    with _whole(folder / "weights.pt") as part:
        torch.save(recipe.state_dict(), part)
    _write_json(file, made_of | {"scores": scores})
    return scores


def _epoch_lines(name: str, epochs: int) -> Any:
    """A Lightning callback that prints one line an epoch, which several runs at a time can share a terminal with."""
    from lightning.pytorch.callbacks import LambdaCallback

    start = time.perf_counter()

    def show(trainer: Any, _: Any) -> None:
        iou = 100 * trainer.callback_metrics["val_focus_iou"].item()
        seconds = time.perf_counter() - start
        line = f"{name}: epoch {trainer.current_epoch + 1} of {epochs}, {seconds:.0f} s"
        print(f"{line}, validation trousers-IoU {iou:.1f}", flush=True)

    return LambdaCallback(on_validation_end=show)


def _write_results(
    command: str, runs: dict[Run, dict[str, Any]], results: dict[Run, dict[str, float]], out: Path
) -> None:
    """Prints results.md and writes it and results.json."""
    import torch

    from gingham.bench.machine import describe

    machine = describe(torch.device("cpu"))
    differences = _differences(results)
    made_with = {"command": command, "commit": machine.get("commit"), "machine": machine, "differences": differences}
    each = {run.name: {"settings": settings, "scores": results[run]} for run, settings in runs.items()}
    _write_json(out / "results.json", made_with | each)
    settings = next(iter(runs.values()))
    report = _report(command, machine, settings, results, differences)
    print(report)
    with _whole(out / "results.md") as part:
        part.write_text(report + "\n")


def _differences(results: dict[Run, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Paired differences of the trousers-IoU between neighbouring arms: by seed, mean, median, 95 % t-interval."""
    from scipy.stats import t

    seeds = sorted({run.seed for run in results})
    found = {}
    for lower, upper in itertools.pairwise(sorted({run.loops for run in results})):
        pairs = [results[Run(upper, s)]["trousers_iou"] - results[Run(lower, s)]["trousers_iou"] for s in seeds]
        mean, interval = statistics.mean(pairs), None
        if len(pairs) > 1:
            half = float(t.ppf(0.975, len(pairs) - 1)) * statistics.stdev(pairs) / len(pairs) ** 0.5
            interval = [mean - half, mean + half]
        found[f"R{upper}-R{lower}"] = {
            "by_seed": pairs,
            "mean": mean,
            "median": statistics.median(pairs),
            "interval_95": interval,
        }
    return found


def _report(
    command: str,
    machine: dict[str, str],
    settings: dict[str, Any],
    results: dict[Run, dict[str, float]],
    differences: dict[str, dict[str, Any]],
) -> str:
    lines = [
        f"CCNet on the cue scenes, test split; {_data(settings).lengths['train']} training scenes, "
        f"{settings['trainer']['max_epochs']} epochs: `{command}`.",
        "On "
        + ", ".join(
            f"{n} {machine[n]}" for n in ("cpu", "cores", "gingham", "commit", "torch", "python") if n in machine
        )
        + ".",
        "",
        "| arm | trousers-IoU by seed | mean | spread | mIoU | training, s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arm in sorted({run.loops for run in results}):
        scores = [scores for run, scores in results.items() if run.loops == arm]
        iou = [score["trousers_iou"] for score in scores]
        spread = f"{statistics.stdev(iou):.1f}" if len(iou) > 1 else "-"
        miou, seconds = (statistics.mean(score[name] for score in scores) for name in ("miou", "seconds"))
        values = " ".join(f"{x:.1f}" for x in iou)
        lines.append(f"| R={arm} | {values} | {statistics.mean(iou):.1f} | {spread} | {miou:.1f} | {seconds:.0f} |")
    lines.append("")
    for name, difference in differences.items():
        text = f"{name}: " + " ".join(f"{x:+.1f}" for x in difference["by_seed"])
        text += f"; mean {difference['mean']:+.1f}, median {difference['median']:+.1f}"
        if difference["interval_95"] is not None:
            text += ", 95 % interval {:+.1f} to {:+.1f}".format(*difference["interval_95"])
        lines.append(text)
    return "\n".join(lines)


def _pictures(arms: list[int], runs: dict[Run, dict[str, Any]], out: Path) -> None:
    """The first test scenes as the arms of seed 0 see them, and the curves of those runs."""
    import torch

    from gingham.cli.pictures import save_curves, save_panels

    dataset = _data(runs[Run(arms[0], 0)]).dataset("test")
    items = [dataset[i] for i in range(min(6, len(dataset)))]
    masks: list[dict[str, Any]] = [{"truth": item["label"]} for item in items]
    for run in (Run(arm, 0) for arm in arms):
        folder = out / run.name
        recipe = _recipe(runs[run])
        recipe.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
        recipe.eval()
        with torch.inference_mode():
            for item, row in zip(items, masks, strict=True):
                row[f"R={run.loops}"] = recipe(item["image"][None])[0].argmax(0)
        with _whole(folder / "curves.png") as part:
            save_curves(part, folder / "log" / "metrics.csv")
    rows = [(dataset.read(i)["image"], row) for i, row in enumerate(masks)]
    with _whole(out / "predictions.png") as part:
        save_panels(part, rows, dataset.class_names, dataset.palette)
    print(f"results: {out / 'results.md'} and {out / 'results.json'}")
    print(f"pictures: {out / 'predictions.png'} and {out / 'loops*_seed0' / 'curves.png'}")
