"""Drop-and-Pick as a callback: ordinary training, learning rates, visits, states at any moment, several processes."""

import json
import multiprocessing
import os
import signal
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader

pytest.importorskip("lightning", reason="training needs the extra: pip install gingham[train]")
import lightning
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gingham.cli import main
from gingham.cli.records import checkpoints
from gingham.errors import CheckpointError, DataError
from gingham.methods.ccnet.recipe import CCNetRecipe
from gingham.methods.dap.active_set import ActiveSet
from gingham.methods.dap.data import ClassificationData
from gingham.methods.dap.drop_and_pick import DropAndPick
from gingham.methods.dap.recipe import ClassificationRecipe
from gingham.methods.dap.schedule import Schedule
from gingham.methods.pdml.recipe import PDMLRecipe
from gingham.methods.resumable_data import SelectedBatches
from gingham.methods.schp import self_correction
from gingham.methods.schp.self_correction import SelfCorrection
from gingham.methods.segmentation_data import SegmentationData
from trainings import trainer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

NETWORK: dict[str, Any] = {"backbone": "small", "num_classes": 10, "backbone_options": {"widths": [4, 8]}}
CYCLES: dict[str, Any] = {"budget": 0.75, "warmup": 1, "cycle": 3}


def recipe(**options: Any) -> ClassificationRecipe:
    torch.manual_seed(0)
    return ClassificationRecipe(NETWORK | {"dropout": 0.2}, **options)


def garments(**options: Any) -> ClassificationData:
    augmented = {"size": 28, "augmentation": "padded_crop"}
    return ClassificationData(**{"batch_size": 16, "lengths": (90, 10, 10), **augmented, **options})


