"""``gingham demo``: a method and its baseline on the embedded world, over paired seeds."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import os
import statistics
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gingham.errors import GinghamError


class DemoError(GinghamError, ValueError):
    """A demo that does not exist, or options that do not fit together."""


@dataclass(frozen=True)
class Settings:
    """What all arms of the comparison share. Chosen on the validation split; the test split is only reported."""

    train: int = 1600
    val: int = 300
    test: int = 500
    epochs: int = 15
    batch_size: int = 16
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    gamma_rate: float = 10.0
    head_channels: int = 64
    output_stride: int = 4


FULL = Settings()
QUICK = Settings(epochs=6, test=300)
SMOKE = Settings(train=64, val=16, test=16, epochs=1, warmup_steps=0)


def main(words: list[str]) -> int:
    """Trains the arms, prints the table, writes results and pictures."""
    parser = argparse.ArgumentParser(
        prog="gingham demo",
        description="Train CCNet with R loops of criss-cross attention, and without, on the embedded cue scenes.",
    )
    parser.add_argument("method", nargs="?", default="ccnet", help="which method (so far: ccnet)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="R=0 and R=2, few epochs: minutes")
    length.add_argument("--smoke", action="store_true", help="only that it runs: seconds")
    parser.add_argument("--seeds", type=int, default=1, help="paired seeds (default 1)")
    parser.add_argument("--arms", type=int, nargs="+", default=None, metavar="R", help="numbers of loops to compare")
    parser.add_argument("--jobs", type=int, default=None, help="runs at a time (default: one per core)")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of results; finished runs are kept")
    options = parser.parse_args(words)
    if options.method != "ccnet":
        raise DemoError(f"no demo of {options.method!r}: so far there is ccnet")
    for name in ("seeds", "jobs"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise DemoError(f"--{name} must be 1 or more, got {number}")
    settings = SMOKE if options.smoke else QUICK if options.quick else FULL
    arms = options.arms or ([0, 2] if options.quick or options.smoke else [0, 1, 2])
    options.out.mkdir(parents=True, exist_ok=True)
    runs = [(arm, seed) for seed in range(options.seeds) for arm in arms]
    results = dict(zip(runs, _run_all(runs, settings, options.out, options.jobs), strict=True))
    report = _report(results, arms, options.seeds, settings)
    print(report)
    (options.out / "results.md").write_text(report + "\n")
    _pictures(arms, settings, options.out)
    return 0


def _recipe(loops: int, settings: Settings) -> Any:
    from gingham.data.wardrobe import CUE_LABELS, CueScenes
    from gingham.methods.ccnet.recipe import CCNetRecipe

    network = {
        "backbone": "small",
        "num_classes": CUE_LABELS.num_classes,
        "loops": loops,
        "output_stride": settings.output_stride,
        "head_channels": settings.head_channels,
        "auxiliary": False,
        "dropout": 0.0,
    }
    return CCNetRecipe(
        network,
        optimizer="adamw",
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        gamma_rate=settings.gamma_rate,
        report_classes=CueScenes.trousers,
    )


def _data(seed: int, settings: Settings) -> Any:
    from gingham.methods.segmentation_data import SegmentationData

    return SegmentationData(
        "wardrobe",
        batch_size=settings.batch_size,
        evaluation_batch_size=50,
        crop=64,
        scales=None,
        seed=seed,
        lengths=(settings.train, settings.val, settings.test),
    )


def _run_all(runs: list[tuple[int, int]], settings: Settings, out: Path, jobs: int | None) -> list[dict[str, float]]:
    """Scores of every (R, seed), trained ``jobs`` at a time in processes of their own that share the cores."""
    cores = len(os.sched_getaffinity(0))
    jobs = min(jobs or cores, len(runs))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        started = [pool.submit(_run, *run, settings, out, max(1, cores // jobs)) for run in runs]
        return [run.result() for run in started]


def _run(loops: int, seed: int, settings: Settings, out: Path, threads: int) -> dict[str, float]:
    """Scores on the test split; those of an earlier run with the same settings if there are any."""
    import lightning
    import torch
    from lightning.pytorch.loggers import CSVLogger

    folder = out / f"loops{loops}_seed{seed}"
    file = folder / "result.json"
    if file.is_file():
        kept = json.loads(file.read_text())
        if kept["settings"] == asdict(settings):
            return dict(kept["scores"])
    for category in (UserWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(threads)
    print(f"training R={loops}, seed {seed}", flush=True)
    lightning.seed_everything(seed, verbose=False)
    recipe, data = _recipe(loops, settings), _data(seed, settings)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=settings.epochs,
        logger=CSVLogger(folder, name="", version="log"),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[_epoch_lines(f"R={loops}, seed {seed}", settings.epochs)],
        use_distributed_sampler=False,
        log_every_n_steps=10,
        num_sanity_val_steps=0,
    )
    start = time.perf_counter()
    trainer.fit(recipe, data)
    seconds = time.perf_counter() - start
    measured = trainer.test(recipe, datamodule=data, verbose=False)[0]
    scores = {"trousers_iou": 100 * measured["test_focus_iou"], "miou": 100 * measured["test_miou"], "seconds": seconds}
    torch.save(recipe.state_dict(), folder / "weights.pt")
    file.write_text(json.dumps({"settings": asdict(settings), "scores": scores}, indent=2) + "\n")
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


# Two-sided 95 % points of Student's t distribution by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def _report(results: dict[tuple[int, int], dict[str, float]], arms: list[int], seeds: int, settings: Settings) -> str:
    import torch

    from gingham.bench.machine import describe

    machine = describe(torch.device("cpu"))
    lines = [
        f"CCNet on the cue scenes, test split; {settings.train} training scenes, {settings.epochs} epochs.",
        "On " + ", ".join(f"{name} {machine[name]}" for name in ("cpu", "cores", "gingham", "torch", "python")) + ".",
        "",
        "| arm | trousers-IoU by seed | mean | spread | mIoU | training, s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arm in arms:
        iou = [results[arm, seed]["trousers_iou"] for seed in range(seeds)]
        spread = f"{statistics.stdev(iou):.1f}" if seeds > 1 else "-"
        miou = statistics.mean(results[arm, seed]["miou"] for seed in range(seeds))
        seconds = statistics.mean(results[arm, seed]["seconds"] for seed in range(seeds))
        values = " ".join(f"{x:.1f}" for x in iou)
        lines.append(f"| R={arm} | {values} | {statistics.mean(iou):.1f} | {spread} | {miou:.1f} | {seconds:.0f} |")
    lines.append("")
    for lower, upper in itertools.pairwise(arms):
        pairs = [results[upper, s]["trousers_iou"] - results[lower, s]["trousers_iou"] for s in range(seeds)]
        text = f"R{upper}-R{lower}: " + " ".join(f"{x:+.1f}" for x in pairs)
        text += f"; mean {statistics.mean(pairs):+.1f}, median {statistics.median(pairs):+.1f}"
        if seeds > 1:
            half = _T.get(seeds - 1, 1.96) * statistics.stdev(pairs) / seeds**0.5
            text += f", 95 % interval {statistics.mean(pairs) - half:+.1f} to {statistics.mean(pairs) + half:+.1f}"
        lines.append(text)
    return "\n".join(lines)


def _pictures(arms: list[int], settings: Settings, out: Path) -> None:
    import torch

    from gingham.cli.pictures import save_curves, save_panels
    from gingham.data.wardrobe import CUE_LABELS

    dataset = _data(0, settings).dataset("test")
    items = [dataset[i] for i in range(min(6, len(dataset)))]
    masks: list[dict[str, Any]] = [{"truth": item["label"]} for item in items]
    for arm in arms:
        folder = out / f"loops{arm}_seed0"
        recipe = _recipe(arm, settings)
        recipe.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
        recipe.eval()
        with torch.inference_mode():
            for item, row in zip(items, masks, strict=True):
                row[f"R={arm}"] = recipe(item["image"][None])[0].argmax(0)
        save_curves(folder / "curves.png", folder / "log" / "metrics.csv")
    rows = [(dataset.read(i)["image"], row) for i, row in enumerate(masks)]
    save_panels(out / "predictions.png", rows, CUE_LABELS.names, CUE_LABELS.palette)
    print(f"pictures and results in {out}")
