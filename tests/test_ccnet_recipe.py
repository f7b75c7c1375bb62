"""CCNet's recipe under Lightning's trainer: schedule, groups, evaluation, and what it refuses."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from torch.utils.data import DataLoader

pytest.importorskip("lightning")
import lightning
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gingham.cli.training import Pictures, config_file, packaged_configs
from gingham.errors import CheckpointError, DataError
from gingham.methods.ccnet.objective import category_consistent_loss, segmentation_loss
from gingham.methods.ccnet.recipe import CCNetRecipe
from gingham.methods.segmentation_data import SegmentationData
from gingham.nn.segmentation_loss import HardPixels, shrink_labels
from trainings import trainer

NETWORK: dict[str, Any] = {
    "backbone": "small",
    "num_classes": 7,
    "head_channels": 8,
    "auxiliary": False,
    "output_stride": 4,
    "backbone_options": {"widths": [4, 4, 4]},
}


def data(**options: Any) -> SegmentationData:
    return SegmentationData(**{"batch_size": 2, "crop": 64, "scales": None, "lengths": (6, 3, 3)} | options)


def items(count: int, size: int = 24) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.randn(3, size, size, generator=generator),
            "label": torch.randint(0, 7, (size, size), generator=generator),
        }
        for _ in range(count)
    ]


class Rates(lightning.Callback):
    """The learning rates of each step: of the network and of gamma."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


@pytest.mark.filterwarnings("ignore")
def test_any_loader_of_images_and_labels_will_do(tmp_path: Path) -> None:
    recipe = CCNetRecipe(NETWORK)
    run = trainer(tmp_path, max_epochs=1, callbacks=[Pictures()])
    run.fit(recipe, DataLoader(items(4), 2), DataLoader(items(2)))
    names = {"loss", "val_miou", "val_pixel_accuracy", "val_mean_accuracy", *(f"val_iou/{i:02d}" for i in range(7))}
    assert set(run.callback_metrics) == names
    (scores,) = run.test(recipe, DataLoader(items(2)), verbose=False)
    assert set(scores) == {name.replace("val", "test") for name in names - {"loss"}}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_pictures_are_drawn_in_the_precision_of_the_training(tmp_path: Path, precision: Any) -> None:
    run = trainer(tmp_path, max_epochs=1, callbacks=[Pictures(2)], precision=precision)
    run.fit(CCNetRecipe(NETWORK), data())
    assert (tmp_path / "predictions.png").is_file()


@pytest.mark.filterwarnings("ignore")
def test_learning_rates_rise_and_fall_as_the_paper_has_it(tmp_path: Path) -> None:
    rates = Rates()
    recipe = CCNetRecipe(NETWORK, learning_rate=0.01, warmup_steps=4, gamma_rate=10.0)
    trainer(tmp_path, max_epochs=4, callbacks=[rates], limit_val_batches=0).fit(recipe, data())
    total = 12  # 4 epochs of 3 batches
    expected = [0.01 * min(1, (t + 1) / 4) * (1 - t / total) ** 0.9 for t in range(total)]
    assert [network for network, _ in rates.seen] == pytest.approx(expected)
    assert [gamma for _, gamma in rates.seen] == pytest.approx([10 * rate for rate in expected])
    groups = recipe.trainer.optimizers[0].param_groups
    assert [len(group["params"]) for group in groups] == [len(list(recipe.parameters())) - 1, 1]
    assert groups[0]["momentum"] == 0.9


@pytest.mark.filterwarnings("ignore")
def test_accumulation_counts_as_one_step_of_the_schedule(tmp_path: Path) -> None:
    rates = Rates()
    run = trainer(tmp_path, max_epochs=2, callbacks=[rates], limit_val_batches=0, accumulate_grad_batches=3)
    run.fit(CCNetRecipe(NETWORK, learning_rate=1e-3), data())
    assert [network for network, _ in rates.seen] == pytest.approx([1e-3] * 3 + [1e-3 * 0.5**0.9] * 3)


