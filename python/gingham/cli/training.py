"""``gingham fit | validate | test | check-data``: LightningCLI with packaged configurations."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from gingham.cli.class_table import (
    Row,
    class_table,
    classification_table,
    detection_table,
    few_shot_table,
    print_class_table,
    retrieval_lines,
    write_class_table,
)
from gingham.cli.options import (
    ConfigError,
    config_file,
    one_line_errors,
    packaged_configs,
    read_config,
    with_config_files,
    with_whole_network,
)
from gingham.cli.records import MetricsFile, checkpoints, resolve_checkpoint
from gingham.cli.strict_json import strict_json
from gingham.data.coco_detection import write_coco_results
from gingham.data.episodes import write_episodes
from gingham.errors import CheckpointError, DataError
from gingham.methods.dap.recipe import ClassificationScores
from gingham.methods.reid_data import ReidData, TrackletData
from gingham.methods.reid_recipe import ReidRecipe
from gingham.metrics import DetectionScores, FewShotScores, RetrievalScores
from gingham.nn.checkpoint import check_fit, read_file

__all__ = ["ConfigError", "Pictures", "config_file", "main", "packaged_configs", "resolve_checkpoint"]


class Pictures(Callback):
    """After each validation, what the recipe sees in a few of its images; at the end of training, the curves.

    The pictures are files in the run's folder, and go to TensorBoard where there is such a logger.
    """

    def __init__(self, images: int = 8) -> None:
        self.images = images

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        folder = trainer.log_dir  # a broadcast: every process has to ask
        open_split = getattr(trainer.datamodule, "dataset", None)  # type: ignore[attr-defined]
        if trainer.sanity_checking or not trainer.is_global_zero or folder is None or open_split is None:
            return
        sheet = self._sheet(open_split("val"), trainer, pl_module)
        if sheet is None:
            return
        import numpy

        Path(folder).mkdir(parents=True, exist_ok=True)
        sheet.save(Path(folder) / "predictions.png")
        for board in trainer.loggers:
            if isinstance(board, TensorBoardLogger):
                board.experiment.add_image("predictions", numpy.asarray(sheet), trainer.global_step, dataformats="HWC")

    def _sheet(self, dataset: Any, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> Any:
        """What there is to show of a validation split, or None."""
        import torch

        from gingham.cli.galleries import gallery_sheet
        from gingham.cli.pictures import draw_panels, known

        if isinstance(pl_module, ReidRecipe):
            galleries = pl_module.scores["val"].galleries
            return None if galleries is None else gallery_sheet(dataset, galleries)
        views: Any = getattr(pl_module, "views", None)
        if views is None:
            return None
        items = [dataset[i] for i in range(min(self.images, len(dataset)))]
        if not items:
            return None
        shown = [known(dataset, i, item) for i, item in enumerate(items)]
        was_training = pl_module.training
        pl_module.eval()
        precision = trainer.precision_plugin
        with torch.no_grad(), precision.forward_context():
            seen = [views(precision.convert_input(item)) for item in items]
        pl_module.train(was_training)
        rows = [(image, {**given, **found}) for (image, given), found in zip(shown, seen, strict=True)]
        return draw_panels(rows, dataset.class_names, dataset.palette)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        folder = trainer.log_dir
        if trainer.is_global_zero and folder is not None:
            from gingham.cli.pictures import save_curves

            metrics = next((x.file for x in trainer.loggers if isinstance(x, MetricsFile)), None)
            if metrics is not None and metrics.is_file():
                save_curves(Path(folder) / "curves.png", metrics)


class _CLI(LightningCLI):
    """The parts of one command: `model`, `trainer`, `datamodule`, and the checkpoint that they begin from."""

    def __init__(self, command: str, words: list[str]) -> None:
        self.command = command
        self.checkpoint: str | None = None
        super().__init__(
            lightning.LightningModule,
            lightning.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_callback=None,
            parser_kwargs={
                "prog": f"gingham {command}",
                "default_env": False,
                "exit_on_error": False,
                "allow_abbrev": False,
            },
            trainer_defaults={"use_distributed_sampler": False},
            args=with_config_files(words),
            run=False,
            auto_configure_optimizers=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", default="runs", help="folder of logs, pictures and checkpoints")
        parser.add_argument(
            "--checkpoint_every", type=int, default=200, help="steps between checkpoints to resume from"
        )
        parser.add_argument(
            "--ckpt_path", type=str, default=None, help="a checkpoint to go on from or to evaluate: FILE, last or best"
        )
        parser.add_argument("--overwrite", action="store_true", help="delete the run that --run_dir holds")
        parser.add_argument(
            "--check_data", type=bool, default=True, help="read every file of the data set before training begins"
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, with_whole_network(args, parser))

    def before_instantiate_classes(self) -> None:
        self.run_dir = Path(self.config["run_dir"])
        if self.config["checkpoint_every"] < 1:
            raise ConfigError(f"--checkpoint_every must be 1 or more, got {self.config['checkpoint_every']}")
        if self.command == "check-data":
            return
        self.checkpoint = resolve_checkpoint(self.config["ckpt_path"], self.run_dir)
        if self.checkpoint is None and self.command != "fit":
            raise CheckpointError(
                f"gingham {self.command} needs --ckpt_path FILE (or 'last' or 'best' of the run in --run_dir)"
            )
        self.state = _read_checkpoint(self.checkpoint, training=self.command == "fit") if self.checkpoint else None
        if self.command == "fit" and not self._continues() and not self.config["overwrite"] and _records(self.run_dir):
            raise ConfigError(
                f"{self.run_dir} holds a run: continue it with --ckpt_path last, give another --run_dir, "
                "or delete it with --overwrite"
            )

    def _continues(self) -> bool:
        """Whether this is another part of the run in `run_dir`. Processes but the first come when it has begun."""
        if not _is_first_process():
            return True
        if self.checkpoint is None:
            return False
        file = Path(self.checkpoint)  # its folder may be a link to elsewhere
        return self.run_dir.resolve() in file.resolve().parents or self.run_dir.absolute() in file.absolute().parents

    def instantiate_classes(self) -> None:
        if self.command == "check-data":
            config = self.config.clone()
            config.pop("model")
            self.datamodule = self.parser.instantiate_classes(config)["data"]
            return
        super().instantiate_classes()
        if self.state is not None and self.checkpoint is not None:
            check_fit(self.model, self.state["state_dict"], source=self.checkpoint)

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        own = self.config_init["trainer"].get("callbacks") or []
        callbacks = [*(own if isinstance(own, list) else [own]), Pictures()]
        if self.command == "fit":
            if self.config["trainer"].get("enable_checkpointing") is not False:
                monitor = getattr(self.model, "monitor", "val_miou") if _may_choose(self.datamodule) else None
                callbacks += checkpoints(self.run_dir / "checkpoints", self.config["checkpoint_every"], monitor)
            if self.config["trainer"].get("logger") in (None, True):
                steps = self.state["global_step"] if self.state and self._continues() else 0
                board = TensorBoardLogger(self.run_dir, name="", version="tensorboard", purge_step=steps or None)
                kwargs["logger"] = [board, MetricsFile(self.run_dir, steps)]
        else:
            kwargs |= {"logger": False, "enable_checkpointing": False, "default_root_dir": self.run_dir / self.command}
        trainer: lightning.Trainer = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        return trainer


def main(command: str, words: list[str]) -> int:
    """Runs fit, validate, test or check-data.

    Raises:
        ConfigError: options that do not exist or do not fit together.
        CheckpointError: a checkpoint that cannot be read or does not fit the model.
        DataError: what is wrong with the data.
    """
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter.*")
    # The meter sums over processes itself, so every process logs the same number.
    warnings.filterwarnings("ignore", message="It is recommended to use `self.log.*sync_dist=True.*")
    warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    # SegmentationData goes on where the run was.
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`, callbacks used to create.*")
    advertisement = "litlogger"
    notices = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    notices.addFilter(lambda record: advertisement not in record.getMessage())
    if {"-h", "--help"} & set(words):
        return _help(command, words)
    if not any(word.startswith(("--config", "-c")) or ".help" in word for word in words):
        raise ConfigError(f"gingham {command} needs --config FILE, or the name of one: {', '.join(packaged_configs())}")
    with one_line_errors():
        cli = _CLI(command, words)
    if command == "check-data":
        return _check_data(cli.datamodule)
    if command == "fit":
        _fit(cli)
    else:
        _evaluate(cli)
    return 0


def _may_choose(datamodule: Any) -> bool:
    """Whether a state may be chosen by its validation, which is not so where that is the test."""
    return bool(getattr(datamodule, "has_validation", True))


def _is_first_process() -> bool:
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def _records(folder: Path) -> list[Path]:
    """The files of a run that a second one would mix with its own."""
    return [path for pattern in ("checkpoints/*.ckpt", "csv/metrics.csv") for path in folder.glob(pattern)]


@contextmanager
def _interruptions(trainer: lightning.Trainer) -> Iterator[None]:
    """Ctrl-C remains one: Lightning ends the process as if something had failed."""
    try:
        yield
    except SystemExit as error:
        if trainer.interrupted:
            raise KeyboardInterrupt from error
        raise


def _fit(cli: _CLI) -> None:
    if _is_first_process():
        if cli.config["check_data"] and cli.checkpoint is None and getattr(cli.datamodule, "root", None) is not None:
            _require_good_data(cli.datamodule)
        if cli.config["overwrite"] and not cli._continues():
            for path in [*_records(cli.run_dir), *cli.run_dir.glob("tensorboard/events.out.*")]:
                path.unlink()
        cli.run_dir.mkdir(parents=True, exist_ok=True)
        config = cli.config.clone(with_meta=False)
        config["ckpt_path"], config["overwrite"] = None, False
        cli.parser.save(config, cli.run_dir / "config.yaml", skip_none=False, overwrite=True)
        if not _may_choose(cli.datamodule):
            print(f"gingham: {cli.datamodule.without_validation}")
    with one_line_errors(running=True), _interruptions(cli.trainer):
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.checkpoint, weights_only=True)


def _evaluate(cli: _CLI) -> None:
    trainer = cli.trainer
    evaluate = trainer.validate if cli.command == "validate" else trainer.test
    with one_line_errors(running=True), _interruptions(trainer):
        scores = evaluate(cli.model, datamodule=cli.datamodule, ckpt_path=cli.checkpoint, weights_only=True)
    if trainer.is_global_zero:
        cli.run_dir.mkdir(parents=True, exist_ok=True)
        split = "val" if cli.command == "validate" else "test"
        kept = getattr(cli.model, "scores", {})
        report = {"checkpoint": cli.checkpoint} | {name: value for part in scores for name, value in part.items()}
        if isinstance(kept.get(split), FewShotScores):
            statement = f"{cli.datamodule.describe(split)}; shots combined by {cli.model.combination}"
            report |= {"protocol": statement, "counts": kept[split].counts.tolist()}
            print(report["protocol"])
        if isinstance(kept.get(split), RetrievalScores):
            report |= {"protocol": f"{cli.datamodule.describe(split)}; {cli.model.describe()}"}
            report |= {"cmc": kept[split].cmc.tolist(), "skipped": int(kept[split].skipped)}
            print(report["protocol"])
            print("\n".join(retrieval_lines(kept[split])))
        (cli.run_dir / f"{cli.command}.json").write_text(strict_json(report))
        if split in kept and not isinstance(kept[split], RetrievalScores):
            rows = _class_rows(cli, kept[split], split)
            print_class_table(rows)
            write_class_table(cli.run_dir / f"{cli.command}_classes.csv", rows)


def _class_rows(cli: _CLI, scores: Any, split: str) -> list[Row]:
    """The table of the classes; of detections also their result file, of few-shot episodes their list."""
    if isinstance(scores, FewShotScores):
        write_episodes(cli.run_dir / f"{cli.command}_episodes.jsonl", cli.datamodule.episodes_of(split))
        names = [cli.datamodule.labels.names[index] for index in cli.datamodule.classes_of(split)]
        return few_shot_table(scores, names)
    if isinstance(scores, ClassificationScores):
        return classification_table(scores, cli.datamodule.class_names)
    if not isinstance(scores, DetectionScores):
        boundary = getattr(cli.model, "boundary_scores", {}).get(split)
        return class_table(scores, boundary, cli.datamodule.label_space().names)
    dataset = cli.datamodule.dataset(split)
    write_coco_results(cli.run_dir / f"{cli.command}_detections.json", scores.detections, dataset.category_ids)
    return detection_table(scores, dataset.class_names)


def _read_checkpoint(path: str, *, training: bool) -> dict[str, Any]:
    """What Lightning saved: the weights and, if `training` shall go on, the rest of its state."""
    content = read_file(path)
    needed = ["state_dict", "global_step"] + (["optimizer_states", "loops"] if training else [])
    missing = [name for name in needed if not isinstance(content, dict) or name not in content]
    if missing:
        raise CheckpointError(f"{path} is no checkpoint of gingham fit: it has no {', '.join(missing)}")
    return dict(content)


_HELP = """usage: gingham {command} --config NAME [--data.root DIR] [--run_dir DIR] [--ckpt_path FILE] [options]

