"""The purity of embeddings across images, and the ratio of distances."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gingham.metrics.embedding_purity import EmbeddingPurity, EmbeddingScores


def scores(features: Tensor, labels: Tensor, pixels: int = 4, batch: int = 99) -> EmbeddingScores:
    meter = EmbeddingPurity(pixels)
    for index in range(0, len(features), batch):
        meter.update(features[index : index + batch], labels[index : index + batch])
    return meter.compute()


def some(images: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(images, 3, 4, 6, generator=generator)
    labels = torch.randint(0, 4, (images, 8, 12), generator=generator)
    labels[:, 0] = 255
    return features, labels


def test_features_that_are_the_class_are_pure_and_constant_ones_are_not() -> None:
    labels = torch.arange(12).reshape(1, 3, 4).repeat(2, 1, 1) // 4
    features = F.one_hot(labels, 3).movedim(-1, 1).float()
    assert scores(features, labels).purity == 1
    assert scores(features * torch.rand(2, 1, 3, 4), labels).purity == 1  # the length does not count
    assert scores(features, labels).distance_ratio > 1e6  # nothing between pixels of one class
    other_in_the_second = torch.stack([labels[0], (labels[1] + 1) % 3])
    assert scores(features, other_in_the_second).purity == 0


def test_pixels_of_the_same_image_are_no_neighbours() -> None:
    """Features that tell the image rather than the class have pure neighbourhoods only within an image."""
    labels = torch.tensor([[[0, 1]], [[1, 0]]])
    features = torch.tensor([[[1.0, 1.0], [0.0, 0.1]], [[0.0, 0.1], [1.0, 1.0]]])[:, :, None]
    # Image 0: (1, 0) of class 0 and (1, 0.1) of class 1; image 1: (0, 1) of class 1 and (0.1, 1) of class 0.
    assert scores(features, labels, pixels=1).purity == 0.5
    assert scores(features[:1], labels[:1]).purity.isnan()


def by_the_definition(features: Tensor, labels: Tensor, pixels: int) -> tuple[float, float]:
    full = F.interpolate(features, size=labels.shape[-2:], mode="bilinear", align_corners=True)
    rows = []
    for image in range(len(labels)):
        for kind in labels[image].unique().tolist():
            if kind == 255:
                continue
            places = (labels[image] == kind).nonzero().tolist()
            count = min(pixels, len(places))
            for part in range(count):
                y, x = places[int((part + 0.5) * len(places) / count)]
                rows.append((F.normalize(full[image, :, y, x], dim=0), kind, image))
    hits: dict[int, list[bool]] = {}
    same, other = [], []
    for vector, kind, image in rows:
        elsewhere = [(float((vector - v).norm()), k) for v, k, i in rows if i != image]
        hits.setdefault(kind, []).append(min(elsewhere)[1] == kind)
        same += [distance for distance, k in elsewhere if k == kind]
        other += [distance for distance, k in elsewhere if k != kind]
    purity = sum(sum(each) / len(each) for each in hits.values()) / len(hits)
    return purity, (sum(other) / len(other)) / (sum(same) / len(same))


@pytest.mark.parametrize("pixels", [1, 3, 1000])
def test_scores_follow_the_definition(pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = some()
    monkeypatch.setattr("gingham.metrics.embedding_purity._PAIRS_AT_ONCE", 50)  # several blocks of rows
    found = scores(features, labels, pixels)
    purity, ratio = by_the_definition(features, labels, pixels)
    assert found.purity.item() == pytest.approx(purity)
    assert found.distance_ratio.item() == pytest.approx(ratio, rel=1e-4)
    assert found.pixels == sum(
        min(pixels, int((label == kind).sum())) for label in labels for kind in label.unique() if kind != 255
    )


def test_batches_and_their_order_do_not_matter() -> None:
    features, labels = some()
    whole = scores(features, labels)
    for other in (scores(features, labels, batch=2), scores(features.flip(0), labels.flip(0), batch=1)):
        torch.testing.assert_close(tuple(other), tuple(whole))


def test_scores_of_nothing_say_so() -> None:
    features, labels = some()
    nothing = scores(features, torch.full_like(labels, 255))
    assert nothing.pixels == 0 and nothing.purity.isnan()
    assert EmbeddingPurity().compute().pixels == 0
    with pytest.raises(ValueError, match="pixels must be at least 1, got 0"):
        EmbeddingPurity(0)


@pytest.mark.filterwarnings("ignore")
def test_a_meter_begins_anew() -> None:
    features, labels = some()
    meter = EmbeddingPurity()
    meter.update(*some(seed=1))
    meter.reset()
    meter.update(features, labels)
    torch.testing.assert_close(tuple(meter.compute()), tuple(scores(features, labels)))


def _score_share(rank: int, address: str, results: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    features, labels = some()
    labels[1] = 255  # rank 1 begins with an image without labels
    results.put([score.item() for score in scores(features[rank::2], labels[rank::2], batch=1)])
    torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    features, labels = some()
    labels[1] = 255
    expected = [score.item() for score in scores(features, labels)]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_score_share, args=(r, f"file://{tmp_path}/meet", queue)) for r in range(2)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(timeout=30)
    assert found[0] == found[1] == pytest.approx(expected)
