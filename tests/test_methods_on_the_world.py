"""Every segmentation method on the embedded world: from files as from memory, and in two processes as in one."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from torch import nn

pytest.importorskip("lightning", reason="training needs the extra: pip install gingham[train]")
import lightning
from PIL import Image

from gingham.cli import main
from gingham.cli.options import config_file, instantiate
from gingham.data.points import write_points
from gingham.data.segmentation import SegmentationDataset
from gingham.data.wardrobe import write_cityscapes, write_lip, write_pascal_context, write_voc, write_voc_tags
from gingham.methods.segmentation_data import SegmentationData

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = {"train": 24, "val": 4, "test": 4}


class Layout(NamedTuple):
    """How the world of a method is written to disk, and the options that read it."""

    config: str
    write: Callable[[str | Path, SegmentationDataset], None]
    options: dict[str, Any]


LAYOUTS = {
    "ccnet-voc": Layout("ccnet_world", write_voc, {"name": "voc", "classes": "wardrobe"}),
    "spgnet-cityscapes": Layout("spgnet_world", write_cityscapes, {"name": "cityscapes", "classes": "wardrobe_scales"}),
    "schp-lip": Layout("schp_world", write_lip, {"name": "lip", "classes": "wardrobe_dolls"}),
    "pdml-pascal-context": Layout(
        "pdml_world", write_pascal_context, {"name": "pascal_context", "classes": "wardrobe_points"}
    ),
    "seenet-voc-tags": Layout("seenet_world", write_voc_tags, {"name": "voc_tags", "classes": "wardrobe_tags"}),
}


FEW_EPISODES = {
    "episodes_per_epoch": 24,
    "validation_episodes": 5,
    "protocol": {"name": "oslsm", "episodes": 5, "small_objects": True},
}


def world(config: str, folder: Path, **data: Any) -> dict[str, Any]:
    """A packaged configuration, made so short that it trains in seconds."""
    content: dict[str, Any] = yaml.safe_load(Path(config_file(config)).read_text())
    few = FEW_EPISODES if config == "sgone_world" else {}
    content["data"]["init_args"] |= {"lengths": list(LENGTHS.values()), "batch_size": 6, **few, **data}
    content["trainer"] |= {
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [],
    }
    content["run_dir"] = str(folder)
    return content


def trained(content: dict[str, Any]) -> tuple[dict[str, float], dict[str, float], nn.Module]:
    """Logged values after training, scores on the test split, and the network."""
    warnings.filterwarnings("ignore")
    lightning.seed_everything(0, verbose=False)
    parts = instantiate(content, source="test")
    trainer = lightning.Trainer(
        **{name: value for name, value in content["trainer"].items() if name != "callbacks"},
        logger=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    trainer.fit(parts.model, parts.data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    (scores,) = trainer.test(parts.model, parts.data, verbose=False)
    return logged, dict(scores), parts.model.network


def write_world(layout: Layout, root: Path, data: SegmentationData) -> dict[str, Any]:
    """Write the three splits; the options that read them."""
    options = layout.options | {"root": str(root)}
    for split in LENGTHS:
        layout.write(root, data.dataset(split))
    if data.points == "instances":
        write_points(root / "points.txt", data.dataset("train").source)  # type: ignore[attr-defined]
        options["points"] = str(root / "points.txt")
    return options


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LAYOUTS)
def test_training_from_files_gives_the_numbers_of_training_from_memory(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    from_memory = world(layout.config, tmp_path / "memory")
    data: SegmentationData = instantiate(from_memory, source="test").data
    options = write_world(layout, tmp_path / "files", data)
    from_files = world(layout.config, tmp_path / "disk", **options)
    logged, scores, network = trained(from_memory)
    logged_again, scores_again, network_again = trained(from_files)
    assert scores["test_miou"] > 0
    assert logged == pytest.approx(logged_again, nan_ok=True, abs=0)
    assert scores == pytest.approx(scores_again, nan_ok=True, abs=0)
    for value, other in zip(network.parameters(), network_again.parameters(), strict=True):
        assert torch.equal(value, other)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["spgnet_world", "schp_world", "pdml_world", "seenet_world", "sgone_world"])
def test_two_processes_give_the_metrics_of_one(config: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(world(config, tmp_path / "run", evaluation_batch_size=2)))
    assert main(["fit", f"--config={file}"]) == 0
    words = ["validate", f"--config={file}", "--ckpt_path=last", "--data.lengths=[24,5,4]"]
    assert main(words) == 0
    report = tmp_path / "run" / "validate.json"
    alone = json.loads(report.read_text())
    report.unlink()
    command = [sys.executable, "-m", "gingham.cli", *words, "--trainer.devices=2", "--trainer.strategy=ddp"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    together = json.loads(report.read_text())
    assert together.keys() == alone.keys()
    for name, value in alone.items():
        exact = isinstance(value, str | list | None)
        assert together[name] == (value if exact else pytest.approx(value, rel=1e-5))


@pytest.mark.parametrize("name", ["schp-lip", "ccnet-voc"])
def test_a_broken_data_set_is_refused_with_a_list_of_what_is_wrong(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = LAYOUTS[name]
    content = world(layout.config, tmp_path / "run")
    data: SegmentationData = instantiate(content, source="test").data
    root = tmp_path / "data"
    options = write_world(layout, root, data)
    images, labels = {
        "lip": ("train_images", "train_segmentations"),
        "voc": ("JPEGImages", "SegmentationClass"),
    }[options["name"]]
    torn, wrong, missing = (
        root / folder / f"{data.dataset('train')[index]['name']}.png"
        for index, folder in enumerate((images, labels, images))
    )
    torn.write_bytes(torn.read_bytes()[:90])
    Image.new("L", (32, 64) if options["name"] == "lip" else (64, 64), 200).save(wrong)
    missing.unlink()
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(world(layout.config, tmp_path / "run", **options)))
    assert main(["check-data", f"--config={file}"]) == 1
    listed = capsys.readouterr().out
    assert f"train: {torn}: cannot be read" in listed
    assert f"train: {wrong}: label value 200 outside the label space" in listed
    assert f"train: {missing.with_suffix('.jpg')}: no such file" in listed
    assert "train: 24 images, 3 problems" in listed
    assert main(["fit", f"--config={file}"]) == 2
    printed = capsys.readouterr()
    assert [line for line in printed.out.splitlines() if line.startswith("train: ")] == [
        line for line in listed.splitlines() if line.startswith("train: ") and " images, " not in line
    ]
    assert "3 problems in" in printed.err
    assert not (tmp_path / "run").exists()
    shutil.rmtree(root)
