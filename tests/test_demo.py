"""`gingham demo`, driven as a user does but in this process (its runs are processes of their own)."""

import json
import math
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
import yaml
from PIL import Image

from gingham.cli import demo, main
from gingham.cli.demo import Run
from gingham.cli.demo_overview import headline, table
from gingham.cli.demos import DEMOS, Comparison, Demo, Length, Score
from gingham.cli.options import config_file, instantiate

NAMES = [f"r-{loops}_seed{seed}" for seed in (0, 1) for loops in (0, 2)]


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
        assert found[name]["settings"]["model"]["init_args"]["network"]["loops"] == int(name[2])
        assert found[name]["settings"]["data"]["init_args"]["seed"] == int(name[-1])
        assert found[name]["scores"].keys() == {"trousers-IoU", "mIoU", "seconds"}
    pairs = [
        found[f"r-2_seed{seed}"]["scores"]["trousers-IoU"] - found[f"r-0_seed{seed}"]["scores"]["trousers-IoU"]
        for seed in (0, 1)
    ]
    assert found["differences"]["R=2 - R=0"]["by_seed"] == pytest.approx(pairs)
    text = (finished / "results.md").read_text()
    assert found["command"] in text
    assert found["commit"] in text
    assert "| R=2 |" in text


@pytest.mark.slow
def test_all_files_are_there_and_whole(finished: Path) -> None:
    assert (finished / "predictions.png").is_file()
    for loops in (0, 2):
        assert (finished / f"r-{loops}_seed0" / "curves.png").is_file()
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
        assert after[name]["scores"]["mIoU"] == before[name]["scores"]["mIoU"]
        assert after[name]["settings"] == before[name]["settings"]


