"""The gingham command, as a user runs it."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("lightning")
from PIL import Image

from gingham._library import native
from gingham.cli import main
from gingham.cli.options import config_file, packaged_configs
from gingham.data import CueScenes
from gingham.data.wardrobe import write_cityscapes

TINY = [
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.log_every_n_steps=1",
    "--data.lengths=[48,8,8]",
    "--data.batch_size=8",
    "--model.network.dropout=0.1",
]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "gingham.cli", *words]


def gingham(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command(*words), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("run")
    done = gingham("fit", "--config", "ccnet_world", *TINY, "--trainer.max_epochs=2", f"--run_dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return state


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "csv" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that the command ends with."""
    capsys.readouterr()
    assert main(words) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    *_, last = errors.strip().splitlines()
    assert last.startswith("gingham: error: ")
    assert len(last) < 600
    return last.removeprefix("gingham: error: ")


def test_help_imports_neither_torch_nor_lightning() -> None:
    script = """
import sys
from gingham.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
assert not {"torch", "lightning"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "predict" in done.stdout


def test_info_says_what_is_built_and_in_use() -> None:
    done = gingham("info")
    assert done.returncode == 0
    for name in ("version", "git commit", "compiler", "instruction set", "cuda architectures", "torch operators"):
        assert name in done.stdout


def test_an_instruction_set_that_is_not_there_is_one_line_that_lists_those_that_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    available = native().available_instruction_sets()
    absent = [name for name in ("avx2", "avx512", "avx512_bf16", "amx") if name not in available]
    for name in ("avx-2", *absent[:1]):
        monkeypatch.setenv("GINGHAM_CPU", name)
        done = gingham("info")
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(rf"gingham: error: GINGHAM_CPU={name}: .*\n", done.stderr)
        assert done.stderr.endswith(f"; available on this machine: {', '.join(available)}\n")


def test_an_unknown_config_lists_those_there_are() -> None:
    done = gingham("fit", "--config", "ccnet_moon")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        f"gingham: error: no config 'ccnet_moon': neither a file nor one of {', '.join(packaged_configs())}"
    )


def test_a_missing_data_folder_is_one_line(tmp_path: Path) -> None:
    done = gingham(
        "check-data", "--config", "ccnet_cityscapes", f"--data.root={tmp_path / 'nowhere'}", "--trainer.devices=1"
    )
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("gingham: error: ")
    assert "nowhere" in last
    assert "Traceback" not in done.stderr


def test_fit_writes_logs_checkpoints_config_and_pictures(trained: Path) -> None:
    names = {path.name for path in trained.rglob("*") if path.is_file()}
    assert {"last.ckpt", "best.ckpt", "metrics.csv", "config.yaml", "predictions.png", "curves.png"} <= names
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(trained / "tensorboard"))
    board.Reload()
    shown = board.Images("predictions")
    with Image.open(next(trained.rglob("predictions.png"))) as file:
        assert (shown[-1].width, shown[-1].height) == file.size


def test_the_last_state_is_kept_though_the_run_is_shorter_than_the_interval(trained: Path) -> None:
    assert torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 12
    rows = metrics(trained)
    assert [int(row["step"]) for row in rows if row["loss"]] == list(range(12))
    assert [int(row["step"]) for row in rows if row["val_miou"]] == [5, 11]


@pytest.mark.parametrize("split", ["validate", "test"])
def test_evaluating_leaves_the_records_of_training_alone(trained: Path, split: str) -> None:
    kept = ["csv/metrics.csv", "tensorboard/predictions.png", "checkpoints/last.ckpt", "config.yaml"]
    before = [(trained / name).read_bytes() for name in kept]
    assert main([split, "--config", "ccnet_world", *TINY, f"--run_dir={trained}", "--ckpt_path=last"]) == 0
    assert [(trained / name).read_bytes() for name in kept] == before
    scores = json.loads((trained / f"{split}.json").read_text())
    assert scores["checkpoint"].endswith("last.ckpt")
    assert 0 <= scores["val_miou" if split == "validate" else "test_miou"] <= 1


def test_a_folder_holds_one_run(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    words = ["fit", "--config", "ccnet_world", *TINY, f"--run_dir={folder}"]
    error = error_of(capsys, *words)
    assert error.startswith(f"{folder} holds a run: ")
    assert "--ckpt_path last" in error
    assert "--overwrite" in error
    assert metrics(folder) == metrics(trained)
    assert main([*words, "--trainer.max_epochs=3", "--ckpt_path=last"]) == 0
    assert metrics(folder)[:14] == metrics(trained)
    assert [int(row["step"]) for row in metrics(folder) if row["val_miou"]] == [5, 11, 17]
    assert main([*words, "--trainer.max_epochs=1", "--overwrite"]) == 0
    assert [int(row["step"]) for row in metrics(folder) if row["val_miou"]] == [5]


def test_a_run_may_begin_from_a_state_of_another(trained: Path, tmp_path: Path) -> None:
    words = ["fit", "--config", "ccnet_world", *TINY, "--trainer.max_epochs=3", f"--run_dir={tmp_path}"]
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tensorboard" / "events.out.old").touch()
    assert main([*words, f"--ckpt_path={trained}/checkpoints/last.ckpt", "--overwrite"]) == 0
    assert [int(row["step"]) for row in metrics(tmp_path) if row["val_miou"]] == [17]
    assert not (tmp_path / "tensorboard" / "events.out.old").exists()


def test_checkpoints_may_lie_elsewhere(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    shutil.move(run / "checkpoints", tmp_path / "large")
    (run / "checkpoints").symlink_to(tmp_path / "large")
    words = ["fit", "--config", "ccnet_world", *TINY, "--trainer.max_epochs=3", f"--run_dir={run}"]
    assert main([*words, "--ckpt_path=last"]) == 0
    assert [int(row["step"]) for row in metrics(run) if row["val_miou"]] == [5, 11, 17]


def test_a_run_goes_on_with_batches_of_its_size_only(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", "--config", "ccnet_world", *TINY, "--data.batch_size=4", f"--run_dir={tmp_path}"]
    error = error_of(capsys, *words, f"--ckpt_path={trained}/checkpoints/last.ckpt")
    assert "with batches of 8 items in all processes together, now 4" in error


def test_folders_and_files_in_each_others_place_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("model: [")
    assert str(tmp_path / "file") in error_of(
        capsys, "fit", "--config", "ccnet_world", *TINY, f"--run_dir={tmp_path / 'file'}"
    )
    assert "no YAML" in error_of(capsys, "fit", "--config", str(tmp_path / "file"), "--help")
    (tmp_path / "part.yaml").write_text("trainer: {max_epochs: 1}")
    assert "needs the class_path of model" in error_of(capsys, "fit", f"--config={tmp_path / 'part.yaml'}", "--help")


def test_an_interrupted_command_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("gingham.methods.ccnet.recipe.CCNetRecipe.on_train_start", interrupt)
    try:
        assert main(["fit", "--config", "ccnet_world", *TINY, f"--run_dir={tmp_path}"]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)


@pytest.mark.slow
@pytest.mark.parametrize("wait", [0.0, 0.3])
def test_a_killed_run_resumes_to_the_same_weights(trained: Path, tmp_path: Path, wait: float) -> None:
    words = ["fit", "--config", "ccnet_world", *TINY, "--trainer.max_epochs=2", f"--run_dir={tmp_path}"]
    words += ["--checkpoint_every=1"]
    process = subprocess.Popen(
        command(*words), env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    while not (tmp_path / "checkpoints" / "last.ckpt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not torch.equal(
        weights(trained)["network.head.conva.0.weight"], weights(tmp_path)["network.head.conva.0.weight"]
    )
    done = gingham(*words, "--ckpt_path=last")
    assert done.returncode == 0, done.stderr
    expected, resumed = weights(trained), weights(tmp_path)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())
    assert metrics(trained) == metrics(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("images", [9, 1])
def test_two_processes_give_the_metrics_of_one(trained: Path, images: int) -> None:
    scores = []
    for devices in (1, 2):
        words = ["validate", "--config", "ccnet_world", *TINY, f"--run_dir={trained}", "--ckpt_path=last"]
        words += [f"--trainer.devices={devices}", f"--data.lengths=[48,{images},8]", "--data.evaluation_batch_size=2"]
        if devices == 1:
            assert main(words) == 0
        else:
            done = gingham(*words, "--trainer.strategy=ddp")
            assert done.returncode == 0, done.stderr
        scores.append((trained / "validate.json").read_text())
        (trained / "validate.json").unlink()
    assert scores[0] == scores[1]


def test_predict_writes_masks_and_reports_a_broken_image(trained: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (80, 48), (200, 30, 30)).save(images / "good.png")
    whole = (images / "good.png").read_bytes()
    (images / "torn.png").write_bytes(whole[: len(whole) // 2])
    last = str(trained / "checkpoints" / "last.ckpt")
    done = gingham(
        "predict",
        "--config",
        "ccnet_world",
        "--ckpt_path",
        last,
        "--images",
        str(images),
        "--out",
        str(tmp_path / "out"),
    )
    assert done.returncode == 1, done.stderr
    assert "torn.png" in done.stderr
    with Image.open(tmp_path / "out" / "masks" / "good.png.png") as mask:
        assert mask.size == (80, 48)
    shares = json.loads((tmp_path / "out" / "shares.json").read_text())
    assert list(shares) == ["good.png"]
    assert sum(shares["good.png"].values()) == pytest.approx(1, abs=1e-4)
    assert (tmp_path / "out" / "overlays" / "good.png.png").is_file()


def test_predict_says_which_folder_is_missing(trained: Path, tmp_path: Path) -> None:
    last = str(trained / "checkpoints" / "last.ckpt")
    done = gingham(
        "predict",
        "--config",
        "ccnet_world",
        "--ckpt_path",
        last,
        "--images",
        str(tmp_path / "no"),
        "--out",
        str(tmp_path),
    )
    assert done.returncode == 2
    error = done.stderr.strip().splitlines()[-1]
    assert error == f"gingham: error: --images {tmp_path / 'no'}: no such image or folder"


def test_a_checkpoint_of_another_shape_is_named(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.ckpt"
    checkpoint = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["state_dict"]["network.head.conva.0.weight"] = torch.zeros(3, 3)
    torch.save(checkpoint, file)
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (64, 64)).save(images / "a.png")
    done = gingham(
        "predict", "--config", "ccnet_world", "--ckpt_path", str(file), "--images", str(images), "--out", str(tmp_path)
    )
    assert done.returncode == 2
    assert (
        "network.head.conva.0.weight is [3, 3] in the file and [64, 64, 3, 3] in the model"
        in done.stderr.strip().splitlines()[-1]
    )


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "no --config"),
        (["--config=ccnet_world", "--data.sed=1"], "no option --data.sed: there are name, root, batch_size,"),
        (["--config=ccnet_world", "--trainer.max_step=1"], "no option --trainer.max_step: did you mean"),
        (["--config=ccnet_world", "--rundir=x"], "no option --rundir: did you mean --run_dir"),
        (["--config=ccnet_world", "--ckpt_path"], "argument --ckpt_path: expected one argument"),
        (["--config=ccnet_world", "--ckpt_path=away.ckpt"], "no checkpoint away.ckpt: give a file"),
        (["--config=ccnet_world", "--data.batch_size=x"], "--data.batch_size: Expected a <class 'int'>. Got value: x"),
        (["--config=ccnet_world", "--data.crop=0"], "crop_size must be 1 or above, got 0"),
        (["--config=ccnet_world", "--model.network.loops=-1"], "loops must not be negative, got -1"),
        (["--config=ccnet_world", "--model.network.backbone=resnot"], "unknown backbone 'resnot'"),
        (["--config=ccnet_world", "--trainer.devices=0"], "is not a valid input using cpu accelerator"),
        (["--config=ccnet_world", "--data.lengths=[4,4,4]"], "the train split has 4 images, fewer than one batch"),
        (["--config=ccnet_cityscapes", "--trainer.devices=1"], "data.root is not set"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it(
    words: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error = error_of(capsys, "fit", *words, *([f"--run_dir={tmp_path}"] if words else []))
    assert (text if words else "gingham fit needs --config FILE, or the name of one: ccnet_ade20k") in error
    assert not list(tmp_path.rglob("*.ckpt"))


def network_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    """The options of the network that a command line results in."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["fit", *words, "--print_config"])
    assert not ended.value.code
    options: dict[str, object] = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["network"]
    return options


