"""What a run leaves behind lets it go on exactly where it was interrupted."""

import csv
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
import lightning
from lightning.pytorch.callbacks import Callback

from gingham.cli.records import MetricsFile, checkpoints
from gingham.cli.strict_json import strict_json
from gingham.methods.ccnet.recipe import CCNetRecipe
from gingham.methods.segmentation_data import SegmentationData

NETWORK = {
    "backbone": "small",
    "num_classes": 7,
    "head_channels": 8,
    "auxiliary": False,
    "output_stride": 4,
    "dropout": 0.2,
    "backbone_options": {"widths": [4, 4, 4]},
}


class Killed(Exception):
    pass


class Kill(Callback):
    """Ends the run at the n-th call of a hook, before the checkpoints of that hook are written."""

    def __init__(self, hook: str, count: int) -> None:
        self.count = count
        setattr(self, hook, self.countdown)

    def countdown(self, *_: Any) -> None:
        self.count -= 1
        if self.count == 0:
            raise Killed


class Seen(Callback):
    """Which images were trained on."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def on_train_batch_start(self, _: Any, __: Any, batch: Any, index: int) -> None:
        self.names += batch["name"]


def train(
    folder: Path,
    resume: str | None = None,
    kill: tuple[str, int] | None = None,
    workers: int = 0,
    others: tuple[Callback, ...] = (),
    **options: Any,
) -> tuple[dict[str, torch.Tensor], list[str]]:
    lightning.seed_everything(0, verbose=False)
    log = MetricsFile(folder, torch.load(resume, weights_only=True)["global_step"] if resume else 0)
    seen = Seen()
    callbacks = [seen, *others, *checkpoints(folder / "checkpoints", 1)]
    if kill:
        callbacks.append(Kill(*kill))
        log.finalize = lambda status: None  # type: ignore[method-assign]  # a killed process writes nothing more
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=log,
        callbacks=callbacks,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )
    recipe = CCNetRecipe(dict(NETWORK), optimizer="adamw")
    data = SegmentationData(
        batch_size=2, evaluation_batch_size=2, crop=64, scales=None, lengths=(10, 4, 2), workers=workers
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kill:
            with pytest.raises(Killed):
                trainer.fit(recipe, data)
        else:
            trainer.fit(recipe, data, ckpt_path=resume, weights_only=True)
    return recipe.state_dict(), seen.names


def rows(folder: Path) -> list[dict[str, float]]:
    with (folder / "csv" / "metrics.csv").open(newline="") as file:
        return [{name: float(text) for name, text in row.items() if text} for row in csv.DictReader(file)]


EPOCHS = {"max_epochs": 2}
STEPS = {"max_steps": 8}


@pytest.mark.parametrize(
    ("options", "kill"),
    [
        (EPOCHS, ("on_train_batch_end", 3)),
        (EPOCHS, ("on_train_batch_start", 7)),
        (EPOCHS | {"workers": 1}, ("on_train_batch_start", 4)),
        (EPOCHS | {"workers": 1}, ("on_train_batch_start", 8)),
        (EPOCHS | {"accumulate_grad_batches": 2}, ("on_train_batch_end", 4)),
        (EPOCHS | {"accumulate_grad_batches": 2}, ("on_train_batch_start", 4)),
        (EPOCHS | {"limit_train_batches": 3}, ("on_train_batch_start", 3)),
        (EPOCHS | {"limit_train_batches": 3}, ("on_train_batch_start", 5)),
        (EPOCHS | {"val_check_interval": 2}, ("on_validation_start", 3)),
        (EPOCHS | {"val_check_interval": 2}, ("on_train_batch_start", 4)),
        (EPOCHS | {"val_check_interval": 4, "accumulate_grad_batches": 2}, ("on_train_batch_start", 6)),
        (STEPS, ("on_validation_start", 2)),
        (STEPS, ("on_train_batch_end", 6)),
        (STEPS | {"accumulate_grad_batches": 2, "limit_train_batches": 4}, ("on_train_batch_end", 5)),
        (EPOCHS | {"max_steps": 15}, ("on_train_batch_start", 7)),
        (STEPS | {"check_val_every_n_epoch": 2, "accumulate_grad_batches": 4}, ("on_train_batch_start", 7)),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_a_killed_run_goes_on_to_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, options: dict[str, int], kill: tuple[str, int]
) -> None:
    whole, killed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("killed")
    weights, names = train(whole, **options)
    train(killed, kill=kill, **options)
    last = killed / "checkpoints" / "last.ckpt"
    assert max(row["step"] for row in rows(killed)) >= torch.load(last, weights_only=True)["global_step"] - 1
    resumed, rest = train(killed, resume=str(last), **options)
    assert all(torch.equal(weight, resumed[name]) for name, weight in weights.items())
    assert names[-len(rest) :] == rest
    assert len(rest) < len(names)
    assert rows(killed) == rows(whole)
    best, found = (torch.load(x / "checkpoints" / "best.ckpt", weights_only=True) for x in (whole, killed))
    assert best["global_step"] == found["global_step"]


class Stop(Callback):
    """Asks for an end at the n-th batch, as max_time does."""

    def __init__(self, count: int) -> None:
        self.count = count

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.count -= 1
        trainer.should_stop = self.count == 0


@pytest.mark.parametrize("steps", [2, 5, 7])
@pytest.mark.filterwarnings("ignore")
def test_a_run_that_was_stopped_goes_on_in_the_midst_of_its_epoch(tmp_path: Path, steps: int) -> None:
    weights, names = train(tmp_path / "whole", **EPOCHS)
    _, before = train(tmp_path / "stopped", others=(Stop(steps),), **EPOCHS)
    last = str(tmp_path / "stopped" / "checkpoints" / "last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == steps
    resumed, rest = train(tmp_path / "stopped", resume=last, **EPOCHS)
    assert before + rest == names
    assert all(torch.equal(weight, resumed[name]) for name, weight in weights.items())


@pytest.mark.filterwarnings("ignore")
def test_the_best_state_can_be_continued_too(tmp_path: Path) -> None:
    weights, _ = train(tmp_path / "whole", **EPOCHS)
    train(tmp_path / "killed", kill=("on_train_batch_start", 7), **EPOCHS)
    resumed, _ = train(tmp_path / "killed", resume=str(tmp_path / "killed" / "checkpoints" / "best.ckpt"), **EPOCHS)
    assert all(torch.equal(weight, resumed[name]) for name, weight in weights.items())
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def test_rows_after_the_checkpoint_give_way(tmp_path: Path) -> None:
    log = MetricsFile(tmp_path)
    for step in range(5):
        log.log_metrics({"loss": step / 2}, step)
    log.finalize("")
    again = MetricsFile(tmp_path, kept_steps=3)
    again.log_metrics({"loss": 7.0, "val_miou": 0.5}, 3)
    again.save()
    assert [row["loss"] for row in rows(tmp_path)] == [0, 0.5, 1, 7]
    assert rows(tmp_path)[-1]["val_miou"] == 0.5


def test_scores_that_are_not_finite_are_null_in_json() -> None:
    scores = {"ap50": 0.5, "false_positives": math.inf, "iou": [0.25, math.nan, -math.inf], "checkpoint": None, "n": 3}
    strict = json.loads(strict_json(scores), parse_constant=pytest.fail)
    assert strict == {"ap50": 0.5, "false_positives": None, "iou": [0.25, None, None], "checkpoint": None, "n": 3}
