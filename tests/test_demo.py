"""`gingham demo`, driven as a user does but in this process (its runs are processes of their own)."""

import json
from pathlib import Path

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


def test_all_files_are_there_and_whole(finished: Path) -> None:
    assert (finished / "predictions.png").is_file()
    for loops in (0, 2):
        assert (finished / f"loops{loops}_seed0" / "curves.png").is_file()
    assert not list(finished.rglob(".part*"))


def test_only_runs_of_the_same_settings_and_versions_are_kept(
    finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {name: json.loads((finished / name / "result.json").read_text()) for name in NAMES}
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
    after = {name: json.loads((finished / name / "result.json").read_text()) for name in NAMES}
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
