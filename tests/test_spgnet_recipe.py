"""SPGNet's recipe under Lightning's trainer: loss, evaluation by the network's rule for corners, what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch.utils.data import DataLoader

pytest.importorskip("lightning", reason="training needs the extra: pip install gingham[train]")
from gingham.cli.training import config_file
from gingham.errors import CheckpointError
from gingham.methods.segmentation_recipe import Refinement
from gingham.methods.spgnet.objective import stage_supervision
from gingham.methods.spgnet.recipe import SPGNetRecipe
from gingham.nn.inference import whole_image
from gingham.nn.segmentation_loss import HardPixels
from trainings import items, trainer

NETWORK: dict[str, Any] = {
    "backbone": "small",
    "num_classes": 4,
    "decoder_channels": 8,
    "backbone_options": {"widths": [8, 8, 8, 8]},
}
RESNET: dict[str, Any] = NETWORK | {
    "backbone": "resnet18",
    "backbone_options": {"layers": [1, 1, 1, 1], "channels": [4, 6, 8, 10]},
}


def batch(count: int = 2, size: tuple[int, int] = (32, 48)) -> Any:
    pictures = items(count, size)
    return {name: torch.stack([picture[name] for picture in pictures]) for name in ("image", "label")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"stages": 3, "psi": "softmax", "residual": False}], ids=str)
def test_training_learns(tmp_path: Path, options: dict[str, Any]) -> None:
    """Far better than one class for all after a few steps, and the same with the same seed."""
    scores = []
    for _ in range(2):
        torch.manual_seed(0)
        recipe = SPGNetRecipe(NETWORK | options | {"classifier_std": 0.01}, optimizer="adamw", learning_rate=0.02)
        run = trainer(tmp_path, max_epochs=5, limit_val_batches=2)
        run.fit(recipe, DataLoader(items(40), 4), DataLoader(items(4), 2))
        scores.append(run.callback_metrics["val_miou"].item())
    assert scores[0] > 0.4
    assert scores[0] == scores[1]


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_on_a_gpu_learns(tmp_path: Path, precision: Any) -> None:
    torch.manual_seed(0)
    selection = HardPixels(threshold=0.7, min_kept=100, shrink=2)
    network = NETWORK | {"classifier_std": 0.01}
    recipe = SPGNetRecipe(network, hard_pixels=selection, optimizer="adamw", learning_rate=0.02)
    run = trainer(tmp_path, accelerator="gpu", max_epochs=3, precision=precision)
    run.fit(recipe, DataLoader(items(40), 4), DataLoader(items(4), 2))
    assert run.callback_metrics["val_miou"] > 0.4
    images, device = batch()["image"], run.strategy.root_device
    recipe.float().eval()
    there = recipe.to(device)(images.to(device)).cpu()
    torch.testing.assert_close(there, recipe.cpu()(images), rtol=0.01, atol=0.05)


@pytest.mark.filterwarnings("ignore")
def test_loss_is_that_of_the_objective() -> None:
    torch.manual_seed(0)
    selection = HardPixels(threshold=0.3, min_kept=0, shrink=1)
    recipe = SPGNetRecipe(NETWORK, stage_weights=(0.4, 1.0), hard_pixels=selection)
    for size, aligned in (((32, 48), False), ((33, 49), True)):  # the network's rule for corners
        given = batch(size=size)
        output = recipe.network(given["image"])
        options: Any = {"weights": (0.4, 1.0), "hard_pixels": selection, "align_corners": aligned}
        expected = stage_supervision(output.stages, given["label"], **options)
        torch.testing.assert_close(recipe.loss(output, given, None), expected)
        other = stage_supervision(output.stages, given["label"], **options | {"align_corners": not aligned})
        assert not torch.allclose(other, expected)
        soft = torch.rand(2, 4, *size).softmax(1)
        refined = Refinement(labels=soft, teacher=None, alpha=0.5)
        expected = stage_supervision(output.stages, given["label"], soft=soft, **options)
        torch.testing.assert_close(recipe.loss(output, given, refined), expected)


def test_every_stage_counts_fully_unless_said_otherwise() -> None:
    assert SPGNetRecipe(NETWORK).stage_weights == (1.0, 1.0)
    assert SPGNetRecipe(NETWORK | {"stages": 3}).stage_weights == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("size", "aligned"), [((32, 48), False), ((33, 49), True), ((40, 40), False)])
def test_prediction_is_that_of_the_last_stage_at_the_size_of_the_image(size: tuple[int, int], aligned: bool) -> None:
    torch.manual_seed(0)
    recipe = SPGNetRecipe(NETWORK).eval()
    images = batch(size=size)["image"]
    stages = recipe.network(images).stages
    expected = F.interpolate(stages[-1], size, mode="bilinear", align_corners=aligned)
    torch.testing.assert_close(recipe(images), expected)
    assert not torch.allclose(expected, F.interpolate(stages[0], size, mode="bilinear", align_corners=aligned))


def test_tiles_follow_the_rule_for_their_own_size() -> None:
    torch.manual_seed(0)
    images = batch(size=(33, 33))["image"]
    whole = SPGNetRecipe(NETWORK).eval()
    tiles = SPGNetRecipe(NETWORK, evaluation="sliding", tile=33).eval()
    tiles.load_state_dict(whole.state_dict())
    torch.testing.assert_close(tiles(images), whole(images))
    assert tiles(batch(size=(40, 50))["image"]).shape == (2, 4, 40, 50)


@pytest.mark.parametrize("size", [(65, 65), (64, 64)])
def test_scaled_images_follow_the_rule_for_their_own_size(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    recipe = SPGNetRecipe(NETWORK, scales=(33 / size[0],), average="logits").eval()
    images = batch(size=size)["image"]
    aligned = size == (65, 65)  # of the images, and so of the way to the scale and back
    scaled = F.interpolate(images, (33, 33), mode="bilinear", align_corners=aligned)
    logits = F.interpolate(recipe.network(scaled).logits, (33, 33), mode="bilinear", align_corners=True)
    torch.testing.assert_close(recipe(images), F.interpolate(logits, size, mode="bilinear", align_corners=aligned))
    half = SPGNetRecipe(NETWORK, scales=(0.5,), average="logits").eval()
    half.load_state_dict(recipe.state_dict())
    scaled = F.interpolate(images, (32, 32), mode="bilinear", align_corners=aligned)
    logits = F.interpolate(recipe.network(scaled).logits, (32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(half(images), F.interpolate(logits, size, mode="bilinear", align_corners=aligned))


def test_probabilities_of_mirrored_images_are_averaged_unless_said_otherwise() -> None:
    torch.manual_seed(0)
    recipe, logits = SPGNetRecipe(NETWORK, flip=True).eval(), SPGNetRecipe(NETWORK, flip=True, average="logits").eval()
    logits.load_state_dict(recipe.state_dict())
    images = batch()["image"]
    one, other = (whole_image(recipe.network, x, align_corners=False) for x in (images, images.flip(-1)))
    torch.testing.assert_close(recipe(images).exp(), (one.softmax(1) + other.flip(-1).softmax(1)) / 2)
    torch.testing.assert_close(logits(images), (one + other.flip(-1)) / 2)


@pytest.mark.filterwarnings("ignore")
def test_backbone_weights_go_to_every_stage_when_training_begins(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = SPGNetRecipe(RESNET | {"stages": 1}).network
    state = dict(source.stem.state_dict())
    for level, module in enumerate(source.stages[0].encoder, start=1):
        state |= {f"layer{level}.{name}": value for name, value in module.state_dict().items()}
    file = tmp_path / "backbone.pth"
    torch.save(state, file)
    recipe = SPGNetRecipe(RESNET | {"backbone_weights": str(file)}, learning_rate=1e-12)
    laterals = recipe.network.stages[1].laterals[0][0].weight.clone()
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(recipe, DataLoader(items(4), 2))
    for stage in recipe.network.stages:
        for name, value in stage.encoder.named_parameters():
            torch.testing.assert_close(value, source.stages[0].encoder.get_parameter(name))
    torch.testing.assert_close(recipe.network.stem.conv1.weight, source.stem.conv1.weight)
    torch.testing.assert_close(recipe.network.stages[1].laterals[0][0].weight, laterals)
    run.save_checkpoint(tmp_path / "last.ckpt")
    file.unlink()
    again = SPGNetRecipe(RESNET | {"backbone_weights": str(file)})
    trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(
        again, DataLoader(items(4), 2), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    with pytest.raises(CheckpointError, match=r"backbone\.pth"):
        trainer(tmp_path).fit(SPGNetRecipe(RESNET | {"backbone_weights": str(file)}), DataLoader(items(4), 2))


@pytest.mark.parametrize(
    ("network", "options", "text"),
    [
        ({}, {"stage_weights": (1.0,)}, r"^stage_weights must be one for each of 2 stages, got \(1.0,\)"),
        ({}, {"stage_weights": (-1.0, 1.0)}, "^stage_weights must be 0 or more and not all 0"),
        ({}, {"stage_weights": (0.0, 0.0)}, "^stage_weights must be 0 or more and not all 0"),
        ({"detach_guidance": True}, {"stage_weights": (0.0, 1.0)}, "^stage_weights must be above 0 with detach_guid"),
        ({"gate": True}, {}, "network has no option 'gate': there are backbone, num_classes, stages"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_named(network: dict[str, Any], options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SPGNetRecipe(NETWORK | network, **options)


def test_corners_are_an_option_of_the_network_alone() -> None:
    assert SPGNetRecipe(NETWORK | {"align_corners": True}).corners_align((32, 48)) is True
    assert SPGNetRecipe(NETWORK).corners_align((32, 48)) is False
    with pytest.raises(TypeError, match="align_corners"):
        SPGNetRecipe(NETWORK, align_corners=True)


def test_the_last_stage_or_a_network_without_gates_may_go_unsupervised() -> None:
    SPGNetRecipe(NETWORK | {"detach_guidance": True}, stage_weights=(1.0, 0.0))
    SPGNetRecipe(NETWORK | {"detach_guidance": True, "guidance": False}, stage_weights=(0.0, 1.0))
    SPGNetRecipe(NETWORK, stage_weights=(0.0, 1.0))


@pytest.mark.parametrize("name", ["spgnet_cityscapes", "spgnet_world"])
def test_packaged_configurations_are_what_the_recipe_takes(name: str) -> None:
    config = yaml.safe_load(Path(config_file(name)).read_text())
    assert config["model"]["class_path"] == "gingham.methods.spgnet.recipe.SPGNetRecipe"
    recipe = SPGNetRecipe(**config["model"]["init_args"])
    assert len(recipe.network.stages) == 2 and recipe.network.gates
    assert isinstance(config["trainer"]["devices"], int)
