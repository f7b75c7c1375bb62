"""`gingham demo`, driven as a user does but in this process (its runs are processes of their own)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
import yaml

from gingham.cli import demo, main
from gingham.cli.demo import FULL, QUICK, SMOKE, Run
from gingham.cli.training import config_file

NAMES = [f"loops{loops}_seed{seed}" for seed in (0, 1) for loops in (0, 2)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a demo of two arms and two seeds."""
    folder = tmp_path_factory.mktemp("demo")
    assert main(["demo", "ccnet", "--smoke", "--seeds", "2", "--jobs", "1", "--out", str(folder)]) == 0
    return folder


def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return content


@pytest.mark.slow
def test_results_say_how_they_were_made(finished: Path) -> None:
    found = results(finished)
    assert found["command"] == f"gingham demo ccnet --smoke --seeds 2 --jobs 1 --out {finished}"
    assert {"gingham", "commit", "torch", "python", "cpu"} <= found["machine"].keys()
    assert found["commit"] == found["machine"]["commit"]
    for name in NAMES:
        assert found[name]["settings"]["model"]["network"]["loops"] == int(name[5])
        assert found[name]["settings"]["data"]["seed"] == int(name[-1])
        assert found[name]["scores"].keys() == {"trousers_iou", "miou", "seconds"}
    pairs = [
        found[f"loops2_seed{seed}"]["scores"]["trousers_iou"] - found[f"loops0_seed{seed}"]["scores"]["trousers_iou"]
        for seed in (0, 1)
    ]
    assert found["differences"]["R2-R0"]["by_seed"] == pytest.approx(pairs)
    text = (finished / "results.md").read_text()
    assert found["command"] in text
    assert found["commit"] in text
    assert "| R=2 |" in text


@pytest.mark.slow
def test_all_files_are_there_and_whole(finished: Path) -> None:
    assert (finished / "predictions.png").is_file()
    for loops in (0, 2):
        assert (finished / f"loops{loops}_seed0" / "curves.png").is_file()
    assert not list(finished.rglob(".part*"))


@pytest.mark.slow
def test_only_runs_of_the_same_settings_and_versions_are_kept(
    finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = results(finished)
    other_commit, other_settings = (finished / name / "result.json" for name in NAMES[:2])
    for file, part, name in ((other_commit, "versions", "commit"), (other_settings, "settings", "data")):
        content = json.loads(file.read_text())
        content[part][name] = "another"
        file.write_text(json.dumps(content))
    assert main(["demo", "ccnet", "--smoke", "--seeds", "2", "--jobs", "1", "--out", str(finished)]) == 0
    printed = capfd.readouterr().out
    trained = [line for line in printed.splitlines() if line.startswith("training")]
    assert trained == ["training R=0, seed 0", "training R=2, seed 0"]
    assert f"pictures: {finished / 'predictions.png'}" in printed
    after = results(finished)
    for name in NAMES[2:]:
        assert after[name] == before[name]
    for name in NAMES[:2]:  # the same seed gives the same scores
        assert after[name]["scores"]["miou"] == before[name]["scores"]["miou"]
        assert after[name]["settings"] == before[name]["settings"]


@pytest.mark.parametrize("length", [FULL, QUICK, SMOKE])
def test_all_but_length_loops_and_seed_is_the_packaged_configuration(length: demo.Length) -> None:
    config = yaml.safe_load(Path(config_file("ccnet_world")).read_text())
    settings = demo._settings(Run(loops=1, seed=3), length)
    assert settings["model"]["network"].pop("loops") == 1
    assert settings["data"].pop("seed") == 3
    assert settings["data"].pop("lengths", None) == (list(length.scenes) if length.scenes else None)
    expected = config["trainer"] | ({"max_epochs": length.epochs} if length.epochs else {})
    assert settings["trainer"] == expected
    config["model"]["init_args"]["network"].pop("loops")
    assert settings["model"] == config["model"]["init_args"]
    assert settings["data"] == config["data"]["init_args"]


def test_differences_are_paired_by_seed() -> None:
    iou = {0: (28.2, 26.8, 28.3, 29.9, 30.2), 1: (57.6, 54.9, 56.3, 56.5, 56.6), 2: (73.6, 74.6, 71.7, 73.4, 72.9)}
    scores = {Run(arm, seed): {"trousers_iou": x} for arm, row in iou.items() for seed, x in enumerate(row)}
    found = demo._differences(scores)
    assert found["R1-R0"]["by_seed"] == pytest.approx([29.4, 28.1, 28.0, 26.6, 26.4])
    assert found["R1-R0"]["interval_95"] == pytest.approx([26.2, 29.2], abs=0.05)
    assert found["R2-R1"]["median"] == pytest.approx(16.3, abs=0.05)


def test_one_seed_has_no_interval() -> None:
    scores = {Run(0, 0): {"trousers_iou": 20.0}, Run(2, 0): {"trousers_iou": 50.0}}
    assert demo._differences(scores)["R2-R0"] == {
        "by_seed": [30.0],
        "mean": 30.0,
        "median": 30.0,
        "interval_95": None,
    }


def test_a_file_that_is_not_written_to_its_end_does_not_appear(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    torch.save(1, file)

    def write() -> None:
        with demo._whole(file) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert torch.load(file) == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["moon"], "no demo of 'moon'"),
        (["--arms", "-1"], "--arms must be different numbers, 0 or more, got -1"),
        (["--arms", "2", "0", "2"], "--arms must be different numbers, 0 or more, got 2 0 2"),
        (["--seeds", "0"], "--seeds must be 1 or more"),
        (["--jobs", "0"], "--jobs must be 1 or more"),
        (["--out", "file"], "--out file: file is a file"),
    ],
)
def test_options_that_make_no_sense_are_one_line(
    words: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["demo", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gingham: error: ")
    assert reason in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]
