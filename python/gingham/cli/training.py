"""``gingham fit | validate | test | check-data``: LightningCLI with packaged configurations."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from gingham.errors import CheckpointError, GinghamError

_CONFIGS = Path(__file__).parent.parent / "configs"


class ConfigError(GinghamError, ValueError):
    """A configuration that does not exist."""


def packaged_configs() -> list[str]:
    """Names of the configurations in the package."""
    return sorted(path.stem for path in _CONFIGS.glob("*.yaml"))


def config_file(name: str) -> str:
    """The file of a configuration: a path, or the bare name of a packaged one."""
    if Path(name).is_file():
        return name
    if name in packaged_configs():
        return str(_CONFIGS / f"{name}.yaml")
    raise ConfigError(f"no config {name!r}: neither a file nor one of {', '.join(packaged_configs())}")


def _with_config_files(words: list[str]) -> list[str]:
    result = list(words)
    for i, word in enumerate(result):
        if word.startswith("--config="):
            result[i] = "--config=" + config_file(word.removeprefix("--config="))
        elif i and result[i - 1] in ("--config", "-c"):
            result[i] = config_file(word)
    return result


class Pictures(Callback):
    """After each validation, overlays of a few of its images; at the end of training, the curves."""

    def __init__(self, images: int = 8) -> None:
        self.images = images

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        folder = trainer.log_dir  # a broadcast: every process has to ask
        if trainer.sanity_checking or not trainer.is_global_zero or folder is None:
            return
        import torch

        from gingham.cli.pictures import save_panels

        dataset = trainer.datamodule.dataset("val")  # type: ignore[attr-defined]
        items = [dataset[i] for i in range(min(self.images, len(dataset)))]
        raw = [dataset.read(i)["image"] for i in range(len(items))]
        was_training = pl_module.training
        pl_module.eval()
        with torch.no_grad():
            masks = [pl_module(item["image"][None].to(pl_module.device))[0].argmax(0).cpu() for item in items]
        pl_module.train(was_training)
        rows = [
            (image, {"truth": item["label"], "prediction": mask})
            for image, item, mask in zip(raw, items, masks, strict=True)
        ]
        save_panels(Path(folder) / "predictions.png", rows, dataset.class_names, dataset.palette)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        folder = trainer.log_dir
        if trainer.is_global_zero and folder is not None:
            from gingham.cli.pictures import save_curves

            metrics = next((Path(x.log_dir) / "metrics.csv" for x in trainer.loggers if isinstance(x, CSVLogger)), None)
            if metrics is not None and metrics.is_file():
                save_curves(Path(folder) / "curves.png", metrics)


class _CLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", default="runs", help="folder of logs, pictures and checkpoints")
        parser.add_argument(
            "--checkpoint_every", type=int, default=200, help="steps between checkpoints to resume from"
        )

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        folder = Path(self.config["run_dir"])
        if not self.config["trainer"].get("logger"):
            csv = CSVLogger(folder, name="", version="csv")
            kwargs["logger"] = [TensorBoardLogger(folder, name="", version="tensorboard"), csv]
        own = self.config_init["trainer"].get("callbacks") or []
        ours = [*checkpoints(folder / "checkpoints", self.config["checkpoint_every"]), Pictures()]
        kwargs["callbacks"] = [*(own if isinstance(own, list) else [own]), *ours]
        trainer: lightning.Trainer = super().instantiate_trainer(**kwargs)
        return trainer


def checkpoints(folder: Path, every: int, monitor: str = "val_miou") -> list[Callback]:
    """The last state every so many steps (and at the end of an epoch), and the best one by `monitor`."""
    return [
        ModelCheckpoint(folder, filename="last", every_n_train_steps=every, save_top_k=1, enable_version_counter=False),
        ModelCheckpoint(
            folder, filename="best", monitor=monitor, mode="max", save_top_k=1, enable_version_counter=False
        ),
    ]


def resolve_checkpoint(path: str | None, run_dir: Path) -> str | None:
    """The file that ``--ckpt_path`` means: a path, or "last" or "best" of the run's folder."""
    if path is None:
        return None
    file = run_dir / "checkpoints" / f"{path}.ckpt" if path in ("last", "best") else Path(path)
    if not file.is_file():
        raise CheckpointError(f"no checkpoint {file}: give a file, or 'last' or 'best' of a run in --run_dir")
    return str(file)


def main(command: str, words: list[str]) -> int:
    """Runs fit, validate, test or check-data."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter.*")
    # The meter sums over processes itself, so every process logs the same number.
    warnings.filterwarnings("ignore", message="It is recommended to use `self.log.*sync_dist=True.*")
    warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    words, wanted = _without_checkpoint(words)
    # jsonargparse prints its own one-line error and exits with code 2
    cli = _CLI(
        lightning.LightningModule,
        lightning.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"default_env": False},
        trainer_defaults={"use_distributed_sampler": False},
        args=_with_config_files(words),
        run=False,
    )
    folder = Path(cli.config["run_dir"])
    if command == "check-data":
        return _check_data(cli.datamodule)
    checkpoint = resolve_checkpoint(wanted, folder)
    model, data, trainer = cli.model, cli.datamodule, cli.trainer
    if command == "fit":
        folder.mkdir(parents=True, exist_ok=True)
        cli.parser.save(cli.config, folder / "config.yaml", skip_none=False, overwrite=True)
        _load_safely(lambda: trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True), checkpoint)
        return 0
    if checkpoint is None:
        raise CheckpointError(f"gingham {command} needs --ckpt_path FILE (or 'last' or 'best' of --run_dir)")
    evaluate = trainer.validate if command == "validate" else trainer.test
    _load_safely(lambda: evaluate(model, datamodule=data, ckpt_path=checkpoint, weights_only=True), checkpoint)
    return 0


def _without_checkpoint(words: list[str]) -> tuple[list[str], str | None]:
    """Takes ``--ckpt_path X`` out of the words."""
    rest: list[str] = []
    found: str | None = None
    words = list(words)
    while words:
        word = words.pop(0)
        if word == "--ckpt_path" and words:
            found = words.pop(0)
        elif word.startswith("--ckpt_path="):
            found = word.removeprefix("--ckpt_path=")
        else:
            rest.append(word)
    return rest, found


def _load_safely(run: Any, checkpoint: str | None) -> None:
    try:
        run()
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if checkpoint is not None and "state_dict" in text:
            raise CheckpointError(f"{checkpoint} does not fit this model: {text}") from error
        raise


def _check_data(data: Any) -> int:
    from gingham.data import check_dataset

    problems = [f"{split}: {text}" for split in ("train", "val") for text in check_dataset(data.dataset(split))]
    print("\n".join(problems) if problems else "nothing wrong with the train and val splits")
    return 1 if problems else 0