def test_an_option_of_the_network_leaves_those_beside_it_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    configured = yaml.safe_load(Path(config_file("dcr_coco")).read_text())["model"]["init_args"]["network"]
    assert len(configured["base_options"]) > 1
    words = [
        "--model.network.base_options.min_size",
        "640",
        "--model.init_args.network.base_options.rpn_nms_thresh=5e-1",
    ]
    network = network_of(capsys, "--config", "dcr_coco", *words, "--model.network.sampling.share", "0.1")
    changed = configured["base_options"] | {"min_size": 640, "rpn_nms_thresh": 0.5}
    sampling = (configured.get("sampling") or {}) | {"share": 0.1}
    assert network == configured | {"base_options": changed, "sampling": sampling}
    words = ["--config", "dcr_coco", "--model.network.base_options.min_size.x=1"]
    assert "no option --model.network.base_options.min_size.x: min_size is" in error_of(capsys, "fit", *words)


def test_null_is_nothing_whichever_option_of_the_network_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model.network.head_std", "null", "--model.network.backbone_options.x=null", "--model.network.y=[null]"]
    network = network_of(capsys, "--config=seenet_voc", *words)
    assert (network["head_std"], network["backbone_options"], network["y"]) == (None, {"x": None}, [None])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in packaged_configs() if name.endswith("_world")])