class Watch(lightning.Callback):
    """The learning rate, the number of batches and the visited items of every epoch."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.lengths: list[int] = []
        self.items: list[list[int]] = []

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.rates.append([])
        self.items.append([])
        self.lengths.append(int(trainer.num_training_batches))

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.rates:  # resumed in the middle of an epoch
            self.on_train_epoch_start(trainer, pl_module)
        self.rates[-1].append(trainer.optimizers[0].param_groups[0]["lr"])
        if "index" in batch:
            self.items[-1] += batch["index"].tolist()


def trained(
    folder: Path, callbacks: list[Any], *, epochs: int = 5, data: Any = None, **options: Any
) -> tuple[Any, Watch]:
    """A recipe after training, and what was seen in it."""
    watch = Watch()
    made = recipe(**{"learning_rate": 0.05, **options.pop("recipe", {})})
    run = trainer(folder, callbacks=[*callbacks, watch], max_epochs=epochs, **options)
    run.fit(made, data or garments())
    return made, watch


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(value, value_of_other) for value, value_of_other in pairs)


# --- ordinary training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("drop_last", "accumulate"), [(True, 1), (False, 2)])
def test_nothing_dropped_is_ordinary_training_to_the_bit(tmp_path: Path, drop_last: bool, accumulate: int) -> None:
    options: dict[str, Any] = {"recipe": {"warmup_steps": 3}, "accumulate_grad_batches": accumulate, "epochs": 3}
    plain, seen = trained(tmp_path, [], data=garments(drop_last=drop_last), **options)
    for callback in (DropAndPick(budget=1.0, warmup=1, cycle=2), DropAndPick(None, 0.0, warmup=1, cycle=2)):
        other, seen_too = trained(tmp_path, [callback], data=garments(drop_last=drop_last), **options)
        assert same(plain, other)
        assert seen.rates == seen_too.rates


# --- rates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"milestones": (3, 5)}, {"power": 1.0}, {"power": 0.9, "warmup_steps": 4}], ids=str
)
def test_an_epoch_has_the_rate_that_it_has_in_ordinary_training(tmp_path: Path, options: dict[str, Any]) -> None:
    _, ordinary = trained(tmp_path, [], epochs=7, recipe=options)
    _, shorter = trained(tmp_path, [DropAndPick(**CYCLES)], epochs=7, recipe=options)
    assert sum(shorter.lengths) < 0.8 * sum(ordinary.lengths)
    for epoch in range(7):
        assert shorter.rates[epoch][0] == ordinary.rates[epoch][0]
        assert shorter.rates[epoch] == sorted(shorter.rates[epoch], reverse=True) or epoch == 0
    if "milestones" in options:
        assert [rates[-1] for rates in shorter.rates] == pytest.approx([0.05] * 3 + [0.005] * 2 + [0.0005] * 2)
    else:  # the last step of the last epoch is as far as a step of this epoch goes
        assert shorter.rates[-1][-1] < 0.05 * (1.5 / (7 * shorter.lengths[-1])) ** options["power"] * 1.2


def test_milestones_are_epochs_where_steps_end_the_training(tmp_path: Path) -> None:
    options: dict[str, Any] = {"milestones": (1, 2)}
    _, whole = trained(tmp_path, [], epochs=5, recipe=options, data=garments(drop_last=True))
    for epochs in (5, -1):
        _, cut = trained(tmp_path, [], epochs=epochs, max_steps=13, recipe=options, data=garments(drop_last=True))
        assert [len(rates) for rates in cut.rates] == [5, 5, 3]
        assert cut.rates == [*whole.rates[:2], whole.rates[2][:3]]
    assert [rates[-1] for rates in cut.rates] == pytest.approx([0.05, 0.005, 0.0005])


def test_gradients_or_rates_can_make_up_for_the_dropped(tmp_path: Path) -> None:
    plain_steps = {"momentum": 0.0, "weight_decay": 0.0, "power": 0.0}
    weights = {}
    for rescale in ("none", "loss", "rate"):
        callback = DropAndPick(**CYCLES, rescale=rescale)  # type: ignore[arg-type]
        weights[rescale], watch = trained(tmp_path, [callback], epochs=3, recipe=plain_steps)
        assert {rate for rates in watch.rates for rate in rates} == {0.05}  # between steps
    with pytest.raises(MisconfigurationException, match="rescale must be 'rate' with the optimizer adamw"):
        trained(tmp_path, [DropAndPick(**CYCLES, rescale="loss")], recipe={"optimizer": "adamw"})
    for name, value in weights["loss"].network.named_parameters():
        torch.testing.assert_close(value, weights["rate"].network.get_parameter(name), rtol=1e-4, atol=1e-6)
    assert not same(weights["loss"], weights["none"])


# --- visits -----------------------------------------------------------------------------------------------------------


def test_visits_are_those_planned_and_nothing_else_is_looked_at(tmp_path: Path) -> None:
    forwards = []
    callback, made, watch, data = DropAndPick(**CYCLES), recipe(), Watch(), garments()
    made.network.register_forward_hook(lambda network, images, _: forwards.append((network.training, len(images[0]))))
    run = trainer(tmp_path, callbacks=[callback, watch], max_epochs=7)
    run.fit(made, data)
    assert data.selection is made.observe is made.pace is None  # what is trained next is trained ordinarily
    chosen = callback.active_set
    assert chosen is not None
    planned = chosen.schedule.sizes(chosen.fraction)
    assert [len(items) for items in watch.items] == [len(set(items)) for items in watch.items] == planned
    assert planned[:2] == [90, 90] and planned[2] < 90 and planned[4] == 90
    assert watch.lengths == [-(-size // 16) for size in planned]
    assert chosen.visits == sum(planned) <= 0.75 * 7 * 90
    assert sum(count for training, count in forwards if training) == sum(planned)
    assert sum(count for training, count in forwards if not training) == 7 * 10  # the validation
    norm = next(module for module in made.network.modules() if isinstance(module, nn.BatchNorm2d))
    assert norm.num_batches_tracked == sum(watch.lengths)
    assert run.callback_metrics["active"] == pytest.approx(planned[-1] / 90)
    (scores,) = run.test(made, garments(), verbose=False)
    assert scores["test_visits"] == sum(planned)


def test_workers_give_the_same_items_and_a_loader_knows_its_length() -> None:
    def stream(persistent: bool = False, **options: Any) -> list[list[int]]:
        data, trained = garments(**options), 0
        chosen = ActiveSet(Schedule(90, 4, warmup=1, cycle=3), 0.3)
        data.selection = chosen
        data._trained = lambda: trained  # type: ignore[method-assign]
        loader: Any = data.train_dataloader()
        if persistent:
            loader = DataLoader(
                loader.dataset, batch_sampler=loader.batch_sampler, num_workers=1, persistent_workers=True
            )
        epochs = []
        for _ in range(4):
            length, images = len(loader), 0.0
            indices = []
            for batch in loader:
                indices.append(batch["index"])
                images += float(batch["image"].sum())
            assert len(indices) == length
            trained += length
            epochs.append([*torch.cat(indices).tolist(), round(images)])
            chosen.record(torch.cat(indices), torch.cat(indices).float())
        return epochs

    alone = stream()
    assert [len(one) - 1 for one in alone] == [90, 90, 63, 45]
    assert alone == stream(workers=2) == stream(persistent=True)


def test_a_loss_that_is_not_finite_keeps_its_sample_and_is_told_once(tmp_path: Path) -> None:
    class Broken(ClassificationRecipe):
        def on_fit_start(self) -> None:
            super().on_fit_start()
            told: Any = self.observe
            self.observe = lambda batch, losses: told(batch, losses.where(batch["index"] != 3, torch.nan))

    watch, callback = Watch(), DropAndPick(None, 0.9, warmup=0, cycle=3, min_active=1)
    run = trainer(tmp_path, callbacks=[callback, watch], max_epochs=6, limit_val_batches=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(Broken(NETWORK), garments())
    assert sum("losses are not finite" in str(warning.message) for warning in caught) == 1
    assert [len(items) for items in watch.items] == [90, 9, 1, 90, 9, 1]
    assert watch.items[2] == watch.items[5] == [3]


def test_a_callback_that_looks_at_the_loader_first_changes_nothing(tmp_path: Path) -> None:
    class Early(lightning.Callback):
        def on_train_epoch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
            loader: Any = trainer.train_dataloader
            lengths.append(len(loader))

    lengths: list[int] = []
    plain, watch = trained(tmp_path, [DropAndPick(**CYCLES)])
    other, _ = trained(tmp_path, [Early(), DropAndPick(**CYCLES)])
    assert same(plain, other) and lengths[:4] == watch.lengths[1:5]


# --- what it works with -----------------------------------------------------------------------------------------------


def test_it_works_on_ccnet_by_configuration_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = "gingham.methods.dap.drop_and_pick.DropAndPick"
    callback = json.dumps(
        [{"class_path": path, "init_args": {"budget": None, "fraction": 0.5, "warmup": 1, "cycle": 2}}]
    )
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    small = [
        "--data.lengths=[16,2,2]",
        "--data.batch_size=4",
        "--trainer.max_epochs=3",
        "--trainer.log_every_n_steps=1",
    ]
    words = ["--config=ccnet_world", f"--run_dir={tmp_path}", *small, *quiet, f"--trainer.callbacks={callback}"]
    assert main(["fit", *words]) == 0
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["drop_and_pick"]
    assert state["sizes"] == [16, 16, 8] and state["visits"] == 40
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    written["trainer"] |= {"max_steps": 100, "max_epochs": None}  # as the configurations of Cityscapes, ADE20K and VOC
    (tmp_path / "steps.yaml").write_text(yaml.safe_dump(written))
    words[0] = f"--config={tmp_path / 'steps.yaml'}"
    again = [*words, "--overwrite", "--data.lengths=[16,2,2]", "--trainer.max_epochs=3"]
    assert main(["fit", *again]) == 2
    assert "no trainer.max_steps (-1 undoes that of a configuration)" in capsys.readouterr().err
    assert main(["fit", *again, "--trainer.max_steps=-1"]) == 0
    assert state["losses"].isfinite().all() and len(state["losses"].unique()) == 16


def test_batch_norms_of_averaged_networks_see_the_dropped_images_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(
        self_correction, "estimate_batch_norm", lambda _, images: seen.append(sum(len(batch) for batch in images))
    )
    scenes = SegmentationData("wardrobe", batch_size=4, crop=64, scales=None, lengths=(16, 1, 1))
    network = {"backbone": "small", "num_classes": 7, "loops": 0, "output_stride": 4, "head_channels": 16}
    correction = SelfCorrection(start=1, cycle=1, warmup=0, refine_labels=False, write_labels=False)
    dropping = DropAndPick(None, 0.5, warmup=1, cycle=9)
    trainer(tmp_path, callbacks=[correction, dropping], max_epochs=4, limit_val_batches=0).fit(
        CCNetRecipe(network | {"auxiliary": False}), scenes
    )
    assert dropping.active_set is not None and dropping.active_set.sizes == [16, 16, 8, 4]
    assert seen == [16] * 4


def test_images_count_by_the_mean_of_their_labelled_pixels() -> None:
    network = {"backbone": "small", "num_classes": 3, "loops": 0, "output_stride": 4, "head_channels": 16}
    made = CCNetRecipe(network | {"auxiliary": False}).eval()
    images, labels = torch.randn(3, 3, 33, 33), torch.randint(0, 3, (3, 33, 33))
    labels[1, :20], labels[2] = 255, 255
    output = made.network(images)
    losses = made.item_losses(output, {"image": images, "label": labels})
    rows = labels[:, ::4, ::4]  # aligned corners: every fourth pixel
    for index in (0, 1):
        expected = nn.functional.cross_entropy(
            output.logits[index : index + 1], rows[index : index + 1], ignore_index=255
        )
        torch.testing.assert_close(losses[index], expected)
    assert losses[2] == 0


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda run: run({"max_steps": 10}), "give trainer.max_epochs, and no trainer.max_steps"),
        (lambda run: run({"max_epochs": 3, "limit_train_batches": 0.5}), "needs whole epochs"),
        (lambda run: run({"max_epochs": 3, "limit_train_batches": 1}), "needs whole epochs"),
        (lambda run: run({"max_epochs": 3, "fast_dev_run": True}), "needs whole epochs: leave .*fast_dev_run out"),
        (lambda run: run({"max_epochs": 3}, budget=0.3), "budget must be at least"),
        (lambda run: run({"max_epochs": 3, "val_check_interval": 5}), "val_check_interval must be at most 3"),
        (lambda run: run({"max_epochs": 3}, data={"drop_last": True}, min_active=4), "min_active must be 16 or more"),
    ],
)
def test_trainings_that_cannot_be_planned_are_refused(tmp_path: Path, make: Callable[..., None], reason: str) -> None:
    def run(options: dict[str, Any], data: Any = None, **of_callback: Any) -> None:
        callback = DropAndPick(**{"warmup": 1, "cycle": 3, "budget": 0.8, **of_callback})
        trainer(tmp_path, callbacks=[callback], **options).fit(recipe(), garments(**data or {}))

    with pytest.raises(MisconfigurationException, match=reason):
        make(run)


@pytest.mark.parametrize("options", [{"budget": 0.75}, {"budget": None, "fraction": 0.3}], ids=str)
def test_a_data_set_that_fills_no_batch_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    callback, data = DropAndPick(warmup=0, **options), garments(drop_last=True, lengths=(10, 10, 10))
    with pytest.raises(DataError, match="the train split has 10 items, fewer than one batch"):
        trainer(tmp_path, callbacks=[callback], max_epochs=2).fit(recipe(), data)


def test_classes_may_be_a_list() -> None:
    data = garments()
    dataset, batches = data.dataset("train"), data.training_batches(90)
    labels, callback = dataset.targets, DropAndPick(**CYCLES, class_floor=0.3)
    dataset.targets = labels.tolist()  # type: ignore[assignment]  # as torchvision's CIFAR10 has them
    chosen = callback._active_set(dataset, batches, 5, 0)
    assert chosen.labels is not None and torch.equal(chosen.labels, labels)


def test_recipes_and_data_that_tell_no_losses_are_refused(tmp_path: Path) -> None:
    points = PDMLRecipe({"backbone": "small", "num_classes": 6, "head_channels": 8, "output_stride": 4})
    scenes = SegmentationData(
        "wardrobe_points", points="instances", batch_size=4, crop=64, scales=None, lengths=(8, 1, 1)
    )
    with pytest.raises(DataError, match="this PDMLRecipe gives none"):
        trainer(tmp_path, callbacks=[DropAndPick()], max_epochs=2).fit(points, scenes)
    loader = DataLoader([{"image": torch.zeros(3, 28, 28), "label": 0}] * 8, 4)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the items of a ResumableData, got NoneType"):
        trainer(tmp_path, callbacks=[DropAndPick()], max_epochs=2).fit(recipe(), loader)
    segmentation = SegmentationData("wardrobe", batch_size=4, crop=64, scales=None, lengths=(8, 1, 1))
    ccnet = CCNetRecipe({"backbone": "small", "num_classes": 7, "loops": 0, "output_stride": 4, "head_channels": 16})
    callback = DropAndPick(class_floor=0.5, warmup=1)
    with pytest.raises(DataError, match="class_floor needs the class of every item, and CueScenes has none"):
        trainer(tmp_path, callbacks=[callback], max_epochs=2).fit(ccnet, segmentation)


@pytest.mark.parametrize(
    "options",
    [
        {"budget": None},
        {"budget": 0.5, "fraction": 0.5},
        {"budget": 1.5},
        {"budget": None, "fraction": -1.0},
        {"min_active": 0},
        {"warmup": -1},
        {"cycle": 0},
        {"basis": "all"},
        {"drop": "some"},
        {"rescale": "twice"},
    ],
    ids=str,
)
def test_options_outside_their_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^({'|'.join(options)})"):
        DropAndPick(**options)


# --- going on ---------------------------------------------------------------------------------------------------------


def test_any_state_goes_on_to_the_same_weights_sets_and_order(tmp_path: Path) -> None:
    class Keep(lightning.Callback):
        """A state after a batch in the middle of each epoch, at its validation, and at its end."""

        def keep(self, trainer: lightning.Trainer, moment: str) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}-{moment}.ckpt", weights_only=False)

        def on_train_batch_end(
            self, trainer: lightning.Trainer, pl_module: Any, o: Any, b: Any, batch_idx: int
        ) -> None:
            if batch_idx == 0:
                self.keep(trainer, "batch")

        def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
            self.keep(trainer, "validation")

        def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
            self.keep(trainer, "end")

    callback = DropAndPick(**CYCLES, smoothing=0.5)
    whole, seen = trained(tmp_path, [callback, Keep()], recipe={"power": 1.0})
    plain, _ = trained(tmp_path, [DropAndPick(**CYCLES, smoothing=0.5)], recipe={"power": 1.0})
    assert same(whole, plain)  # saving changes nothing
    assert callback.active_set is not None
    for moment in ("1-batch", "1-validation", "2-batch", "2-end", "3-batch", "3-end"):
        again, watch, made = DropAndPick(**CYCLES, smoothing=0.5), Watch(), recipe(learning_rate=0.05, power=1.0)
        run = trainer(tmp_path, callbacks=[again, watch], max_epochs=5)
        run.fit(made, garments(), ckpt_path=tmp_path / f"{moment}.ckpt", weights_only=True)
        assert same(whole, made), moment
        assert again.active_set is not None
        assert torch.equal(again.active_set.losses, callback.active_set.losses), moment
        assert again.active_set.sizes == callback.active_set.sizes, moment
        assert watch.rates[-1] == seen.rates[-1] and watch.items[-1] == seen.items[-1], moment
        assert watch.rates[1:] == seen.rates[len(seen.rates) - len(watch.rates) + 1 :], moment


def test_states_of_other_trainings_are_refused(tmp_path: Path) -> None:
    def fit(callbacks: list[Any], file: Path | None = None) -> lightning.Trainer:
        run = trainer(tmp_path, callbacks=callbacks, max_epochs=3, limit_val_batches=0)
        run.fit(recipe(), garments(), ckpt_path=file, weights_only=True if file else None)
        return run

    for name, callbacks in (("plain", []), ("dropping", [DropAndPick(None, 0.3, warmup=1)])):
        fit(callbacks).save_checkpoint(tmp_path / f"{name}.ckpt")
    with pytest.raises(CheckpointError, match="of a training without drop-and-pick"):
        fit([DropAndPick(None, 0.3, warmup=1)], tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match="of a training whose epochs left items out"):
        fit([], tmp_path / "dropping.ckpt")
    with pytest.raises(CheckpointError, match=r"fraction 0\.3, not 0\.4"):
        fit([DropAndPick(None, 0.4, warmup=1)], tmp_path / "dropping.ckpt")


class Die(lightning.Callback):
    """SIGKILL before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def one_of_two(rank: int, port: int, folder: str, fatal: int, go_on: bool) -> None:
    """One process of a training in two, which writes what it visited."""
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    callback, watch = DropAndPick(**CYCLES), Watch()
    kept = checkpoints(Path(folder), 2, "val_accuracy")
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "enable_checkpointing": True}
    run = trainer(Path(folder), callbacks=[callback, watch, Die(fatal), *kept], max_epochs=5, **options)
    made, data = recipe(learning_rate=0.05), garments(batch_size=8, lengths=(91, 11, 10))
    last = Path(folder) / "last.ckpt"
    run.fit(made, data, ckpt_path=last if go_on else None, weights_only=True if go_on else None)
    assert callback.active_set is not None
    seen = {"items": watch.items, "visits": callback.active_set.visits, "sizes": callback.active_set.sizes}
    accuracy = float(run.callback_metrics["val_accuracy"])
    (Path(folder) / f"{rank}.json").write_text(json.dumps(seen | {"accuracy": accuracy}))


