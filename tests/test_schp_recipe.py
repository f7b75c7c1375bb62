"""SCHP's recipe under Lightning's trainer: loss with and without refined labels, evaluation by the warp, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader

pytest.importorskip("lightning", reason="training needs the extra: pip install gingham[train]")
import lightning

import trainings
from gingham.cli.options import config_file
from gingham.methods.schp.geometry import IMAGENET_BLACK, warp_from_network, warp_to_network
from gingham.methods.schp.network import ParsingOutput
from gingham.methods.schp.objective import SoftLabels, edge_map, parsing_loss, refined_labels
from gingham.methods.schp.recipe import SCHPRecipe
from gingham.methods.segmentation_data import SegmentationData
from gingham.methods.segmentation_recipe import Refinement
from gingham.nn.inference import whole_image
from trainings import trainer

NETWORK: dict[str, Any] = {
    "backbone": "small",
    "num_classes": 4,
    "context_channels": 8,
    "parsing_channels": 8,
    "detail_channels": 4,
    "edge_channels": 4,
    "dropout": 0.0,
    "backbone_options": {"widths": [8, 8, 8, 8]},
}


def items(count: int) -> list[dict[str, Tensor]]:
    return trainings.items(count, (32, 24), ignored_rows=2)


def recipe(**options: Any) -> SCHPRecipe:
    torch.manual_seed(0)
    made = SCHPRecipe(NETWORK, **{"warp_size": 48} | options)
    for name, tensor in made.network.named_parameters():
        if name.endswith("classifier.weight") or name == "fusion.4.weight":
            nn.init.normal_(tensor)  # every class occurs
    return made


def batch_of(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([item[name] for item in found]) for name in ("image", "label")}


# ---------------------------------------------------------------------------------------------------- loss


def test_loss_without_refinement_is_that_of_the_given_labels() -> None:
    batch, model = batch_of(items(2)), recipe(consistency_weight=0.3, parsing_weight=2.0, edge_weight=0.5)
    output = model.network(batch["image"])
    expected = parsing_loss(output, batch["label"], consistency_weight=0.3, parsing_weight=2.0, edge_weight=0.5)
    torch.testing.assert_close(model.loss(output, batch, None), expected)
    shares = recipe(lovasz_share=0.0).loss(output, batch, None), recipe().loss(output, batch, None)
    assert not torch.allclose(*shares)


@pytest.mark.parametrize("semantics", ["corrected", "official"])
@pytest.mark.parametrize("reduction", ["element", "pixel"])
def test_refined_labels_and_the_teachers_edges_are_learnt_in_cycles(semantics: Any, reduction: Any) -> None:
    batch, model = batch_of(items(2)), recipe(semantics=semantics, reduction=reduction)
    output = model.network(batch["image"])
    teacher = ParsingOutput(*(torch.randn_like(logits) for logits in output))
    labels = batch["label"]
    blend: Any = "logits" if semantics == "official" else "probabilities"
    assert model.blend == blend and model.semantics == semantics
    soft = refined_labels(teacher.logits, labels, 0.25, blend=blend)
    loss = model.loss(output, batch, Refinement(soft, teacher, 0.25))
    edges = refined_labels(teacher.edge, edge_map(labels), 0.25, blend=blend)
    expected = parsing_loss(output, labels, soft=SoftLabels(soft, edges), semantics=semantics, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    alone = model.loss(output, batch, Refinement(soft, None, 0.25))
    without = parsing_loss(output, labels, soft=SoftLabels(soft, None), semantics=semantics, reduction=reduction)
    torch.testing.assert_close(alone, without)
    assert not torch.allclose(alone, loss)


@pytest.mark.filterwarnings("ignore")
def test_training_learns_the_colours(tmp_path: Path) -> None:
    model = recipe(optimizer="adamw", learning_rate=0.02, warp_size=None)
    loader = DataLoader(items(16), 8)
    trainer(tmp_path, max_epochs=12).fit(model, loader)
    (scores,) = trainer(tmp_path).validate(model, DataLoader(items(16), 4), verbose=False)
    assert scores["val_miou"] > 0.8


@pytest.mark.filterwarnings("ignore")
def test_any_strategy_may_refine_the_labels_of_a_batch(tmp_path: Path) -> None:
    class Wrong(lightning.Callback):
        """Says that everything is class 2."""

        def on_fit_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
            pl_module.refine = self.refine

        def refine(self, batch: Any) -> Refinement:
            labels = torch.zeros(len(batch["label"]), 4, *batch["label"].shape[1:])
            labels[:, 2] = 1
            return Refinement(labels, None, 0.5)

    model = recipe(optimizer="adamw", learning_rate=0.02, lovasz_share=0.0, reduction="pixel", warp_size=None)
    run = trainer(tmp_path, max_epochs=30, callbacks=[Wrong()], limit_val_batches=0)
    run.fit(model, DataLoader(items(8), 8))
    predicted = model.eval().predict_classes(batch_of(items(8))["image"])
    assert (predicted == 2).double().mean() > 0.9


@pytest.mark.filterwarnings("ignore")
def test_optimiser_has_the_official_group(tmp_path: Path) -> None:
    model = recipe(learning_rate=7e-3, weight_decay=5e-4)
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(model, DataLoader(items(2), 2))
    (group,) = model.trainer.optimizers[0].param_groups
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 5e-4, False)
    assert len(group["params"]) == len(list(model.network.parameters()))


# ---------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("protocol", ["labels", "logits"])
@pytest.mark.parametrize("semantics", ["corrected", "official"])
def test_pictures_are_evaluated_in_the_square(protocol: Any, semantics: Any) -> None:
    model, images = recipe(protocol=protocol, semantics=semantics).eval(), batch_of(items(2))["image"]
    square = whole_image(model.network, warp_to_network(images, 48))
    centre = semantics == "official" and protocol == "labels"
    expected = warp_from_network(square, (32, 24), protocol=protocol, whole_centre=centre)
    torch.testing.assert_close(model(images), expected)
    assert torch.equal(model.predict_classes(images), expected.argmax(1))
    assert not torch.allclose(whole_image(model.network, images), expected)


def test_without_a_square_pictures_are_evaluated_as_they_are() -> None:
    model, images = recipe(warp_size=None).eval(), batch_of(items(2))["image"]
    torch.testing.assert_close(model(images), whole_image(model.network, images))


def test_black_around_the_pictures_is_an_option() -> None:
    images = batch_of(items(2))["image"]
    white = (2.0, 2.0, 2.0)
    model = recipe(black=white).eval()
    square = whole_image(model.network, warp_to_network(images, 48, black=white))
    torch.testing.assert_close(model(images), warp_from_network(square, (32, 24)))
    assert recipe().black == IMAGENET_BLACK


class Mirrored(nn.Module):
    """Exactly mirror-equivariant: classes 1 and 2 are the left and the right of the same thing."""

    def forward(self, images: Tensor) -> ParsingOutput:
        place = torch.linspace(-1, 1, images.shape[-1]).expand(len(images), 1, *images.shape[-2:])
        left, right = images.sum(1, keepdim=True) - 9 * place, images.sum(1, keepdim=True) + 9 * place
        logits = torch.cat([images[:, :1], left, right, images[:, 1:2]], dim=1)
        return ParsingOutput(logits, logits, logits[:, :2])


def test_flipping_changes_nothing_for_a_network_that_mirrors() -> None:
    images = torch.randn(2, 3, 31, 24)
    results = {}
    for flip in (False, True):
        model = recipe(flip=flip, mirror_pairs=((1, 2),)).eval()
        model.network = Mirrored()
        results[flip] = model(images)
    torch.testing.assert_close(results[True], results[False])
    model.mirror_pairs = ()
    assert not torch.allclose(model(images), results[False])


def test_one_scale_is_plain_and_others_are_averaged() -> None:
    images = batch_of(items(2))["image"]
    plain = recipe().eval()
    torch.testing.assert_close(recipe(scales=(1.0,)).eval()(images), plain(images))
    square = warp_to_network(images, 48)
    small = F.interpolate(square, size=(33, 33), mode="bilinear", align_corners=True)
    expected = (whole_image(plain.network, square) + resized(plain.network(small).logits)) / 2
    both = recipe(scales=(1.0, 0.7)).eval()  # 33.6 pixels, rounded down
    torch.testing.assert_close(both(images), warp_from_network(expected, (32, 24)))


def resized(logits: Tensor) -> Tensor:
    """To the size of the small square, then to that of the square, as the averaging does it."""
    for side in (33, 48):
        logits = F.interpolate(logits, size=(side, side), mode="bilinear", align_corners=True)
    return logits


def test_scales_give_the_official_sizes() -> None:
    model = recipe(warp_size=473, scales=(0.5, 0.75, 0.8, 1.0, 1.2, 1.25, 1.5))
    assert [round(473 * scale) for scale in model.scales] == [236, 354, 378, 473, 567, 591, 709]
    assert model.scales[3] == 1
    assert recipe(warp_size=None, scales=(0.75,)).scales == (0.75,)


@pytest.mark.filterwarnings("ignore")
def test_scores_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    model = recipe(flip=True, scales=(0.7, 1.0))
    one, three = (trainer(tmp_path).validate(model, DataLoader(items(3), size), verbose=False)[0] for size in (1, 3))
    assert one == pytest.approx(three, abs=1e-4)
    assert one["val_miou"] > 0


@pytest.mark.filterwarnings("ignore")
def test_right_predictions_score_full_marks_for_the_classes_that_occur(tmp_path: Path) -> None:
    """In blocks, the way to the square and back costs nothing; a class that occurs nowhere counts 0."""

    class Painted(nn.Module):
        def forward(self, images: Tensor) -> ParsingOutput:
            logits = F.one_hot(images[:, 0].round().long().clamp(0, 3), 4).movedim(-1, 1).float()
            return ParsingOutput(logits, logits, logits[:, :2])

    label = torch.tensor([[0, 1], [2, 1]]).repeat_interleave(16, 0).repeat_interleave(12, 1)
    label[:2] = 255
    image = label.masked_fill(label == 255, 0).float().expand(3, 32, 24)
    model = recipe(black=(0.0, 0.0, 0.0), warp_size=95)
    model.network = Painted()
    (scores,) = trainer(tmp_path).validate(model, DataLoader([{"image": image, "label": label}]), verbose=False)
    assert [scores[f"val_iou/{index:02d}"] for index in range(4)] == [1, 1, 1, 0]
    assert scores["val_miou"] == 0.75 and scores["val_pixel_accuracy"] == 1


# ---------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "options",
    [
        {"semantics": "paper"},
        {"parsing_weight": -1.0},
        {"edge_weight": math.nan},
        {"consistency_weight": -0.1},
        {"lovasz_share": 1.5},
        {"reduction": "mean"},
        {"warp_size": 1},
        {"protocol": "nearest"},
        {"protocol": "logits", "warp_size": None},
        {"black": (0.0, 0.0, 0.0), "warp_size": None},
        {"scales": ()},
        {"mirror_pairs": ((1, 4),)},
        {"optimizer": "sgdx"},
    ],
    ids=str,
)
def test_options_outside_their_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} "):
        SCHPRecipe(NETWORK, **options)


def test_corners_are_no_option_since_the_network_aligns_them() -> None:
    assert recipe().corners_align((32, 24)) is True
    with pytest.raises(TypeError, match="align_corners"):
        recipe(align_corners=False)


def test_network_options_that_do_not_exist_are_named() -> None:
    with pytest.raises(ValueError, match="network has no option 'loops': there are backbone, num_classes"):
        SCHPRecipe(NETWORK | {"loops": 1})


@pytest.mark.parametrize("name", ["schp_lip", "schp_atr", "schp_person_part"])
def test_packaged_configurations_fit_their_data(name: str) -> None:
    config = yaml.safe_load(Path(config_file(name)).read_text())
    with torch.device("meta"):
        model = SCHPRecipe(**config["model"]["init_args"])  # reads no weights
    data = SegmentationData(**config["data"]["init_args"])
    assert model.num_classes == data.label_space().num_classes
    assert model.warp_size == config["data"]["init_args"]["crop"]
    assert data.augment.size == (model.warp_size, model.warp_size)
    assert isinstance(config["trainer"]["devices"], int)
    assert (model.learning_rate, model.weight_decay, config["trainer"]["max_epochs"]) == (0.007, 0.0005, 150)