{purpose}

  --config NAME          a packaged configuration ({configs})
                         or a YAML file, such as the config.yaml of a run; options after it take the place of its values
  --run_dir DIR          where logs, pictures and checkpoints are
  --ckpt_path FILE       the checkpoint to {use}: a file, or the name of one in --run_dir: last, best, ...
  --checkpoint_every N   fit: optimiser steps between two states of "last" (default 200)
  --overwrite            fit: delete the run that --run_dir holds and begin anew
  --check_data BOOL      fit: read every file of the data set before training begins, and list what is wrong (default
                         true; not when a run is continued)
  --seed_everything N    fit: seed of the weights and of dropout (default 0)
  --trainer.NAME VALUE   any argument of lightning.Trainer: devices, num_nodes, strategy, precision, max_steps,
                         max_epochs, accumulate_grad_batches, val_check_interval, log_every_n_steps, ...
  --model.NAME VALUE     an option of the recipe; of its network: --model.network.NAME VALUE, and of a group of options
                         within it: --model.network.NAME.INNER VALUE, which leaves the others of the group as they are
  --data.NAME VALUE      an option of the data
  --print_config         print the configuration that results, with every option, and stop
  --debug                show the traceback of errors
"""


def _help(command: str, words: list[str]) -> int:
    """Prints the options; those of recipe and data too where a configuration says which these are."""
    purpose = {
        "fit": "Train a recipe; the run can be interrupted at any time and continued with --ckpt_path last.",
        "validate": "Evaluate a checkpoint on the validation split; the scores go to validate.json in --run_dir.",
        "test": "Evaluate a checkpoint on the test split; the scores go to test.json in --run_dir.",
        "check-data": "Read every item of a data set and list what is wrong with it.",
    }
    use = "continue" if command == "fit" else "evaluate"
    text = _HELP.format(command=command, purpose=purpose[command], configs=", ".join(packaged_configs()), use=use)
    print(text)
    files = [word for i, word in enumerate(words) if i and words[i - 1] in ("--config", "-c")]
    files += [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    if not files:
        print(f"Options of recipe and data: gingham {command} --config NAME --help")
        return 0
    contents = [read_config(config_file(file)) for file in files]  # the later ones may hold the changed options alone
    for part in ("model", "data"):
        kinds = [content[part]["class_path"] for content in contents if "class_path" in (content.get(part) or {})]
        if not kinds:
            raise ConfigError(f"{' and '.join(files)}: a configuration needs the class_path of {part}")
        try:
            _CLI(command, [f"--{part}.help={kinds[-1]}"])
        except SystemExit:  # jsonargparse ends the process after its help
            print()
    return 0


def _check_data(data: Any) -> int:
    """Prints every problem and a line for each split; returns 1 if there are problems."""
    found = 0
    for split in data.splits():
        length, problems = _problems(data, split)
        for text in problems:
            print(f"{split}: {text}")
        number = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}" if problems else "nothing wrong"
        kind = "tracklets" if isinstance(data, TrackletData) else "images"
        print(f"{split}: {length} {kind}, {number}")
        found += len(problems)
    return 1 if found else 0


def _require_good_data(data: Any) -> None:
    """Raises a DataError if anything is wrong with the splits of a training, after it has printed what."""
    splits = [split for split in data.splits() if split.startswith(("train", "val"))]
    found = [f"{split}: {text}" for split in splits for text in _problems(data, split)[1]]
    for text in found:
        print(text)
    if found:
        raise DataError(
            f"{len(found)} problem{'s' if len(found) > 1 else ''} in {data.root}, listed above: mend them, or begin "
            "nevertheless with --check_data false"
        )


def _problems(data: Any, split: str) -> tuple[int, list[str]]:
    """How many images a split has, and what is wrong with them."""
    from tqdm import tqdm

    from gingham.data import check_dataset

    dataset = data.open(split) if isinstance(data, ReidData) else data.open(split, require_labels=False)
    threads = min(8, len(os.sched_getaffinity(0)))
    bar = tqdm(range(len(dataset)), desc=f"checking {split}", unit="image", disable=None)
    problems = check_dataset(dataset, bar, threads=threads)
    if split == "test":  # the labels of a benchmark's test split need not be public
        problems = [text for text in problems if not text.endswith(": no label file")]
    return len(dataset), problems
