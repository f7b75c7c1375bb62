"""`gingham predict`, driven as a user does but in this process."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
import yaml
from PIL import Image, ImageOps

from gingham.cli import main, pictures
from gingham.cli.training import config_file
from gingham.data.wardrobe import CUE_LABELS
from gingham.methods.ccnet.recipe import CCNetRecipe

CONFIG = yaml.safe_load(Path(config_file("ccnet_world")).read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, with the checkpoint of a model that was not trained."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "checkpoints").mkdir()
    torch.manual_seed(0)
    recipe = CCNetRecipe(**CONFIG["model"]["init_args"])
    recipe.network.head.bottleneck[-1].weight.data *= 1000  # so that it sees more than one class
    torch.save({"state_dict": recipe.state_dict()}, folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


def picture(rows: int, columns: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8))


def predict(run: Path, images: Path, *words: str, config: str = "ccnet_world", checkpoint: str = "last") -> int:
    """Writes into out/ beside `images`; returns the exit code."""
    given = ["--config", config, "--ckpt_path", checkpoint, "--run_dir", str(run), "--images", str(images)]
    return main(["predict", *given, "--out", str(images.parent / "out"), "--device", "cpu", *words])


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, which must be one line that starts like every error of the command."""
    line = capsys.readouterr().err.removesuffix("\n")
    assert line.startswith("gingham: error: ")
    assert "\n" not in line
    return line


def changed_config(tmp_path: Path, section: str, **values: object) -> str:
    content = yaml.safe_load(yaml.safe_dump(CONFIG))
    content[section]["init_args"].update(values)
    file = tmp_path / "changed.yaml"
    file.write_text(yaml.safe_dump(content))
    return str(file)


def shares(images: Path) -> dict[str, dict[str, float]]:
    content: dict[str, dict[str, float]] = json.loads((images.parent / "out" / "shares.json").read_text())
    return content


def written(images: Path, kind: str, name: str) -> np.ndarray:
    with Image.open(images.parent / "out" / kind / f"{name}.png") as image:
        return np.array(image)


# ------------------------------------------------------------------------------------------------ the checkpoint