@pytest.mark.slow
def test_all_demos_go_on_after_an_interruption_and_end_in_one_table(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["demo", "--all", "--smoke", "--jobs", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(demo, "DEMOS", {name: DEMOS[name] for name in ("ccnet", "sgone")})
    shutil.copytree(finished, tmp_path / "ccnet")
    train_all = demo._train_all

    def until_sgone(method: str, *arguments: Any) -> Any:
        if method == "sgone":
            raise KeyboardInterrupt
        return train_all(method, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(demo, "_train_all", until_sgone)
        assert main(words) != 0
    assert "so far 1 of 2 demos" in (tmp_path / "results.md").read_text()
    assert list(results(tmp_path)["demos"]) == ["ccnet"]

    capfd.readouterr()
    assert main(words) == 0
    printed = capfd.readouterr().out
    trained = [line for line in printed.splitlines() if line.startswith("training")]
    assert trained == ["training global pooling, seed 0", "training masked pooling, seed 0"]
    found = results(tmp_path)
    assert found["command"] == f"gingham demo --all --smoke --jobs 1 --out {tmp_path}"
    assert found["commit"] == found["machine"]["commit"]
    of_sgone = results(tmp_path / "sgone")
    for key, arm in (("baseline_result", "global-pooling"), ("result", "masked-pooling")):
        assert found["demos"]["sgone"][key] == of_sgone[f"{arm}_seed0"]["scores"]["IoU of novel classes"]
    assert found["demos"]["ccnet"]["difference"] == results(tmp_path / "ccnet")["differences"]["R=2 - R=0"]
    text = (tmp_path / "results.md").read_text()
    assert "so far" not in text
    assert text in printed
    for name in ("ccnet", "sgone"):
        assert f"| [{name}]({name}/results.md) |" in text
        assert (tmp_path / name / "results.md").is_file()


def test_all_demos_train_what_their_table_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = {}

    def scores(method: str, runs: dict[Run, Any], *_: Any) -> dict[Run, dict[str, float]]:
        trained[method] = list(dict.fromkeys(run.arm for run in runs))
        found = {score.title: 50.0 for score in DEMOS[method].scores}
        return {run: {**found, "seconds": 1.0} for run in runs}

    monkeypatch.setattr(demo, "_train_all", scores)
    monkeypatch.setattr(demo, "_course", lambda *_: [])
    monkeypatch.setattr(demo, "_pictures", lambda *_: None)
    assert main(["demo", "--all", "--seeds", "2", "--out", str(tmp_path)]) == 0
    assert list(trained) == list(DEMOS) == list(results(tmp_path)["demos"])
    assert trained["schp"] == ["base", "both", "clean labels"] and trained["sgone_categories"] == ["masked pooling"]
    for method, arms in trained.items():
        first = DEMOS[method].comparisons[0]
        assert set(arms) == {first.arm, first.baseline, *DEMOS[method].bounds}, method


@pytest.mark.parametrize("method", DEMOS)
@pytest.mark.parametrize("kind", ["full", "quick", "smoke"])
def test_arms_differ_from_the_packaged_configuration_in_what_they_say_only(method: str, kind: str) -> None:
    chosen = DEMOS[method]
    length = {"full": Length(), "quick": chosen.quick, "smoke": chosen.smoke}[kind]
    config = yaml.safe_load(Path(config_file(chosen.config)).read_text())
    for arm, changes in chosen.arms.items():
        settings = demo._settings(chosen, Run(arm, 3), length)
        assert settings["data"]["init_args"]["seed"] == 3
        expected = {name: deepcopy(config[name]) for name in ("model", "data", "trainer")}
        lengths = {"data.init_args.lengths": list(length.lengths)} if length.lengths else {}
        for path, value in {**length.options, **changes, **lengths, "data.init_args.seed": 3}.items():
            *parents, last = path.split(".")
            entry: Any = expected
            for parent in parents:
                entry = entry[int(parent) if isinstance(entry, list) else parent]
            entry[last] = value
        assert settings == expected
        instantiate(settings, source=chosen.config)
        assert settings == expected


@pytest.mark.parametrize("method", DEMOS)
def test_every_claim_is_about_arms_that_exist(method: str) -> None:
    chosen = DEMOS[method]
    named = {arm for comparison in chosen.comparisons for arm in (comparison.arm, comparison.baseline)}
    assert named | set(chosen.bounds) | {*chosen.quick.arms, *chosen.smoke.arms} <= set(chosen.arms)
    assert {comparison.score for comparison in chosen.comparisons} <= {None, *(score.title for score in chosen.scores)}
    assert len({comparison.name for comparison in chosen.comparisons}) == len(chosen.comparisons)
    assert any(comparison.floor is not None for comparison in chosen.comparisons)
    for length in (Length(), chosen.quick, chosen.smoke):
        arms = length.arms or tuple(chosen.arms)
        assert any({comparison.arm, comparison.baseline} <= {*arms} for comparison in chosen.comparisons)


def test_differences_are_paired_by_seed() -> None:
    iou = {0: (28.2, 26.8, 28.3, 29.9, 30.2), 1: (57.6, 54.9, 56.3, 56.5, 56.6), 2: (73.6, 74.6, 71.7, 73.4, 72.9)}
    scores = {Run(f"R={arm}", seed): {"trousers-IoU": x} for arm, row in iou.items() for seed, x in enumerate(row)}
    found = demo._differences(DEMOS["ccnet"], scores)
    assert found["R=1 - R=0"]["by_seed"] == pytest.approx([29.4, 28.1, 28.0, 26.6, 26.4])
    assert found["R=1 - R=0"]["interval_95"] == pytest.approx([26.2, 29.2], abs=0.05)
    assert found["R=2 - R=1"]["median"] == pytest.approx(16.3, abs=0.05)


def test_a_score_can_be_compared_with_another_of_the_same_run() -> None:
    values = {"IoU of novel classes": 60.0, "all foreground": 10.0, "FB-IoU": 70.0}
    scores = {Run("masked pooling", seed): {**values, "all foreground": 10.0 + seed} for seed in range(2)}
    found = demo._differences(DEMOS["sgone"], scores)
    assert found["masked pooling - all foreground"]["by_seed"] == [50.0, 49.0]
    assert list(found) == ["masked pooling - all foreground"]


def test_the_heading_says_which_arms_train_longer() -> None:
    arms = {"full": 8, "shorter": 6, "DaP": 8}
    runs = {Run(arm, seed): {"trainer": {"max_epochs": epochs}} for seed in (0, 1) for arm, epochs in arms.items()}
    assert demo._epochs(runs) == "8 epochs (shorter: 6)"
    assert demo._epochs({run: settings for run, settings in runs.items() if run.arm != "shorter"}) == "8 epochs"


def test_one_seed_has_no_interval() -> None:
    scores = {Run("R=0", 0): {"trousers-IoU": 20.0}, Run("R=2", 0): {"trousers-IoU": 50.0}}
    assert demo._differences(DEMOS["ccnet"], scores)["R=2 - R=0"] == {
        "by_seed": [30.0],
        "mean": 30.0,
        "median": 30.0,
        "interval_95": None,
    }


@pytest.mark.parametrize(
    ("pairs", "verdict"),
    [([9.0, 8.5, 9.5], "shown"), ([7.0, 7.5, 7.0], "NOT shown"), ([40.0, -10.0, 20.0], "NOT shown")],
)
def test_a_claim_is_shown_above_its_floor_and_clear_of_zero(pairs: list[float], verdict: str) -> None:
    scores = {Run("R=0", seed): {"trousers-IoU": 20.0} for seed in range(3)}
    scores |= {Run("R=1", seed): {"trousers-IoU": 20.0 + pair} for seed, pair in enumerate(pairs)}
    line, *others = demo._comparison_lines(DEMOS["ccnet"], demo._differences(DEMOS["ccnet"], scores))
    assert line.endswith(f"; at least +8.0 claimed: {verdict}")
    assert others == ["", demo.SHOWN]


ERRORS = Demo(
    title="two arms",
    config="ccnet_world",
    arms={"with": {}, "without": {}},
    scores=(Score("hits", "hits"), Score("errors", "errors", 1.0, lower_is_better=True)),
    comparisons=(
        Comparison("with", "without", floor=2.0),
        Comparison("with", "without", floor=-15.0, score="errors", relative=True),
    ),
    smoke=Length(),
)


@pytest.mark.parametrize(
    ("errors", "verdict"),
    [([80.0, 40.0, 160.0], "shown"), ([88.0, 44.0, 177.0], "NOT shown"), ([120.0, 60.0, 240.0], "NOT shown")],
)
def test_a_score_that_is_to_fall_has_a_claim_of_its_own(errors: list[float], verdict: str) -> None:
    scores = {Run("without", seed): {"hits": 50.0, "errors": x} for seed, x in enumerate((100.0, 50.0, 200.0))}
    scores |= {Run("with", seed): {"hits": 53.0 + seed / 10, "errors": x} for seed, x in enumerate(errors)}
    found = demo._differences(ERRORS, scores)
    assert found["with - without, errors, %"]["by_seed"][0] == errors[0] - 100
    first, second, *_ = demo._comparison_lines(ERRORS, found)
    assert first.startswith("with - without: +3.0 +3.1 +3.2;")
    assert first.endswith("; at least +2.0 claimed: shown")
    assert second.startswith(f"with - without, errors, %: {errors[0] - 100:+.1f} ")
    assert second.endswith(f"; at most -15.0 % claimed: {verdict}")


def test_a_headline_is_the_first_comparison_whose_arms_were_trained() -> None:
    chosen = DEMOS["schp"]
    scores = {
        Run(arm, seed): {"mIoU": mean + seed * step, "boundary IoU": 0.0, "accuracy": 0.0, "seconds": 60.0}
        for seed in (0, 1, 2)
        for arm, mean, step in (("base", 50.0, 1.0), ("schedule only", 51.0, 1.0), ("both", 55.0, 1.1))
    }
    bound = {Run("clean labels", seed): {**scores[Run("base", seed)], "mIoU": 83.14} for seed in (0, 1, 2)}

    def told(runs: dict[Run, dict[str, float]]) -> list[str]:
        by_arm = [(run.arm, values) for run, values in runs.items()]
        (row,) = table({"schp": headline(chosen, by_arm, demo._differences(chosen, runs))})[2:]
        return row.strip("| ").split(" | ")

    all_arms = told(scores | bound)
    assert all_arms[:6] == ["[schp](schp/results.md)", "mIoU", "base", "51.0", "both", "56.1"]
    assert all_arms[6:] == ["+5.1", "+4.9 to +5.3", "at least +1.5: shown", "83.1", "12.0"]
    without_base = told({run: values for run, values in scores.items() if run.arm != "base"})
    assert without_base[2:] == ["schedule only", "52.0", "both", "56.1", "+4.1", "+3.9 to +4.3", "-", "-", "6.0"]
    one_seed = told({run: values for run, values in scores.items() if run.seed == 0})
    assert one_seed[6:] == ["+5.0", "-", "at least +1.5", "-", "3.0"]


def test_a_headline_tells_what_a_claim_is_about() -> None:
    scores = {Run("masked pooling", seed): {"IoU of novel classes": 60.0 + seed, "seconds": 0.0} for seed in range(3)}
    for values in scores.values():
        values["all foreground"] = 61.0
    chosen = DEMOS["sgone_categories"]
    found = headline(chosen, [(run.arm, x) for run, x in scores.items()], demo._differences(chosen, scores))
    assert found.cells()[1:8] == [
        "all foreground",
        "61.0",
        "masked pooling",
        "61.0",
        "+0.0",
        "-2.5 to +2.5",
        "at least +0.0: NOT shown",
    ]
    assert found.record()["shown"] is False
    errors = {Run("without", seed): {"errors": 100.0 + seed, "seconds": 0.0} for seed in range(3)}
    errors |= {Run("with", seed): {"errors": 80.0 + seed, "seconds": 0.0} for seed in range(3)}
    falling = replace(ERRORS, comparisons=ERRORS.comparisons[1:])
    found = headline(falling, [(run.arm, x) for run, x in errors.items()], demo._differences(falling, errors))
    assert found.cells()[5:8] == ["-19.8 %", "-20.3 to -19.3 %", "at most -15.0 %: shown"]


@pytest.mark.parametrize(
    ("pairs", "shown"), [([-0.1, -0.2, 0.0], True), ([-0.1, -1.0, 0.4], False), ([-0.6, -0.61, -0.59], False)]
)
def test_a_floor_below_zero_allows_a_loss_that_the_interval_is_clear_of(pairs: list[float], shown: bool) -> None:
    scores = {Run("full", seed): {"accuracy": 100.0} for seed in range(3)}
    scores |= {Run("DaP", seed): {"accuracy": 100.0 + pair} for seed, pair in enumerate(pairs)}
    comparison = next(one for one in DEMOS["dap"].comparisons if one.baseline == "full")
    assert comparison.floor == -0.5 and comparison.relative
    assert comparison.shown_by(demo._differences(DEMOS["dap"], scores)[comparison.name], falls=False) is shown


def test_a_score_is_told_to_its_own_decimals() -> None:
    chosen = DEMOS["pdml"]
    first = {"mIoU": 30.0, "purity": 58.0, "distance ratio": 1.31, "seconds": 9.0}
    scores = {Run("points", 0): first, Run("metric and extension", 0): first | {"distance ratio": 1.524}}
    assert demo._table(chosen, scores)[2:] == [
        "| points | 30.0 | 30.0 | - | 58.0 | 1.31 | 9 |",
        "| metric and extension | 30.0 | 30.0 | - | 58.0 | 1.52 | 9 |",
    ]
    claim = Comparison("metric and extension", "points", score="distance ratio")
    ratio = replace(chosen, comparisons=(claim,))
    (line,) = demo._comparison_lines(ratio, demo._differences(ratio, scores))
    assert line == "metric and extension - points, distance ratio: +0.21; mean +0.21, median +0.21"


def test_a_baseline_of_zero_has_no_relative_difference() -> None:
    scores = {Run("without", 0): {"hits": 1.0, "errors": 0.0}, Run("with", 0): {"hits": 1.0, "errors": 1.0}}
    assert math.isnan(demo._differences(ERRORS, scores)["with - without, errors, %"]["mean"])


def test_the_galleries_of_all_arms_are_one_picture(tmp_path: Path) -> None:
    arms = {"average": "red", "STA": "blue"}
    for arm, colour in arms.items():
        folder = tmp_path / Run(arm, 0).name
        (folder / "log").mkdir(parents=True)
        (folder / "log" / "metrics.csv").write_text("step,epoch,loss,val_map\n1,0,2.0,\n1,0,,0.5\n")
        noise = Image.effect_noise((60, 40), 90)  # thousands of colours
        sheet = Image.merge("RGB", (noise, noise.rotate(180), noise.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
        sheet.paste(colour, (20, 10, 40, 30))
        sheet.save(folder / "galleries.png")
    demo._pictures(list(arms), {Run(arm, 0): {} for arm in arms}, tmp_path)
    with Image.open(tmp_path / "predictions.png") as sheet:
        assert sheet.size == (60, 2 * (40 + 28)) and sheet.mode == "P"
        colours = sheet.convert("RGB")
        assert colours.getpixel((30, 50)) == (255, 0, 0) and colours.getpixel((30, 118)) == (0, 0, 255)


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
        (["--arms", "R=7"], "--arms must be different names of R=0, R=1, R=2, got R=7"),
        (["--arms", "R=2", "R=0", "R=2"], "--arms must be different names of R=0, R=1, R=2, got R=2 R=0 R=2"),
        (["ccnet", "--all"], "--all runs every method: leave out ccnet"),
        (["--all", "--arms", "R=2"], "--all runs every method: leave out --arms"),
        (["--seeds", "0"], "--seeds must be 1 or more"),
        (["--jobs", "0"], "--jobs must be 1 or more"),
        (["--out", "file"], "--out file: file is a file"),
        (["--all", "--out", "file"], "--out file: file is a file"),
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