def test_what_the_head_of_a_configuration_proposes_makes_a_recipe(name: str, tmp_path: Path) -> None:
    from gingham.cli.training import _CLI

    lines = Path(config_file(name)).read_text().splitlines()
    head = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    words = [word.rstrip(".:,") for pair in re.findall(r"(--model\.\S+) (\S+)", head) for word in pair]
    made = _CLI("fit", ["--config", name, *words, f"--run_dir={tmp_path}"]).model
    for option, value in zip(words[::2], words[1::2], strict=True):
        kept = getattr(made, "network_options", {}).get(option.rpartition(".")[2])
        assert "network." not in option or kept == yaml.safe_load(value)


class Unsafe:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_file_that_is_no_checkpoint_is_named_and_not_executed(
    command: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = (trained / "checkpoints" / "last.ckpt").read_bytes()
    Path("torn.ckpt").write_bytes(whole[: len(whole) // 2])
    Path("noise.ckpt").write_bytes(bytes(range(256)))
    Path("empty.ckpt").write_bytes(b"")
    torch.save({"state_dict": Unsafe()}, "unsafe.ckpt")
    torch.save({"weight": torch.ones(1)}, "foreign.ckpt")
    for name in ("torn", "noise", "empty", "unsafe", "foreign"):
        error = error_of(capsys, command, "--config=ccnet_world", f"--ckpt_path={name}.ckpt", "--run_dir=away")
        assert error.startswith(f"{name}.ckpt")
        assert "checkpoint" in error
    assert not Path("executed").exists()


@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_checkpoint_of_another_network_is_one_short_line(
    command: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = trained / "checkpoints" / "last.ckpt"
    words = ["--config=ccnet_world", f"--ckpt_path={last}", f"--run_dir={tmp_path}"]
    error = error_of(capsys, command, *words, "--model.network.head_channels=32")
    assert error.startswith(f"{last} does not fit the model: 22 of another shape (network.head.conva.0.weight is ")
    assert "[64, 64, 3, 3] in the file and [32, 64, 3, 3] in the model" in error
    assert error.endswith("and 19 more)")


def test_help_of_training_lists_the_options_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help"]) == 0
    assert "--ckpt_path" in capsys.readouterr().out
    assert main(["fit", "--config", "ccnet_world", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--run_dir", "--trainer.NAME", "--model.learning_rate", "--data.batch_size"):
        assert option in text
    assert "--optimizer." not in text  # the recipe has its own


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    """Two training and two validation images of the embedded world in the Cityscapes layout."""
    for split in ("train", "val"):
        write_cityscapes(tmp_path / "data", CueScenes(split, 2))
    return tmp_path / "data"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("fault", ["torn image", "wrong label"])
def test_a_broken_file_is_named_whoever_reads_it(
    cityscapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int, fault: str
) -> None:
    if fault == "torn image":
        file = next(cityscapes.glob("leftImg8bit/train/*/*.png"))
        file.write_bytes(file.read_bytes()[:200])
        text = "cannot be read, truncated or not an image"
    else:
        file = next(cityscapes.glob("gtFine/train/*/*.png"))
        Image.new("L", (64, 64), 99).save(file)
        text = "label value 99 outside the label space"
    words = ["--config=ccnet_world", "--data.name=cityscapes", f"--data.root={cityscapes}", "--data.classes=wardrobe"]
    words += [*TINY, "--data.batch_size=2", f"--data.workers={workers}", f"--run_dir={tmp_path / 'run'}"]
    error = error_of(capsys, "fit", *words, "--check_data=false")
    assert error.startswith(f"{file}: ")
    assert text in error


def test_a_test_split_without_labels_says_so(
    cityscapes: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("leftImg8bit", "gtFine"):
        (cityscapes / folder / "val").rename(cityscapes / folder / "test")
    for file in cityscapes.glob("gtFine/test/*/*.png"):
        Image.new("L", (64, 64), 255).save(file)
    words = ["--config=ccnet_world", "--data.name=cityscapes", f"--data.root={cityscapes}", "--data.classes=wardrobe"]
    words += [f"--ckpt_path={trained / 'checkpoints' / 'last.ckpt'}", f"--run_dir={tmp_path / 'run'}"]
    assert "the test split has no labelled pixels" in error_of(capsys, "test", *words)


def test_network_and_data_must_agree_on_the_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config=ccnet_world", *TINY, "--model.network.num_classes=9", f"--run_dir={tmp_path}"]
    assert error_of(capsys, "fit", *words) == "the network has num_classes 9, the data set has 7 classes"


def test_check_data_names_every_broken_file(cityscapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cityscapes(cityscapes, CueScenes("test", 1))
    words = ["--config=ccnet_world", "--data.name=cityscapes", f"--data.root={cityscapes}", "--data.classes=wardrobe"]
    assert main(["check-data", *words]) == 0
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines == [f"{split}: {n} images, nothing wrong" for split, n in (("train", 2), ("val", 2), ("test", 1))]
    torn, other = sorted(cityscapes.glob("leftImg8bit/train/*/*.png"))
    torn.write_bytes(torn.read_bytes()[:200])
    unlabelled = next(cityscapes.glob("gtFine/val/*/*.png"))
    unlabelled.unlink()
    next(cityscapes.glob("gtFine/test/*/*.png")).unlink()
    assert main(["check-data", *words]) == 1
    text = capsys.readouterr().out
    assert f"train: {torn}: cannot be read" in text
    assert "train: 2 images, 1 problem\n" in text
    assert ": no label file\nval: 2 images, 1 problem\n" in text
    assert "test: 1 images, nothing wrong" in text
    assert other.name not in text
