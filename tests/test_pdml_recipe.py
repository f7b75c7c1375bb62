"""PDML's recipe under Lightning's trainer: its losses and when they begin, purity, checkpoints, and what it refuses."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader

pytest.importorskip("lightning", reason="training needs the extra: pip install gingham[train]")
import lightning
from lightning.pytorch.plugins.precision import HalfPrecision

from gingham.cli.training import config_file
from gingham.data.points import WithPoints, collate_points
from gingham.data.transforms import EvaluationTransform, RandomScaleCropFlip
from gingham.data.wardrobe.point_scenes import PointScenes
from gingham.errors import DataError
from gingham.methods.pdml.objective import contrastive_metric, pool_points, prototype_metric, triplet_metric
from gingham.methods.pdml.recipe import DistanceMetric, LabelExtension, PDMLRecipe
from gingham.methods.segmentation_data import SegmentationData
from gingham.methods.segmentation_recipe import Refinement
from gingham.metrics import SegmentationMeter
from gingham.metrics.embedding_purity import EmbeddingPurity
from gingham.nn.point_sampling import sample_at_points
from trainings import trainer

pytestmark = pytest.mark.usefixtures("one_thread")

NETWORK: dict[str, Any] = {
    "backbone": "small",
    "num_classes": 6,
    "head_channels": 8,
    "bins": (1, 2),
    "output_stride": 4,
    "dropout": 0.0,
    "backbone_options": {"widths": [8, 8, 8]},
}


def train_loader(count: int = 8, batch: int = 4) -> DataLoader[Any]:
    scenes = PointScenes("train", count, transform=RandomScaleCropFlip(64, rescale=None, flip_probability=0))
    return DataLoader(WithPoints(scenes, scenes.points), batch, collate_fn=collate_points)


def val_loader(count: int = 6, batch: int = 3) -> DataLoader[Any]:
    return DataLoader(PointScenes("val", count, transform=EvaluationTransform()), batch)


@pytest.fixture(scope="module")
def batch() -> Any:
    return next(iter(train_loader()))


def recipe(network: dict[str, Any] | None = None, **options: Any) -> PDMLRecipe:
    torch.manual_seed(0)
    return PDMLRecipe(NETWORK | (network or {}), **options)


class Weights(lightning.Callback):
    """What the terms of the loss were at each step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.mark.filterwarnings("ignore")