def in_two_processes(folder: Path, fatal: int = -1, go_on: bool = False) -> list[int | None]:
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gingham.methods.dap.recipe", "gingham.methods.dap.data", "gingham.cli.records"])
    processes = [context.Process(target=one_of_two, args=(rank, port, str(folder), fatal, go_on)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(150)
    return [process.exitcode for process in processes]


@pytest.mark.slow
def test_two_processes_visit_what_is_planned_and_go_on_after_a_kill(tmp_path: Path) -> None:
    assert in_two_processes(tmp_path / "whole") == [0, 0]
    state = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)
    seen = [json.loads((tmp_path / "whole" / f"{rank}.json").read_text()) for rank in range(2)]
    schedule = Schedule(91, 5, warmup=1, cycle=3, min_active=16)
    planned = schedule.sizes(schedule.fraction_for(0.75))
    assert seen[0]["sizes"] == seen[1]["sizes"] == planned
    assert seen[0]["visits"] == seen[1]["visits"] == state["drop_and_pick"]["visits"] == sum(planned)
    for epoch, size in enumerate(planned):
        items = [index for one in seen for index in one["items"][epoch]]
        assert len(set(items)) == size and len(items) - size <= 1
        assert len(seen[0]["items"][epoch]) == len(seen[1]["items"][epoch])
    assert state["drop_and_pick"]["losses"].isfinite().all()
    assert seen[0]["accuracy"] == seen[1]["accuracy"]
    alone = recipe()
    alone.load_state_dict(state["state_dict"])
    (scores,) = trainer(tmp_path).validate(alone, garments(lengths=(91, 11, 10)), verbose=False)
    assert scores["val_accuracy"] == pytest.approx(seen[0]["accuracy"])

    step = -(-91 // 16) + 4  # in the second epoch, after a state in its middle
    assert in_two_processes(tmp_path / "killed", step) == [-signal.SIGKILL] * 2
    assert in_two_processes(tmp_path / "killed", go_on=True) == [0, 0]
    again = torch.load(tmp_path / "killed" / "last.ckpt", weights_only=True)
    for name, value in state["state_dict"].items():
        assert torch.equal(value, again["state_dict"][name]), name
    for name in ("losses", "active", "visited"):
        assert torch.equal(state["drop_and_pick"][name], again["drop_and_pick"][name]), name
    assert again["drop_and_pick"]["visits"] == sum(planned)


# --- learning ---------------------------------------------------------------------------------------------------------


def accuracy_of(arm: str, seed: int) -> float:
    """Of a small network on a toy of ten classes, trained fully, for fewer epochs, or with the easiest dropped."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(10, 1, 8, 8, generator=generator)
    labels = torch.arange(1600) % 10
    images = prototypes[labels] + 1.6 * torch.randn(1600, 1, 8, 8, generator=generator)
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 10)
    )
    epochs = 9 if arm == "shorter" else 12
    schedule = Schedule(600, epochs, warmup=2, cycle=5)
    chosen = ActiveSet(schedule, schedule.fraction_for(0.75) if arm == "dropping" else 0.0)
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    steps = 0
    sampler = SelectedBatches(chosen, 600, 50, seed, 0, 1, lambda: steps, drop_last=False)
    for epoch in range(epochs):
        for batch in list(sampler):
            indices = torch.tensor([index for _, index in batch])
            losses = nn.functional.cross_entropy(network(images[indices]), labels[indices], reduction="none")
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - epoch / epochs)
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
            chosen.record(indices, losses.detach())
            steps += 1
    assert arm != "dropping" or chosen.visits <= 0.75 * 600 * epochs
    network.eval()
    with torch.no_grad():
        return 100 * (network(images[600:]).argmax(1) == labels[600:]).float().mean().item()


def test_three_quarters_of_the_visits_learn_as_much() -> None:
    found = {arm: Tensor([accuracy_of(arm, seed) for seed in range(3)]) for arm in ("full", "shorter", "dropping")}
    assert found["full"].mean() > 80
    assert found["dropping"].mean() > found["full"].mean() - 1
    assert found["dropping"].mean() > found["shorter"].mean() - 1