@pytest.mark.filterwarnings("ignore")
def test_a_training_without_an_end_has_no_schedule(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=-1, limit_val_batches=0)
    with pytest.raises(MisconfigurationException, match=r"trainer\.max_epochs or trainer\.max_steps must be given"):
        run.fit(CCNetRecipe(NETWORK), data())


@pytest.mark.filterwarnings("ignore")
def test_adamw_and_no_attention_have_one_group(tmp_path: Path) -> None:
    recipe = CCNetRecipe(NETWORK | {"loops": 0}, optimizer="adamw")
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(recipe, data())
    (optimizer,) = recipe.trainer.optimizers
    assert isinstance(optimizer, torch.optim.AdamW)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(("shared", "gammas"), [(True, 1), (False, 2)])
def test_layer_scales_of_a_backbone_have_its_rate(shared: bool, gammas: int) -> None:
    network = NETWORK | {"backbone": "convnext_atto", "output_stride": 32, "shared": shared}
    recipe = CCNetRecipe(network | {"backbone_options": {"depths": (1,) * 4, "dims": (8,) * 4}}, gamma_rate=10.0)
    others, attention = recipe.parameter_groups()
    assert [parameter.shape for parameter in attention["params"]] == [(1,)] * gammas
    assert len(others["params"]) + gammas == len(list(recipe.parameters()))
    assert attention["lr"] == 10 * recipe.learning_rate


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"evaluation": "sliding", "tile": 32}, {"scales": (0.5, 1.0), "flip": True}])
def test_scores_do_not_depend_on_the_batch_size(tmp_path: Path, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    recipe = CCNetRecipe(NETWORK, **options)
    recipe.network.head.bottleneck[-1].weight.data.normal_()  # all classes occur
    one, three = (
        trainer(tmp_path).validate(recipe, datamodule=data(evaluation_batch_size=size), verbose=False)[0]
        for size in (1, 3)
    )
    assert one == pytest.approx(three, abs=1e-4)
    assert one["val_miou"] > 0


def test_sliding_and_whole_evaluation_are_what_they_are_called() -> None:
    torch.manual_seed(0)
    images = torch.randn(1, 3, 48, 48)
    whole = CCNetRecipe(NETWORK).eval()
    weights = whole.state_dict()
    results = {}
    for name, options in {"tile": {"tile": 48}, "tiles": {"tile": 32}}.items():
        recipe = CCNetRecipe(NETWORK, evaluation="sliding", **options).eval()
        recipe.load_state_dict(weights)
        results[name] = recipe(images)
    assert results["tile"].shape == (1, 7, 48, 48)
    torch.testing.assert_close(results["tile"], whole(images))
    assert not torch.allclose(results["tiles"], whole(images))
    flipped = CCNetRecipe(NETWORK, flip=True).eval()
    flipped.load_state_dict(weights)
    torch.testing.assert_close(flipped(images), (whole(images) + whole(images.flip(-1)).flip(-1)) / 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("aligned", [True, False])
def test_corners_are_aligned_in_training_and_evaluation_alike(aligned: bool) -> None:
    torch.manual_seed(0)
    (item,) = items(1)
    recipe = CCNetRecipe(NETWORK | {"dropout": 0.0}, align_corners=aligned).eval()
    batch: Any = {name: value[None] for name, value in item.items()}
    logits = F.interpolate(
        recipe.network(batch["image"]).logits, batch["label"].shape[-2:], mode="bilinear", align_corners=aligned
    )
    torch.testing.assert_close(recipe(batch["image"]), logits)
    loss = recipe.loss(recipe.network(batch["image"]), batch, None)
    torch.testing.assert_close(loss, F.cross_entropy(logits, batch["label"]))


@pytest.mark.filterwarnings("ignore")
def test_the_category_consistent_loss_is_added_with_its_weights() -> None:
    (item,) = items(1)
    batch: Any = {name: value[None] for name, value in item.items()}
    losses = {}
    for weights in ((0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (2.0, 0.0, 0.0)):
        torch.manual_seed(0)
        recipe = CCNetRecipe(NETWORK | {"category_channels": 4, "dropout": 0.0}, category_weights=weights)
        for parameter in recipe.network.category_projection.parameters():
            parameter.data *= 20  # features far apart
        losses[weights[0]] = recipe.training_step(batch, 0).item()
    assert losses[1.0] > losses[0.0]
    assert losses[2.0] - losses[0.0] == pytest.approx(2 * (losses[1.0] - losses[0.0]), rel=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("aligned", [True, False])
def test_the_category_consistent_loss_follows_the_corner_rule(aligned: bool) -> None:
    torch.manual_seed(0)
    (item,) = items(1)
    batch: Any = {name: value[None] for name, value in item.items()}
    network = NETWORK | {"category_channels": 4, "dropout": 0.0}
    recipe = CCNetRecipe(network, category_weights=(1.0, 1.0, 0.001), align_corners=aligned)
    output = recipe.network(batch["image"])
    small = shrink_labels(batch["label"], output.features.shape[-2:], align_corners=aligned)
    variance, distance, regularity = category_consistent_loss(output.features, small)
    expected = segmentation_loss(output, batch["label"], align_corners=aligned) + variance + distance
    torch.testing.assert_close(recipe.loss(output, batch, None), expected + 0.001 * regularity)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgdx"},
        {"learning_rate": -1.0},
        {"learning_rate": math.nan},
        {"weight_decay": -0.1},
        {"power": -1.0},
        {"warmup_steps": -1},
        {"gamma_rate": -1.0},
        {"auxiliary_weight": -0.1},
        {"category_weights": (1.0, 1.0, 0.001)},  # without category_channels
        {"evaluation": "both"},
        {"tile": 0},
        {"scales": ()},
        {"scales": (1.0, 0.0)},
        {"average": "votes"},
        {"report_classes": (7,)},
        {"report_classes": (-1,)},
    ],
    ids=str,
)
def test_options_outside_their_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} "):
        CCNetRecipe(NETWORK, **options)


def test_networks_that_do_not_fit_the_options_are_refused() -> None:
    with pytest.raises(ValueError, match="category_channels come together"):
        CCNetRecipe(NETWORK | {"category_channels": 4})
    with pytest.raises(ValueError, match="network has no option 'loop': there are backbone, num_classes, loops"):
        CCNetRecipe(NETWORK | {"loop": 1})


@pytest.mark.parametrize("options", [{"threshold": 1.5}, {"threshold": -0.1}, {"min_kept": -1}, {"shrink": 0}], ids=str)
def test_hard_pixels_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must"):
        HardPixels(**options)


@pytest.mark.filterwarnings("ignore")
def test_the_number_of_classes_must_be_that_of_the_data(tmp_path: Path) -> None:
    recipe = CCNetRecipe(NETWORK | {"num_classes": 5})
    for evaluate in (trainer(tmp_path).fit, trainer(tmp_path).validate, trainer(tmp_path).test):
        with pytest.raises(DataError, match="num_classes 5, the data set has 7 classes"):
            evaluate(recipe, datamodule=data())


@pytest.mark.filterwarnings("ignore")
def test_a_split_without_labels_has_no_score(tmp_path: Path) -> None:
    unlabelled = [item | {"label": torch.full((24, 24), 255)} for item in items(2)]
    with pytest.raises(DataError, match=r"the test split has no labelled pixels; .*gingham validate"):
        trainer(tmp_path).test(CCNetRecipe(NETWORK), DataLoader(unlabelled), verbose=False)
    with pytest.raises(DataError, match="the val split has no labelled pixels"):
        trainer(tmp_path).validate(CCNetRecipe(NETWORK), DataLoader(unlabelled), verbose=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("skip_absent", [True, False])
def test_reported_classes_that_occur_nowhere_are_left_out_where_they_shall_be(
    tmp_path: Path, skip_absent: bool
) -> None:
    recipe = CCNetRecipe(NETWORK, report_classes=(1, 6), skip_absent=skip_absent)
    recipe.predict_classes = lambda images: torch.ones(1, 24, 24, dtype=torch.int64)  # type: ignore[method-assign]
    label = torch.ones(24, 24, dtype=torch.int64)
    label[:6] = 2
    loader = DataLoader([items(1)[0] | {"label": label}])
    (scores,) = trainer(tmp_path).validate(recipe, loader, verbose=False)
    assert scores["val_focus_iou"] == pytest.approx(0.75 if skip_absent else 0.375)


@pytest.mark.filterwarnings("ignore")
def test_the_data_module_says_which_classes_mirror(tmp_path: Path) -> None:
    recipe = CCNetRecipe(NETWORK, mirror_pairs=((0, 1),))
    assert recipe.mirror_pairs == ((0, 1),)
    trainer(tmp_path).validate(recipe, DataLoader(items(1)), verbose=False)
    assert recipe.mirror_pairs == ((0, 1),)
    trainer(tmp_path).validate(recipe, datamodule=data(), verbose=False)
    assert recipe.mirror_pairs == ()  # the scenes have none


@pytest.mark.filterwarnings("ignore")
def test_backbone_weights_are_read_for_a_new_training_only(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = CCNetRecipe(NETWORK).network.backbone.body
    file = tmp_path / "backbone.pth"
    torch.save(source.state_dict(), file)
    options = NETWORK | {"backbone_weights": str(file)}
    recipe = CCNetRecipe(options, learning_rate=1e-12)
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(recipe, data())
    weight = "stages.0.0.weight"
    torch.testing.assert_close(recipe.network.backbone.body.state_dict()[weight], source.state_dict()[weight])
    run.save_checkpoint(tmp_path / "last.ckpt")
    file.unlink()
    again = CCNetRecipe(options)
    trainer(tmp_path).validate(again, datamodule=data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    trainer(tmp_path, max_steps=2).fit(again, data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    with pytest.raises(CheckpointError, match=r"backbone\.pth"):
        trainer(tmp_path).fit(CCNetRecipe(options), data())


@pytest.mark.filterwarnings("ignore")
def test_a_run_goes_on_with_its_own_optimizer(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(CCNetRecipe(NETWORK), data())
    run.save_checkpoint(tmp_path / "last.ckpt")
    other = CCNetRecipe(NETWORK, optimizer="adamw")
    with pytest.raises(CheckpointError, match="with optimizer sgd, not adamw"):
        trainer(tmp_path, max_steps=2).fit(other, data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("name", [name for name in packaged_configs() if name.startswith("ccnet_")])
def test_packaged_configurations_fit_their_data_and_fix_the_batch(name: str) -> None:
    config = yaml.safe_load(Path(config_file(name)).read_text())
    options = config["model"]["init_args"]
    if "hard_pixels" in options:
        options["hard_pixels"] = HardPixels()
    recipe = CCNetRecipe(**options)  # reads no weights
    assert recipe.num_classes == SegmentationData(**config["data"]["init_args"]).label_space().num_classes
    assert isinstance(config["trainer"]["devices"], int)
    if "world" not in name:  # corners of image and features meet where a crop of 8 n + 1 pixels gives n + 1
        assert recipe.align_corners == (config["data"]["init_args"]["crop"] % 8 == 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.cuda)])
def test_random_numbers_go_on_where_the_run_was(tmp_path: Path, device: str) -> None:
    def state() -> Tensor:
        return torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()

    def draw() -> None:
        torch.rand(3, device="cpu" if device == "cpu" else "cuda")

    class AtTheFirstStep(lightning.Callback):
        def on_before_zero_grad(self, *_: Any) -> None:
            states.append(state())

    states: list[Tensor] = []
    steps = {"limit_val_batches": 0, "accelerator": device, "callbacks": [AtTheFirstStep()]}
    without_dropout = NETWORK | {"dropout": 0.0}
    run = trainer(tmp_path, max_steps=1, **steps)
    run.fit(CCNetRecipe(without_dropout), data())
    run.save_checkpoint(tmp_path / "last.ckpt")
    draw()
    assert not torch.equal(state(), states[0])
    run = trainer(tmp_path, max_steps=2, **steps)
    run.fit(CCNetRecipe(without_dropout), data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(states[1], states[0])
