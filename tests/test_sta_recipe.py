"""STA's recipe under Lightning's trainer: losses, schedule, clips of evaluation, what is watched, continuing, files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

pytest.importorskip("lightning", reason="training needs the extra: pip install gingham[train]")
import lightning

from gingham.cli import main
from gingham.cli.options import config_file, instantiate
from gingham.data.wardrobe import write_mars
from gingham.errors import DataError
from gingham.methods.reid_data import PersonData, TrackletData, collate_sightings
from gingham.methods.sta.objective import occluded_attention, score_entropy
from gingham.methods.sta.recipe import STARecipe
from trainings import trainer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

NETWORK: dict[str, Any] = {
    "backbone": "small",
    "num_persons": 9,
    "output_stride": 4,
    "embedding_channels": 8,
    "backbone_options": {"widths": [8, 8]},
}


def recipe(network: dict[str, Any] | None = None, **options: Any) -> STARecipe:
    torch.manual_seed(0)
    return STARecipe(NETWORK | (network or {}), **{"learning_rate": 0.01} | options)


def data(**options: Any) -> TrackletData:
    given: dict[str, Any] = {
        "persons_per_batch": 3,
        "items_per_person": 2,
        "size": (64, 32),
        "lengths": (7, 4, 5),
        "frames": 2,
        "tracklet_frames": 5,
        "evaluation_batch_size": 4,
    }
    return TrackletData(**given | options)


# ------------------------------------------------------------------------------------------------ training


def test_a_training_logs_its_losses_its_scores_and_what_attention_does(tmp_path: Path) -> None:
    made = recipe(rerank={"k1": 3, "k2": 2, "lambda_value": 0.3})
    run = trainer(tmp_path, max_epochs=1)
    run.fit(made, data())
    logged = set(run.callback_metrics)
    assert {"loss", "loss_identity", "loss_triplet", "regularization", "entropy"} <= logged
    ranks = {f"rank{rank}" for rank in (1, 5, 10, 20)} | {"map", "minp"}
    expected = {f"val_{name}" for name in ranks} | {f"val_reranked_{name}" for name in ranks}
    assert expected | {"val_queries", "val_entropy", "val_occluded_attention"} <= logged
    (tested,) = run.test(made, data(), verbose=False)
    assert tested["test_queries"] == 10 and 0 < tested["test_map"] <= 1


def test_the_loss_is_the_weighed_sum_of_its_parts(tmp_path: Path) -> None:
    made = recipe(identity_weight=0.5, triplet_weight=3.0, regularization=10.0, pairs="all")
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(made, data())
    found = {name: float(value) for name, value in run.callback_metrics.items()}
    parts = 0.5 * found["loss_identity"] + 3 * found["loss_triplet"] + 10 * found["regularization"]
    assert found["loss"] == pytest.approx(parts, rel=1e-6) and found["regularization"] > 0
    (batch,) = [next(iter(data().train_dataloader()))]
    output = recipe().network.train()(batch["frames"])
    differences = (output.attention[:, 0] - output.attention[:, 1]).flatten(1).norm(dim=1)
    assert found["regularization"] == pytest.approx(differences.mean().item(), rel=1e-4)


def test_adam_and_the_three_steps_of_the_learning_rate(tmp_path: Path) -> None:
    rates = []

    class Rates(lightning.Callback):
        def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    made = recipe(learning_rate=3e-4)
    run = trainer(tmp_path, max_epochs=4, limit_val_batches=0, callbacks=[Rates()])
    run.fit(made, data())
    (optimizer,) = run.optimizers
    assert type(optimizer) is torch.optim.Adam
    (group,) = optimizer.param_groups
    assert (group["weight_decay"], group["betas"]) == (5e-4, (0.9, 0.999))
    assert rates == pytest.approx([3e-4] + [3e-5] * 2 + [3e-6] * 2 + [3e-7] * 3, rel=1e-6)  # of the steps that follow
    assert [made.rate_factor(step, 8) for step in range(8)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3])


def test_training_repeats_itself_and_is_continued_to_the_bit(tmp_path: Path) -> None:
    class Save(lightning.Callback):
        def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "third.ckpt")

    states = []
    for checkpoint in (None, None, tmp_path / "third.ckpt"):
        made = recipe()  # the pairs that are regularised are drawn at random
        callbacks = [] if states else [Save()]
        trainer(tmp_path, max_epochs=3, limit_val_batches=0, callbacks=callbacks).fit(
            made, data(), ckpt_path=checkpoint, weights_only=True
        )
        states.append(made.state_dict())
    for other in states[1:]:
        assert all(torch.equal(value, other[name]) for name, value in states[0].items())
    assert not torch.equal(states[0]["network.classifier.weight"], recipe().network.classifier.weight)


@pytest.mark.slow
def test_persons_are_found_again_after_training(tmp_path: Path) -> None:
    network = {"num_persons": 24, "embedding_channels": 32, "backbone_options": {"widths": [12, 16]}}
    made = recipe(network, milestones=(0.7,))
    source = data(lengths=(24, 4, 24), persons_per_batch=6, items_per_person=4, occlusion=0.0)
    run = trainer(tmp_path, max_epochs=25, limit_val_batches=0)
    (before,) = run.test(made, source, verbose=False)
    run.fit(made, source)
    (after,) = run.test(made, source, verbose=False)
    assert after["test_map"] > before["test_map"] + 0.1, (before, after)


# ------------------------------------------------------------------------------------------------ evaluation


def batch_of(source: TrackletData, count: int = 6) -> dict[str, Any]:
    dataset = source.dataset("test")
    return collate_sightings([dataset[index] for index in range(count)])


@pytest.mark.parametrize("attention", ["both", "none"])
def test_a_tracklets_feature_is_the_mean_over_its_clips_however_they_are_chosen(attention: str) -> None:
    made = recipe({"attention": attention}, regularization=0.0, frames_at_once=4).eval()
    features = {}
    for sample, shape in (("dense", (3, 2)), ("evenly", (1, 2)), ("all", (1, 5))):
        batch = batch_of(data(test_sample=sample))
        assert batch["clips"][0].shape[:2] == shape
        with torch.no_grad():
            features[sample] = made.features(batch)
            expected = torch.stack([made.network(clips).features.mean(dim=0) for clips in batch["clips"]])
        torch.testing.assert_close(features[sample], expected)
    assert not torch.allclose(features["dense"], features["evenly"])
    assert not torch.allclose(features["dense"], features["all"])


def test_what_is_watched_is_of_every_clip_mirrored_or_not(tmp_path: Path) -> None:
    source = data(lengths=(7, 4, 3), evaluation_batch_size=3)
    made, run = recipe(flip_test=True, clips_at_once=4), trainer(tmp_path)
    (found,) = run.test(made, source, verbose=False)
    made.eval()
    batch = batch_of(source, len(source.dataset("test")))
    with torch.no_grad():
        scores = made.network(torch.cat(batch["clips"])).scores
    hidden = occluded_attention(scores, torch.cat(batch["occluded"])).mean()
    assert found["test_occluded_attention"] == pytest.approx(hidden.item(), abs=1e-5)
    assert found["test_entropy"] == pytest.approx(score_entropy(scores).item(), abs=1e-5)
    assert 0.05 < hidden < 0.6
    mean = recipe({"attention": "none"}, regularization=0.0)
    (even,) = run.test(mean, source, verbose=False)
    assert even["test_entropy"] == pytest.approx(1)
    assert even["test_occluded_attention"] == pytest.approx(torch.cat(batch["occluded"]).float().mean().item())


def test_nothing_hidden_leaves_no_attention_there(tmp_path: Path) -> None:
    (found,) = trainer(tmp_path).test(recipe(), data(occlusion=0.0), verbose=False)
    assert found["test_occluded_attention"] == 0


def test_one_state_serves_clips_of_any_length(tmp_path: Path) -> None:
    made, run = recipe(), trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    run.fit(made, data(frames=2))
    scores = [run.test(made, data(frames=frames), verbose=False)[0]["test_map"] for frames in (1, 3, 5)]
    assert all(0 < score <= 1 for score in scores) and len(set(scores)) > 1


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "options",
    [
        {"identity_weight": -1.0},
        {"triplet_weight": -1.0},
        {"regularization": -1.0},
        {"pairs": "some"},
        {"margin": -0.1},
        {"margin": "hard"},
        {"label_smoothing": 1.0},
        {"milestones": (0.5, 0.25)},
        {"frames_at_once": 0},
        {"optimizer": "lion"},
    ],
    ids=str,
)
def test_options_outside_their_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        recipe(**options)


def test_triplets_can_be_left_out(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(recipe(triplet_weight=0.0), data(persons_per_batch=1))
    logged = run.callback_metrics
    assert "loss_triplet" not in logged
    torch.testing.assert_close(logged["loss"], logged["loss_identity"] + 1.0 * logged["regularization"])


def test_what_does_not_fit_together_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="regularization must be 0 for a network without attention"):
        recipe({"attention": "none"})
    run = trainer(tmp_path, max_steps=1)
    with pytest.raises(DataError, match=r"take gingham\.methods\.reid_data\.TrackletData"):
        run.fit(recipe(), PersonData(size=(64, 32), lengths=(16, 2, 2)))
    with pytest.raises(DataError, match="the network has num_persons 5, the training set has 7"):
        run.fit(recipe({"num_persons": 5}), data())
    for options in ({"persons_per_batch": 1}, {"items_per_person": 1}):
        with pytest.raises(DataError, match=rf"triplets need two .*data\.{next(iter(options))} (is )?1"):
            run.fit(recipe(), data(**options))


# ------------------------------------------------------------------------------------------------ files and processes


def test_training_from_marss_files_gives_the_numbers_of_training_from_memory(tmp_path: Path) -> None:
    memory = data()
    write_mars(tmp_path, [memory.opened(split) for split in memory.splits()])
    files = data(name="mars", root=str(tmp_path), validation_persons=memory.lengths["val"], complete=False)
    found: list[tuple[dict[str, float], Any, dict[str, Tensor]]] = []
    watched = ("val_occluded_attention", "test_occluded_attention")  # files do not know what is hidden
    for source in (memory, files):
        made, run = recipe(), trainer(tmp_path, max_epochs=2)
        run.fit(made, source)
        logged = {name: float(value) for name, value in run.callback_metrics.items() if name not in watched}
        (tested,) = run.test(made, source, verbose=False)
        tested = {name: value for name, value in tested.items() if name not in watched}
        weights = made.network.state_dict()
        found.append((logged, tested, weights))
    assert found[0][:2] == found[1][:2] and found[0][1]["test_map"] > 0
    assert all(torch.equal(value, found[1][2][name]) for name, value in found[0][2].items())


def test_the_official_protocol_keeps_queries_in_the_gallery(tmp_path: Path) -> None:
    memory = data(tracklets=2)
    write_mars(tmp_path, [memory.opened(split) for split in memory.splits()])
    options: dict[str, Any] = {"name": "mars", "root": str(tmp_path), "validation_persons": 4, "complete": False}
    for protocol, gallery in (("torchreid", 10), ("official", 20)):
        source = data(protocol=protocol, **options)
        assert source.describe("test").startswith(f"mars: 10 queries of 5 persons, {gallery} in the gallery")
        (tested,) = trainer(tmp_path).test(recipe(), source, verbose=False)
        assert tested["test_queries"] == 10


@pytest.mark.parametrize("name", ["sta_mars", "sta_dukemtmc_videoreid", "sta_world"])
def test_packaged_configurations_are_what_the_recipe_takes(name: str) -> None:
    content = yaml.safe_load(Path(config_file(name)).read_text())
    content["model"]["init_args"]["network"] |= {"backbone": "small", "backbone_options": {"widths": [8, 8, 8, 8]}}
    content["model"]["init_args"]["network"] |= {"output_stride": 4, "backbone_weights": None}
    parts = instantiate(content, source=name)
    assert isinstance(parts.model, STARecipe) and isinstance(parts.data, TrackletData)
    persons = {"sta_mars": 625, "sta_dukemtmc_videoreid": 702, "sta_world": parts.data.lengths["train"]}[name]
    assert parts.model.network.classifier.out_features == persons
    if name != "sta_world":
        assert parts.data.augment.size == (256, 128) and parts.data.frames == 4
        assert parts.model.optimizer == "adam" and parts.model.learning_rate == 3e-4


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the world's configuration, made short."""
    folder = tmp_path_factory.mktemp("sta")
    content = yaml.safe_load(Path(config_file("sta_world")).read_text())
    content["data"]["init_args"] |= {"lengths": [8, 3, 4], "persons_per_batch": 4, "items_per_person": 2}
    content["trainer"] |= {
        "max_epochs": 1,
        "check_val_every_n_epoch": 1,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    content["run_dir"] = str(folder / "run")
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    assert main(["fit", f"--config={folder / 'config.yaml'}"]) == 0
    return folder / "run"


def test_a_run_leaves_galleries_and_the_command_tests_it(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (run_folder / "tensorboard" / "predictions.png").is_file() and (
        run_folder / "checkpoints" / "best.ckpt"
    ).is_file()
    assert main(["test", f"--config={run_folder / 'config.yaml'}", "--ckpt_path=last"]) == 0
    report = json.loads((run_folder / "test.json").read_text())
    assert report["test_queries"] == 8
    assert "8 queries of 4 persons" in report["protocol"] and "clips dense of 4 frames" in report["protocol"]
    assert report["protocol"] in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(run_folder: Path) -> None:
    words = ["validate", f"--config={run_folder / 'config.yaml'}", "--ckpt_path=last", "--data.lengths=[8,3,4]"]
    assert main(words) == 0
    report = run_folder / "validate.json"
    alone = json.loads(report.read_text())
    report.unlink()
    command = [sys.executable, "-m", "gingham.cli", *words, "--trainer.devices=2", "--trainer.strategy=ddp"]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    together = json.loads(report.read_text())
    assert together.keys() == alone.keys()
    for name, value in alone.items():
        exact = isinstance(value, str | list)
        assert together[name] == (value if exact else pytest.approx(value, rel=1e-4, abs=1e-6))