def test_a_training_logs_its_terms_and_a_test_its_purity(tmp_path: Path) -> None:
    made = recipe(
        metric=DistanceMetric(warmup_epochs=0, memory=2),
        extension=LabelExtension(begin=0.0, threshold=0.1, metric_pixels=2),
        purity_pixels=1,
    )
    run = trainer(tmp_path, max_epochs=1)
    run.fit(made, train_loader(), val_loader())
    terms = {"loss", "loss_points", "loss_metric", "metric_mean", "metric_active", "images_without_points"}
    terms |= {"loss_extension", "extension_coverage", "extension_accuracy"}
    scores = {"val_miou", "val_pixel_accuracy", "val_mean_accuracy", "val_purity", "val_distance_ratio"}
    assert set(run.callback_metrics) == terms | scores | {f"val_iou/{index:02d}" for index in range(6)}
    assert run.callback_metrics["images_without_points"] == 0
    assert 0 < run.callback_metrics["extension_coverage"] <= 1
    (tested,) = run.test(made, val_loader(), verbose=False)
    assert {"test_purity", "test_distance_ratio", "test_miou"} <= set(tested)
    assert 0 <= tested["test_purity"] <= 1 and 0.5 < tested["test_distance_ratio"] < 2
    (again,) = run.test(made, val_loader(batch=2), verbose=False)
    assert again == pytest.approx(tested, abs=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_the_metric_waits_for_its_warm_up_and_the_extension_for_its_turn(tmp_path: Path) -> None:
    seen = Weights()
    made = recipe(
        metric=DistanceMetric(weight=2.0, warmup_epochs=1),
        extension=LabelExtension(weight=4.0, begin=0.5, ramp_epochs=1.0, threshold=0.0, largest_share=1.0),
        learning_rate=1e-12,
    )
    trainer(tmp_path, max_epochs=4, callbacks=[seen], limit_val_batches=0).fit(made, train_loader())
    steps = [{"loss_extension": 0.0} | terms for terms in seen.seen]
    assert len(steps) == 8
    for step, terms in enumerate(steps):
        metric = 2.0 if step >= 2 else 0.0
        extension = 0.0 if step < 4 else 4.0 * min(1.0, (step - 4 + 1) / 2)
        expected = terms["loss_points"] + metric * terms["loss_metric"] + extension * terms["loss_extension"]
        assert terms["loss"] == pytest.approx(expected, rel=1e-5)
        assert terms["loss_metric"] > 0 and (step < 4 or terms["loss_extension"] > 0)


@pytest.mark.filterwarnings("ignore")
def test_training_lowers_the_loss_and_repeats(tmp_path: Path) -> None:
    losses = []
    loader: DataLoader[Any] = DataLoader(list(train_loader()), batch_size=None)  # type: ignore[arg-type]
    for _ in range(2):
        seen = Weights()
        made = recipe(metric=DistanceMetric(warmup_epochs=0, memory=4), optimizer="adamw", learning_rate=0.02)
        trainer(tmp_path, max_epochs=10, callbacks=[seen], limit_val_batches=0).fit(made, loader)
        losses.append([terms["loss"] for terms in seen.seen])
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0.8 * losses[0][0]


def test_points_stay_where_they_are_in_low_precision() -> None:
    items = [{"image": torch.zeros(3, 400, 500), "points": torch.tensor([[1.0, 257.0, 301.0], [2.0, 2.5, 399.4]])}]
    batch = HalfPrecision("bf16-true").convert_input(collate_points(items))
    assert batch["image"].dtype == torch.bfloat16
    pool = pool_points(batch["points"])
    assert pool.y.tolist() == [257, 3] and pool.x.tolist() == [301, 399] and pool.label.tolist() == [1, 2]


@pytest.mark.filterwarnings("ignore")
def test_the_terms_are_those_of_the_objective(batch: Any) -> None:
    made = recipe(metric=DistanceMetric(warmup_epochs=0))
    output = made.network(batch["image"])
    base = recipe().loss(output, batch, None)
    for metric, function, options in (
        (DistanceMetric(warmup_epochs=0), triplet_metric, {}),
        (DistanceMetric("triplet", 0.5, 0, margin=0.7, squared=True), triplet_metric, {"margin": 0.7, "squared": True}),
        (DistanceMetric("contrastive", 2.0, 0), contrastive_metric, {"margin": 1.0}),
        (DistanceMetric("prototype", 1.0, 0, average="all"), prototype_metric, {"average": "all"}),
        (DistanceMetric(warmup_epochs=0, mining="hardest"), triplet_metric, {"mining": "hardest"}),
    ):
        points = pool_points(batch["points"])
        features = sample_at_points(output.features, *points[:3], (64, 64))
        expected = base + metric.weight * function(features, points.label, **options).loss
        torch.testing.assert_close(recipe(metric=metric).loss(output, batch, None), expected)


@pytest.mark.filterwarnings("ignore")
def test_the_scope_of_one_image_has_less_to_compare(batch: Any) -> None:
    one_a_class = batch | {"points": batch["points"].clone()}
    for points in one_a_class["points"]:
        for index, label in enumerate(points[:, 0].tolist()):
            if label in points[:index, 0].tolist():
                points[index, 0] = 255
    output = recipe().network(batch["image"])
    base = recipe().loss(output, one_a_class, None)
    alone = recipe(metric=DistanceMetric(warmup_epochs=0, scope="image")).loss(output, one_a_class, None)
    torch.testing.assert_close(alone, base)
    assert recipe(metric=DistanceMetric(warmup_epochs=0)).loss(output, one_a_class, None) > base


@pytest.mark.filterwarnings("ignore")
def test_the_memory_is_filled_and_is_part_of_a_checkpoint(tmp_path: Path) -> None:
    made = recipe(metric=DistanceMetric(warmup_epochs=5, memory=3))
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    run.fit(made, train_loader())
    assert made.memory is not None
    features, labels = made.memory.contents()
    assert 6 <= len(features) <= 18 and not features.requires_grad and features.any()
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = recipe(metric=DistanceMetric(warmup_epochs=5, memory=3))
    trainer(tmp_path).validate(again, val_loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False)
    assert again.memory is not None
    assert all(torch.equal(one, other) for one, other in zip(again.memory.contents(), (features, labels), strict=True))


@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    def made() -> PDMLRecipe:
        return recipe(
            {"dropout": 0.3},
            metric=DistanceMetric(warmup_epochs=1, memory=2),
            extension=LabelExtension(begin=0.5, threshold=0.2),
        )

    def data() -> SegmentationData:
        return SegmentationData(
            "wardrobe_points", points="instances", batch_size=4, crop=64, scales=None, lengths=(8, 1, 1)
        )

    options: dict[str, Any] = {"limit_val_batches": 0}
    whole = made()
    trainer(tmp_path, max_epochs=4, **options).fit(whole, data())
    first = made()

    class Stop(lightning.Callback):
        def on_train_epoch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    run = trainer(tmp_path, max_epochs=4, callbacks=[Stop()], **options)
    run.fit(first, data())
    run.save_checkpoint(tmp_path / "half.ckpt")
    second = made()
    trainer(tmp_path, max_epochs=4, **options).fit(second, data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for (name, one), other in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore")
def test_training_on_a_gpu_fills_the_memory_extends_labels_and_goes_on(tmp_path: Path) -> None:
    def made() -> PDMLRecipe:
        return recipe(
            {"metric_channels": 4, "auxiliary": True, "auxiliary_channels": 4},
            metric=DistanceMetric(warmup_epochs=1, memory=2),
            extension=LabelExtension(begin=0.3, threshold=0.1, metric_pixels=1),
            purity_pixels=1,
        )

    first = made()
    run = trainer(tmp_path, accelerator="gpu", max_epochs=2)
    run.fit(first, train_loader(), val_loader())
    assert first.memory is not None and first.memory.pushed.sum() > 0
    assert run.callback_metrics["loss"].isfinite() and run.callback_metrics["extension_coverage"] > 0
    assert 0 <= run.callback_metrics["val_purity"] <= 1
    run.save_checkpoint(tmp_path / "last.ckpt")
    second, before = made(), int(first.memory.pushed.sum())
    run = trainer(tmp_path, accelerator="gpu", max_epochs=3)
    run.fit(second, train_loader(), val_loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert second.memory is not None and second.memory.pushed.sum() > before
    device = run.strategy.root_device
    batch = {name: value.to(device) for name, value in next(iter(train_loader())).items() if name != "name"}
    second.to(device).eval()
    output = second.network(batch["image"])
    points = pool_points(batch["points"])
    there = sample_at_points(output.logits, *points[:3], (64, 64)).cpu()
    second.cpu()
    points = pool_points(batch["points"].cpu())
    here = sample_at_points(second.network(batch["image"].cpu()).logits, *points[:3], (64, 64))
    torch.testing.assert_close(there, here, rtol=0.01, atol=0.01)


@pytest.mark.filterwarnings("ignore")
def test_dense_labels_are_an_upper_bound_without_points(batch: Any) -> None:
    made = recipe(supervision="labels")
    output = made.network(batch["image"])
    without = {name: value for name, value in batch.items() if name != "points"}
    full = torch.nn.functional.interpolate(output.logits, size=(64, 64), mode="bilinear", align_corners=True)
    torch.testing.assert_close(
        made.loss(output, without, None), torch.nn.functional.cross_entropy(full, batch["label"])
    )
    soft = torch.nn.functional.one_hot(batch["label"], 6).movedim(-1, 1).float()
    refined = Refinement(soft, None, 0.5)
    torch.testing.assert_close(made.loss(output, without, refined), made.loss(output, without, None))
    with_metric = recipe(supervision="labels", metric=DistanceMetric(warmup_epochs=0))
    assert with_metric.loss(output, batch, None) > made.loss(output, batch, None)


@pytest.mark.filterwarnings("ignore")
def test_the_auxiliary_head_learns_with_its_weight(batch: Any) -> None:
    made = recipe({"auxiliary": True, "auxiliary_channels": 4}, auxiliary_weight=0.4)
    output = made.network(batch["image"])
    main = made.loss(output._replace(auxiliary=None), batch, None)
    both = made.loss(output._replace(auxiliary=output.logits), batch, None)
    torch.testing.assert_close(both, 1.4 * main)


@pytest.mark.filterwarnings("ignore")
def test_images_that_lost_their_points_cost_nothing(batch: Any) -> None:
    nothing = batch | {"points": torch.full_like(batch["points"], 255)}
    made = recipe(metric=DistanceMetric(warmup_epochs=0, memory=2), extension=LabelExtension(begin=0, threshold=0))
    loss = made.loss(made.network(batch["image"]), nothing, None)
    loss.backward()
    assert loss == 0
    assert not any(p.grad is not None and p.grad.any() for p in made.network.parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("aligned", "padded_cells"), [(True, 14), (False, 15)])
def test_padding_follows_the_corner_rule(batch: Any, aligned: bool, padded_cells: int) -> None:
    made = recipe({"align_corners": aligned}, extension=LabelExtension(begin=0, threshold=0.0, largest_share=1.0))
    padded = batch | {"image": batch["image"].clone()}
    padded["image"][:, :, 5:] = 0  # the second row of cells lies at row 4.2 with aligned corners, else at 5.5
    found = made._extended(made.network(padded["image"]).logits, pool_points(batch["points"]), padded["image"]).labels
    assert (found[:, -padded_cells:] == 255).all()
    assert (found[:, :-padded_cells] != 255).any(dim=(0, 2)).all()


@pytest.mark.filterwarnings("ignore")
def test_padding_gets_no_extended_label(batch: Any) -> None:
    made = recipe(extension=LabelExtension(begin=0, threshold=0.0, largest_share=1.0))
    padded = batch | {"image": batch["image"].clone()}
    padded["image"][:, :, 32:] = 0
    logits = made.network(padded["image"]).logits
    found = made._extended(logits, pool_points(batch["points"]), padded["image"]).labels
    assert (found[:, 9:] == 255).all() and (found[:, :8] != 255).any()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("aligned", [True, False])
def test_one_option_of_the_network_says_how_corners_lie_everywhere(batch: Any, aligned: bool) -> None:
    made = recipe({"align_corners": aligned}, supervision="labels", metric=DistanceMetric(warmup_epochs=0)).eval()
    output = made.network(batch["image"])
    logits = torch.nn.functional.interpolate(output.logits, (64, 64), mode="bilinear", align_corners=aligned)
    torch.testing.assert_close(made(batch["image"]), logits)
    points = pool_points(batch["points"])
    features = sample_at_points(output.features, *points[:3], (64, 64), align_corners=aligned)
    expected = torch.nn.functional.cross_entropy(logits, batch["label"]) + triplet_metric(features, points.label).loss
    torch.testing.assert_close(made.loss(output, batch, None), expected)
    assert made.network.head.align_corners is aligned
    assert recipe({"align_corners": aligned}, purity_pixels=1).purity_meters["val"].align_corners is aligned
    with pytest.raises(TypeError, match="align_corners"):
        recipe(align_corners=aligned)


def test_probabilities_of_scales_are_averaged_unless_said_otherwise(batch: Any) -> None:
    assert recipe(average="logits").average == "logits"
    made = recipe(scales=(0.5, 1.0)).eval()
    images = batch["image"]
    resize = partial(torch.nn.functional.interpolate, mode="bilinear", align_corners=True)
    small = resize(resize(made.network(resize(images, (32, 32))).logits, (32, 32)), (64, 64))
    large = resize(made.network(images).logits, (64, 64))
    torch.testing.assert_close(made(images).exp(), (small.softmax(1) + large.softmax(1)) / 2)


def test_the_backbone_has_a_rate_of_its_own() -> None:
    made = recipe(backbone_rate=0.1, learning_rate=0.02)
    backbone, others = made.parameter_groups()
    assert backbone["lr"] == pytest.approx(0.002) and "lr" not in others
    assert len(backbone["params"]) == len(list(made.network.backbone.parameters()))
    assert len(backbone["params"]) + len(others["params"]) == len(list(made.parameters()))


def test_batches_without_points_and_refined_labels_are_refused(batch: Any) -> None:
    made = recipe()
    output = made.network(batch["image"])
    with pytest.raises(DataError, match=r"the batches have no points: .*--data\.points"):
        made.loss(output, {"image": batch["image"], "label": batch["label"]}, None)
    with pytest.raises(ValueError, match="refined labels need supervision 'labels'"):
        made.loss(output, batch, Refinement(torch.zeros(4, 6, 64, 64), None, 0.5))


@pytest.mark.parametrize(
    "options",
    [
        {"supervision": "boxes"},
        {"point_average": "classes"},
        {"auxiliary_weight": -0.1},
        {"backbone_rate": -1.0},
        {"purity_pixels": -1},
        {"extension": LabelExtension(), "supervision": "labels"},
        {"learning_rate": 0.0},
    ],
    ids=str,
)
def test_options_outside_their_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} "):
        recipe(**options)


def test_a_projection_without_a_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="metric must be given where the network has metric_channels"):
        recipe({"metric_channels": 4})
    assert recipe({"metric_channels": 4}, metric=DistanceMetric(memory=2)).memory.features.shape == (6, 2, 4)


@pytest.mark.parametrize(
    "options",
    [
        {"form": "quadruplet"},
        {"weight": -1.0},
        {"warmup_epochs": -1},
        {"scope": "world"},
        {"margin": 0.0},
        {"mining": "easy"},
        {"mining": "hardest", "form": "prototype"},
        {"average": "some"},
        {"memory": -1},
        {"memory": 4, "scope": "image"},
        {"squared": True, "form": "contrastive"},
    ],
    ids=str,
)
def test_metrics_that_cannot_be_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} "):
        DistanceMetric(**options)


