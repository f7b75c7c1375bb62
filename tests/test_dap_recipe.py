"""The classifier under Lightning's trainer: what it logs, what ranks images, the command, and what it refuses."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

pytest.importorskip("lightning", reason="training needs the extra: pip install gingham[train]")
from PIL import Image

from gingham import create_model
from gingham.cli import main
from gingham.cli.options import config_file, instantiate, packaged_configs
from gingham.errors import DataError
from gingham.methods.dap.data import ClassificationData
from gingham.methods.dap.drop_and_pick import DropAndPick
from gingham.methods.dap.network import Classifier
from gingham.methods.dap.recipe import ClassificationRecipe
from gingham.nn.backbone import BackboneError
from trainings import trainer

pytestmark = pytest.mark.usefixtures("one_thread")

NETWORK: dict[str, Any] = {"backbone": "small", "num_classes": 10, "backbone_options": {"widths": [8, 16]}}


def recipe(**options: Any) -> ClassificationRecipe:
    torch.manual_seed(0)
    return ClassificationRecipe(NETWORK, **options)


def garments(**options: Any) -> ClassificationData:
    return ClassificationData(**{"batch_size": 16, "lengths": (96, 30, 30), **options})


@pytest.mark.filterwarnings("ignore")
def test_a_training_learns_and_logs_its_scores(tmp_path: Path) -> None:
    made, data = recipe(learning_rate=0.05), garments(lengths=(240, 60, 60))
    run = trainer(tmp_path, max_epochs=6)
    run.fit(made, data)
    assert set(run.callback_metrics) == {"loss", "val_accuracy", "val_top5"}
    assert run.callback_metrics["val_accuracy"] > 0.3  # chance is 0.1
    (scores,) = run.test(made, data, verbose=False)
    made.eval()
    predicted = torch.cat([made(batch["image"]) for batch in data.test_dataloader()])
    labels = data.dataset("test").targets
    assert scores["test_accuracy"] == pytest.approx((predicted.argmax(1) == labels).float().mean().item())
    top5 = (predicted.topk(5).indices == labels[:, None]).any(1).float().mean().item()
    assert scores["test_top5"] == pytest.approx(top5)
    by_class = [(predicted.argmax(1) == labels)[labels == kind].float().mean().item() for kind in range(10)]
    assert made.scores["test"].class_accuracy.tolist() == pytest.approx(by_class)


def test_what_fills_a_split_up_is_not_counted() -> None:
    made = recipe().eval()
    images, labels = torch.randn(3, 3, 28, 28), torch.tensor([0, 1, -1])
    made.evaluate({"image": images, "label": labels}, "val")
    predicted = made(images).argmax(1)
    found = made.meters["val"].compute()  # type: ignore[operator]
    assert found["accuracy"] == (predicted == labels)[:2].float().mean()
    assert found["class_accuracy"][:2].tolist() == (predicted == labels)[:2].tolist()
    assert found["class_accuracy"][2:].isnan().all()  # of no image, which is no accuracy of 0


def observed(made: ClassificationRecipe, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor, Tensor]:
    """The losses that rank images, the loss that is learned, and the logits of the whole images."""
    seen: list[Tensor] = []
    made.observe = lambda batch, losses: seen.append(losses)
    monkeypatch.setattr(made, "log", lambda *_, **__: None)
    torch.manual_seed(1)
    batch = {"image": torch.randn(6, 3, 28, 28), "label": torch.arange(6)}
    loss = made.training_step(batch, 0)
    return seen[0], loss.detach(), batch["image"]


def test_smoothed_labels_are_learned_and_plain_ones_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(label_smoothing=0.2)
    ranks, loss, images = observed(made, monkeypatch)
    logits = made.network(images)
    torch.testing.assert_close(ranks, F.cross_entropy(logits, torch.arange(6), reduction="none"))
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.arange(6), label_smoothing=0.2))
    assert not ranks.requires_grad


def test_mixed_images_rank_by_their_share_of_the_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(mixup=1.0, rank_mixed=True)
    ranks, loss, images = observed(made, monkeypatch)
    torch.manual_seed(1)
    torch.randn(6, 3, 28, 28)
    share = torch.distributions.Beta(1.0, 1.0).sample().item()
    order = torch.randperm(6)
    logits = made.network(share * images + (1 - share) * images[order])
    own = F.cross_entropy(logits, torch.arange(6), reduction="none")
    torch.testing.assert_close(ranks, share * own)
    torch.testing.assert_close(loss, share * own.mean() + (1 - share) * F.cross_entropy(logits, order))


@pytest.mark.filterwarnings("ignore")
def test_mixed_images_are_not_ranked_unless_that_is_asked_for(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=2, callbacks=[DropAndPick(warmup=0, cycle=2)])
    with pytest.raises(DataError, match=r"model\.mixup to 0, or model\.rank_mixed to true"):
        run.fit(recipe(mixup=0.4), garments())


@pytest.mark.parametrize(
    "options",
    [{"milestones": (3, 2)}, {"milestones": (0,)}, {"label_smoothing": 1.0}, {"mixup": -1.0}, {"rank_mixed": True}],
    ids=str,
)
def test_options_outside_their_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} "):
        recipe(**options)


@pytest.mark.parametrize(
    ("backbone", "parameters"), [("resnet50", 25_557_032), ("densenet121", 7_978_856), ("mobilenetv1_100", 4_231_976)]
)
def test_networks_have_the_parameters_of_the_paper(backbone: str, parameters: int) -> None:
    with torch.device("meta"):
        network = Classifier(backbone)
    assert sum(value.numel() for value in network.parameters()) == parameters


def test_a_shallow_stem_keeps_small_pictures_large(tmp_path: Path) -> None:
    network = create_model("classifier", backbone="resnet18", num_classes=7, shallow_stem=True).eval()
    images = torch.randn(1, 3, 32, 32)
    assert network.backbone(images)[0].shape == (1, 512, 4, 4)
    network.save_pretrained(tmp_path)
    assert torch.equal(Classifier.from_pretrained(tmp_path)(images), network(images))
    with pytest.raises(BackboneError, match="no stem of a ResNet"):
        Classifier("mobilenetv2_100", shallow_stem=True)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"num_classes": 1}, "num_classes"), ({"dropout": 1.0}, "dropout"), ({"output_stride": 8}, "output_stride")],
)
def test_network_options_outside_their_range_are_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} "):
        Classifier("resnet18", **options)


@pytest.mark.filterwarnings("ignore")
def test_a_network_of_other_classes_is_refused(tmp_path: Path) -> None:
    made = ClassificationRecipe(NETWORK | {"num_classes": 9})
    with pytest.raises(DataError, match="num_classes 9, the data set has 10 classes"):
        trainer(tmp_path, max_epochs=1).fit(made, garments())


@pytest.mark.parametrize("name", [name for name in packaged_configs() if name.startswith(("dap_", "dar_"))])
def test_packaged_configurations_make_what_they_name(name: str) -> None:
    content = yaml.safe_load(Path(config_file(name)).read_text())
    with torch.device("meta"):
        parts = instantiate(content, source=name)
    (callback,) = parts.callbacks
    assert isinstance(parts.model, ClassificationRecipe) and isinstance(callback, DropAndPick)
    assert callback.budget == {"dap_imagenet": 0.75, "dap_world": 0.75}.get(name, 0.85)
    epochs = content["trainer"]["max_epochs"]
    assert all((epoch - callback.warmup) % callback.cycle == 0 for epoch in parts.model.milestones if epoch < epochs)


@pytest.mark.slow
def test_the_command_trains_tests_and_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load(Path(config_file("dap_world")).read_text())
    content["trainer"] |= {"max_epochs": 4, "enable_progress_bar": False, "enable_model_summary": False}
    content["trainer"]["callbacks"][0]["init_args"] |= {"warmup": 0, "cycle": 2, "final": 0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    words = [f"--config={tmp_path / 'config.yaml'}", f"--run_dir={tmp_path / 'run'}", "--data.lengths=[200,20,20]"]
    assert main(["fit", *words]) == 0
    assert {"last.ckpt", "best.ckpt"} <= {path.name for path in tmp_path.rglob("*.ckpt")}
    with Image.open(next(tmp_path.rglob("predictions.png"))) as sheet:
        assert sheet.width > 300
    assert main(["test", *words, "--ckpt_path=last"]) == 0
    assert "all images" in capsys.readouterr().out
    with (tmp_path / "run" / "test_classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows][:2] == ["t-shirt", "trousers"] and len(rows) == 11
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    image = ClassificationData(lengths=(1, 10, 10)).dataset("test").image(3)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(pictures / "a.png")
    words = ["--config=dap_world", f"--ckpt_path={tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}"]
    assert main(["predict", *words, f"--images={pictures}", f"--out={out}", "--device=cpu"]) == 0
    found = json.loads((out / "classes.json").read_text())["a.png"]
    assert len(found) == 5 and list(found.values()) == sorted(found.values(), reverse=True)
    assert (out / "pictures" / "a.png.png").is_file()