def test_last_is_found_in_the_run_dir_of_the_config(run: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(20, 30).save(images / "a.png")
    place = images.parent / CONFIG["run_dir"] / "checkpoints"
    place.mkdir(parents=True)
    (place / "last.ckpt").symlink_to(run / "checkpoints" / "last.ckpt")
    monkeypatch.chdir(images.parent)
    assert main(["predict", "--config", "ccnet_world", "--ckpt_path", "last", "--images", "images", "--out", "o"]) == 0
    assert (images.parent / "o" / "masks" / "a.png.png").is_file()


def test_best_of_a_run_without_it_is_an_error(run: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(20, 30).save(images / "a.png")
    assert predict(run, images, checkpoint="best") == 2
    assert str(run / "checkpoints" / "best.ckpt") in error(capsys)


@pytest.mark.parametrize("kind", ["garbage", "truncated", "pickle", "list"])
def test_a_file_that_is_no_checkpoint_is_named(
    kind: str, run: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(20, 30).save(images / "a.png")
    file = images.parent / "bad.ckpt"
    if kind == "garbage":
        file.write_bytes(b"no checkpoint at all")
    elif kind == "truncated":
        whole = (run / "checkpoints" / "last.ckpt").read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    elif kind == "list":
        torch.save([torch.ones(2)], file)
    else:
        torch.save({"state_dict": {"network": CUE_LABELS}}, file)  # a class that weights_only does not load
    assert predict(run, images, checkpoint=str(file)) == 2
    assert str(file) in error(capsys)


def test_a_foreign_checkpoint_names_the_tensors_that_do_not_fit(
    run: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(20, 30).save(images / "a.png")
    file = images.parent / "foreign.ckpt"
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    first = next(iter(state))
    del state[first]
    state["network.head.conva.0.weight"] = torch.zeros(3, 5)
    torch.save({"state_dict": state}, file)
    assert predict(run, images, checkpoint=str(file)) == 2
    line = error(capsys)
    assert f"1 missing ({first})" in line
    shapes = "is [3, 5] in the file and [64, 64, 3, 3] in the model"
    assert f"1 of another shape (network.head.conva.0.weight {shapes})" in line
    assert str(file) in line


def test_a_checkpoint_with_attention_is_refused_by_a_config_without(
    run: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(20, 30).save(images / "a.png")
    network = CONFIG["model"]["init_args"]["network"] | {"loops": 0}
    assert predict(run, images, config=changed_config(images.parent, "model", network=network)) == 2
    assert "7 unexpected (network.head.cca.gamma" in error(capsys)


# ------------------------------------------------------------------------------------------------ the configuration


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("data: {}", "needs the entries model and data"),
        ("- model\n- data", "needs the entries model and data"),
        ("model: [", "no YAML"),
        ("model: 3\ndata: 4", '"model"'),
    ],
)
def test_a_config_that_is_none_is_named(
    text: str, reason: str, run: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(20, 30).save(images / "a.png")
    file = images.parent / "bad.yaml"
    file.write_text(text)
    assert predict(run, images, config=str(file)) == 2
    line = error(capsys)
    assert str(file) in line
    assert reason in line


@pytest.mark.parametrize(
    ("section", "values", "reason"),
    [
        ("model", {"learning_rate": "fast"}, "fast"),
        ("model", {"network": {"backbone": "moon"}}, "unknown backbone 'moon'"),
        ("model", {"network": {"loop": 2}}, "'loop'"),
        ("data", {"name": "moon"}, "moon"),
    ],
)
def test_an_option_that_does_not_fit_is_one_line(
    section: str,
    values: dict[str, Any],
    reason: str,
    run: Path,
    images: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture(20, 30).save(images / "a.png")
    file = changed_config(images.parent, section, **values)
    assert predict(run, images, config=file) == 2
    line = error(capsys)
    assert file in line
    assert reason in line


def test_the_weights_that_training_began_with_are_not_needed(run: Path, images: Path) -> None:
    picture(20, 30).save(images / "a.png")
    network = CONFIG["model"]["init_args"]["network"] | {"backbone_weights": "/nowhere/backbone.pth"}
    assert predict(run, images, config=changed_config(images.parent, "model", network=network)) == 0


def test_a_model_with_other_classes_than_its_data_is_an_error(
    run: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(20, 30).save(images / "a.png")
    assert predict(run, images, config=changed_config(images.parent, "data", name="voc")) == 2
    assert "7 classes" in error(capsys)


@pytest.mark.parametrize(("device", "reason"), [("cuda:99", "CUDA devices"), ("moon", "expected cpu")])
def test_a_device_that_is_not_there_is_an_error(
    device: str, reason: str, run: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(20, 30).save(images / "a.png")
    assert predict(run, images, "--device", device) == 2
    line = error(capsys)
    assert f"--device {device}" in line
    assert reason in line


# ------------------------------------------------------------------------------------------------ reading images


def test_what_cannot_be_read_is_skipped_by_name(
    run: Path, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(20, 30).save(images / "good.png")
    whole = (images / "good.png").read_bytes()
    (images / "torn.png").write_bytes(whole[: len(whole) // 2])
    (images / "empty.jpg").touch()
    (images / "text.png").write_text("no image")
    (images / "gone.png").symlink_to(images / "nowhere.png")
    Image.fromarray(np.zeros((20, 30), np.uint16)).save(images / "deep.png")
    Image.new("1", (100, 100)).save(images / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert predict(run, images) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    bad = ["deep.png", "empty.jpg", "gone.png", "huge.png", "text.png", "torn.png"]
    assert [line.split(": ")[1] for line in lines] == [f"skipped {images / name}" for name in bad]
    assert list(shares(images)) == ["good.png"]


def test_every_kind_of_picture_is_read(run: Path, images: Path) -> None:
    for mode in ("1", "L", "P", "RGBA", "CMYK"):
        picture(20, 30).convert(mode).save(images / f"{mode}.tif")
    assert predict(run, images) == 0
    assert len(shares(images)) == 5


def test_pictures_are_turned_as_the_camera_says(run: Path, images: Path) -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = orientation
        picture(20, 30).save(images / f"{orientation}.png", exif=exif)
        with Image.open(images / f"{orientation}.png") as turned:
            ImageOps.exif_transpose(turned).save(images / f"{orientation}-upright.png")
    assert predict(run, images) == 0
    for kind in ("masks", "overlays"):
        for orientation in range(1, 9):
            turned, upright = (written(images, kind, f"{orientation}{end}.png") for end in ("", "-upright"))
            np.testing.assert_array_equal(turned, upright)


def test_a_picture_that_does_not_fit_into_memory_is_skipped(
    run: Path, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: CCNetRecipe, image: torch.Tensor) -> torch.Tensor:
        if image.shape[-1] > 30:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return torch.zeros(1, 7, *image.shape[-2:])

    monkeypatch.setattr(CCNetRecipe, "forward", forward)
    picture(20, 30).save(images / "small.png")
    picture(20, 40).save(images / "large.png")
    assert predict(run, images) == 1
    assert f"skipped {images / 'large.png'}: not enough memory for 40x20 pixels" in capsys.readouterr().err
    assert list(shares(images)) == ["small.png"]


# ------------------------------------------------------------------------------------------------ what is written


def test_a_mask_holds_the_class_of_each_pixel_in_its_colour(run: Path, images: Path) -> None:
    picture(60, 90).save(images / "a.png")
    assert predict(run, images) == 0
    mask = written(images, "masks", "a.png")
    assert mask.shape == (60, 90)
    assert len(np.unique(mask)) > 1
    found = shares(images)["a.png"]
    assert list(found) == list(CUE_LABELS.names)
    for index, name in enumerate(CUE_LABELS.names):
        assert found[name] == pytest.approx((mask == index).mean(), abs=1e-6)
    with Image.open(images.parent / "out" / "masks" / "a.png.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.array(image.convert("RGB")), np.array(CUE_LABELS.palette)[mask])


def test_an_overlay_has_the_size_of_the_picture_and_names_what_occurs(run: Path, images: Path) -> None:
    shown = picture(300, 500)
    shown.save(images / "a.png")
    assert predict(run, images) == 0
    mask, overlay = written(images, "masks", "a.png"), written(images, "overlays", "a.png")
    assert overlay.shape[1] == 500
    assert 300 < overlay.shape[0] < 400
    blend = 0.45 * np.array(shown) + 0.55 * np.array(CUE_LABELS.palette)[mask]
    np.testing.assert_allclose(overlay[:300], blend, atol=0.51)
    legend = {tuple(colour) for colour in overlay[300:].reshape(-1, 3).tolist()}
    for index, colour in enumerate(CUE_LABELS.palette):
        assert (colour in legend) == (index in mask)


def test_a_long_legend_goes_on_in_the_next_line(tmp_path: Path) -> None:
    heights = []
    for width in (40, 400):
        image, mask = torch.zeros(3, 7, width, dtype=torch.uint8), torch.arange(width).expand(7, -1) % 7
        pictures.save_overlay(tmp_path / "o.png", image, mask, CUE_LABELS.names, CUE_LABELS.palette)
        with Image.open(tmp_path / "o.png") as overlay:
            heights.append(overlay.height)
            below = {tuple(colour) for colour in np.array(overlay)[7:].reshape(-1, 3).tolist()}
        assert below >= set(CUE_LABELS.palette)
    assert heights[0] > heights[1]


def test_pictures_that_differ_in_their_ending_stay_apart(run: Path, images: Path) -> None:
    picture(20, 30).save(images / "a.png")
    picture(30, 20).save(images / "a.jpg")
    assert predict(run, images) == 0
    assert written(images, "masks", "a.png").shape == (20, 30)
    assert written(images, "masks", "a.jpg").shape == (30, 20)


def test_out_must_not_be_a_file(run: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(20, 30).save(images / "a.png")
    out = images.parent / "out"
    out.write_text("mine")
    assert predict(run, images) == 2
    assert f"--out {out}" in error(capsys)
    assert out.read_text() == "mine"


def test_an_interrupted_run_keeps_what_it_has(run: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(20, 30).save(images / "a.png")
    picture(20, 30).save(images / "b.png")
    save = pictures.save_overlay

    def interrupted(path: Path, *arguments: Any) -> None:
        if path.name == "b.png.png":
            raise KeyboardInterrupt
        save(path, *arguments)

    monkeypatch.setattr(pictures, "save_overlay", interrupted)
    assert predict(run, images) == 130
    assert list(shares(images)) == ["a.png"]


def test_attention_is_laid_over_the_grey_image_as_heat() -> None:
    image = torch.zeros(3, 2, 3, dtype=torch.uint8)
    image[0] = 90
    attention = torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.0, 0.0]])
    shown = pictures.heat(image, attention, opacity=0.5).astype(int)
    assert shown.shape == (2, 3, 3)
    assert (shown[1] == shown[0, 0]).all() and (abs(shown[0, 0] - 15) <= 2).all()  # half of the grey, black heat
    assert shown[0, 2].sum() > shown[0, 1].sum() > shown[0, 0].sum()
    sheet = pictures.draw_panels(
        [(image, {"truth": torch.ones(2, 3, dtype=torch.int64), "attention": attention})], ["a", "b"], [(0, 0, 0)] * 2
    )
    assert sheet.width > 3 * 2 * 64
