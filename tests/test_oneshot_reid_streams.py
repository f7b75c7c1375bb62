"""Batches of source and target: persons, orders, processes, resuming, and labels that change between epochs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("lightning", reason="training needs the extra: pip install gingham[train]")
from gingham.data.reid import PersonDataset
from gingham.errors import DataError
from gingham.methods.oneshot_reid.streams import (
    BatchShape,
    Stream,
    StreamBatches,
    Streams,
    TargetLabels,
    collate_streams,
)

SHAPES: dict[Stream, BatchShape] = {
    "source": BatchShape(2, 3),
    "assigned": BatchShape(3, 2),
    "mined": BatchShape(2, 2),
}


class Tones(PersonDataset):
    """Pictures that show nothing but their own number."""

    def __init__(self, persons: Sequence[int], offset: int) -> None:
        super().__init__("train", persons, [0] * len(persons), [f"{index:03d}" for index in range(len(persons))])
        self.offset = offset

    def read(self, index: int) -> Tensor:
        return torch.full((3, 2, 2), self.offset + index, dtype=torch.uint8)


def streams() -> Streams:
    def marked(by: int) -> Any:
        return lambda image: image.long() + by

    transforms: dict[Stream, Any] = {"source": marked(0), "assigned": marked(1000), "mined": marked(2000)}
    return Streams(Tones(np.repeat(np.arange(5), 4).tolist(), 0), Tones([0, 1, 2, 3] * 3, 100), transforms)


def labels(iteration: int = 0, first_epoch: int = 2, **changes: Any) -> TargetLabels:
    given: dict[str, Any] = {
        "persons": np.array([0, 0, 1, 1, 2, 2, 3, 3, -1, -1, 0, 1]),
        "weights": np.linspace(0, 1, 12, dtype=np.float32),
        "clusters": np.array([-1, 0, 0, 0, 1, 1, 1, 2, 2, -1, -1, 2]),
    }
    return TargetLabels(iteration, first_epoch, **given | changes)


def batches(of: Streams, **options: Any) -> StreamBatches:
    return StreamBatches(of, SHAPES, **{"steps": 4, "seed": 0} | options)


def items(of: Streams, epoch: int, **options: Any) -> list[dict[str, Any]]:
    return [collate_streams([of[position[1]] for position in batch]) for batch in batches(of, **options).batches(epoch)]


def test_the_source_comes_with_its_own_persons() -> None:
    found = items(streams(), 0)
    assert len(found) == 4
    for batch in found:
        assert batch.keys() == {"source"}
        part = batch["source"]
        assert part["person"].view(2, 3).unique(dim=1).shape == (2, 1)
        assert len(part["person"].unique()) == 2
        assert torch.equal(part["person"], part["index"] // 4)
        assert torch.equal(part["image"][:, 0, 0, 0], part["index"])
        assert part["weight"].tolist() == [1.0] * 6


def test_the_target_comes_with_labels_and_clusters_and_never_with_its_persons() -> None:
    of = streams()
    of.labels = labels()
    for batch in items(of, 2):
        assert batch.keys() == {"assigned", "mined"}
        assigned, mined = batch["assigned"], batch["mined"]
        assert assigned["person"].tolist() == of.labels.persons[assigned["index"]].tolist()  # type: ignore[index]
        assert assigned["weight"].tolist() == of.labels.weights[assigned["index"]].tolist()
        assert mined["person"].tolist() == of.labels.clusters[mined["index"]].tolist()  # type: ignore[index]
        assert mined["weight"].tolist() == [1.0] * 4
        assert torch.equal(assigned["image"][:, 0, 0, 0], 1100 + assigned["index"])
        assert torch.equal(mined["image"][:, 0, 0, 0], 2100 + mined["index"])
        for part, size in ((assigned, 3), (mined, 2)):
            assert (part["person"] >= 0).all() and len(part["person"].unique()) == size
    truth = of.target.persons.copy()
    before = batches(of).batches(3)
    of.target.persons = truth[::-1].copy()
    assert batches(of).batches(3) == before


def test_clusters_of_parts_come_with_mined_images() -> None:
    of = streams()
    of.labels = labels(parts=np.arange(24).reshape(12, 2))
    for batch in items(of, 2):
        assert "parts" not in batch["assigned"]
        assert batch["mined"]["parts"].tolist() == [
            [2 * index, 2 * index + 1] for index in batch["mined"]["index"].tolist()
        ]


def test_a_stream_can_be_without() -> None:
    of = streams()
    of.labels = labels(persons=None)
    assert [batch.keys() for batch in items(of, 2)] == [{"mined"}] * 4
    of.labels = labels(clusters=None)
    assert [batch.keys() for batch in items(of, 2)] == [{"assigned"}] * 4


def test_every_round_visits_every_person_once() -> None:
    of = streams()
    of.labels = labels(persons=np.arange(12) % 6, clusters=None)
    visited = [batch["assigned"]["person"][::2].tolist() for batch in items(of, 2, steps=6)]
    for begin in (0, 2, 4):
        assert sorted(visited[begin] + visited[begin + 1]) == list(range(6))
    assert visited[:2] != visited[2:4]


def test_an_image_is_augmented_anew_each_time() -> None:
    of = streams()
    of.labels = labels(persons=np.array([0, 1, 2] + [-1] * 9), clusters=None)
    positions = [position for epoch in (2, 3) for batch in batches(of).batches(epoch) for position in batch]
    assert len({index for _, index, *_ in positions}) == 3
    assert len(set(positions)) == len(positions) == 2 * 4 * 6


def test_orders_differ_between_epochs_iterations_and_seeds() -> None:
    of = streams()
    orders = []
    for iteration, epoch, seed in ((0, 2, 0), (0, 3, 0), (1, 2, 0), (0, 2, 1)):
        of.labels = labels(iteration)
        orders.append([index for batch in batches(of, seed=seed).batches(epoch) for _, index, *_ in batch])
    assert len({tuple(order) for order in orders}) == 4


def test_a_pass_goes_on_where_training_was() -> None:
    of = streams()
    of.labels = labels()
    whole = [batch for epoch in (2, 3) for batch in batches(of).batches(epoch)]
    assert list(batches(of, trained=lambda: 4 * 2 + 3)) == whole[3:7]


def test_processes_share_the_persons_of_a_batch() -> None:
    of = streams()
    of.labels = labels(persons=np.arange(12) % 7, clusters=None)
    parts = [items(of, 2, rank=rank, world_size=2) for rank in (0, 1)]
    for one, other in zip(*parts, strict=True):
        together = torch.cat([one["assigned"]["person"], other["assigned"]["person"]])
        assert len(together.unique()) == 6
    of.labels = labels()
    with pytest.raises(DataError, match=r"the assigned images are of 4 persons, fewer than a batch of all .* 3 x 2"):
        batches(of, world_size=2).batches(2)