@pytest.mark.parametrize(
    "options",
    [{"weight": -1.0}, {"begin": 1.5}, {"ramp_epochs": -1.0}, {"threshold": -0.1}, {"largest_share": 0.0}],
    ids=str,
)
def test_extensions_that_cannot_be_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must"):
        LabelExtension(**options)


@pytest.mark.parametrize("name", ["pdml_pascal_context", "pdml_ade20k", "pdml_world"])
def test_packaged_configurations_fit_their_data(name: str) -> None:
    config = yaml.safe_load(Path(config_file(name)).read_text())
    options = config["model"]["init_args"]
    options["metric"] = DistanceMetric(**options["metric"])
    options["extension"] = LabelExtension(**options["extension"]) if options.get("extension") else None
    with torch.device("meta"):
        made = PDMLRecipe(**options)  # reads no weights
    assert made.num_classes == SegmentationData(**config["data"]["init_args"]).label_space().num_classes
    assert config["data"]["init_args"]["points"] is not None
    assert isinstance(config["trainer"]["devices"], int)


def textures(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images of four textures in wavy bands [B, 3, 64, 64], their labels, and one point for each class [B, 4, 3]."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    waves = torch.stack([torch.sin(y * 1.2), torch.sin(x * 1.2), torch.sin((x + y) * 0.9), torch.sin(y) * torch.sin(x)])
    images, labels = torch.empty(count, 3, 64, 64), torch.empty(count, 64, 64, dtype=torch.int64)
    points = torch.empty(count, 4, 3)
    for index in range(count):
        order = torch.randperm(4, generator=generator)
        band = ((x + 6 * torch.sin(y / 9 + index)).clamp(0, 63) // 16).long()
        labels[index] = order[band]
        gain = 0.5 + torch.rand(3, 1, 1, generator=generator)
        noise = 0.8 * torch.randn(3, 64, 64, generator=generator)
        images[index] = waves.gather(0, labels[index][None])[0] * gain + noise
        for kind in range(4):
            places = (labels[index] == kind).nonzero()
            place = places[torch.randint(len(places), (), generator=generator)]
            points[index, kind] = torch.tensor([kind, *place.tolist()])
    return images, labels, points


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_metric_draws_classes_apart_and_costs_no_accuracy() -> None:
    images, labels, points = textures(32, seed=0)
    shown, truth, _ = textures(16, seed=1)
    ratios, accuracies = [], []
    for seed in range(3):
        for metric in (None, DistanceMetric(warmup_epochs=0, weight=0.3)):
            torch.manual_seed(seed)
            made = PDMLRecipe(NETWORK | {"num_classes": 4}, metric=metric)
            optimizer = torch.optim.AdamW(made.network.parameters(), lr=0.01)
            for step in range(60):
                batch = slice(8 * (step % 4), 8 * (step % 4) + 8)
                values = {"image": images[batch], "label": labels[batch], "points": points[batch]}
                loss = made.loss(made.network(values["image"]), values, None)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            made.eval()
            with torch.no_grad():
                output = made.network(shown)
            meter, scores = EmbeddingPurity(2), SegmentationMeter(4)
            meter.update(output.features, truth)
            scores.update(made(shown).argmax(1), truth)
            ratios.append(float(meter.compute().distance_ratio))
            accuracies.append(100 * float(scores.compute().miou))
    assert sum(ratios[1::2]) > 1.02 * sum(ratios[::2])  # a single seed hangs on the processor's rounding
    assert sum(accuracies[1::2]) / 3 > sum(accuracies[::2]) / 3 - 1
    assert min(accuracies) > 25  # both have learned: one class everywhere has 6


def _train_share(rank: int, folder: str, results: Any) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    address = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    made = two_process_recipe()
    share = two_process_batch(slice(2 * rank, 2 * rank + 2))
    model = torch.nn.parallel.DistributedDataParallel(Step(made))
    model(share).backward()
    results.put({name: parameter.grad.numpy() for name, parameter in made.network.named_parameters()})
    torch.distributed.destroy_process_group()


class Step(torch.nn.Module):
    """The recipe's loss of a batch as a module's output."""

    def __init__(self, made: PDMLRecipe) -> None:
        super().__init__()
        self.network, self.made = made.network, [made]

    def forward(self, batch: Any) -> Tensor:
        return self.made[0].loss(self.network(batch["image"]), batch, None)


def two_process_recipe() -> PDMLRecipe:
    made = recipe(
        {"bins": (2,)},
        metric=DistanceMetric(warmup_epochs=0, memory=2, margin=1.0),
        extension=LabelExtension(begin=0.0, ramp_epochs=0.0, threshold=0.12, largest_share=1.0, metric_pixels=1),
    )
    made.network.eval()  # batch norm by its own process's images would differ
    return made.double()


def two_process_batch(images: slice) -> Any:
    found = next(iter(train_loader()))
    points = found["points"].clone()
    points[1, 3:, 0] = 255  # processes have unequal numbers of points
    return {"image": found["image"][images].double(), "label": found["label"][images], "points": points[images]}


def test_two_processes_have_the_gradient_of_one(tmp_path: Path) -> None:
    warnings.filterwarnings("ignore")
    made = two_process_recipe()
    made.loss(made.network((whole := two_process_batch(slice(None)))["image"]), whole, None).backward()
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_train_share, args=(r, str(tmp_path), queue)) for r in range(2)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=180) for _ in workers]
    for worker in workers:
        worker.join(timeout=30)
    for gradients in results:
        for name, parameter in made.network.named_parameters():
            torch.testing.assert_close(torch.from_numpy(gradients[name]), parameter.grad, rtol=1e-5, atol=1e-8)


def without_batch_norm(module: torch.nn.Module) -> torch.nn.Module:
    """Batch norm sees the images of its own process alone."""
    for name, child in module.named_children():
        if isinstance(child, torch.nn.BatchNorm2d):
            setattr(module, name, torch.nn.Identity())
        else:
            without_batch_norm(child)
    return module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_train_the_network_of_one(tmp_path: Path) -> None:
    """With a projection, which has no gradient of its own in the warm-up of the metric."""
    trained = []
    for processes in (1, 2):
        made = recipe(
            {"metric_channels": 4},
            metric=DistanceMetric(warmup_epochs=1, memory=2, margin=1.0),
            extension=LabelExtension(begin=0.5, ramp_epochs=1.0, threshold=0.12, largest_share=1.0),
        )
        without_batch_norm(made.network)
        data = SegmentationData(
            "wardrobe_points",
            points="instances",
            batch_size=4 // processes,
            crop=64,
            scales=None,
            lengths=(8, 2, 1),
        )
        strategy = "auto" if processes == 1 else "ddp_spawn"
        trainer(tmp_path, max_epochs=2, devices=processes, strategy=strategy).fit(made, data)
        trained.append(made.state_dict())
    begun = without_batch_norm(recipe({"metric_channels": 4}, metric=DistanceMetric(memory=2))).state_dict()
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-4, atol=1e-6)
    assert not torch.equal(trained[0]["network.metric_projection.weight"], begun["network.metric_projection.weight"])
    assert trained[0]["memory.pushed"].sum() > 12
