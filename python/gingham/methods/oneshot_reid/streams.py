"""What an adaptation learns from: batches of the source first, then of labels and clusters of the target that change.

Labels are made between epochs, by `adaptation.py`; until the next ones come, every batch follows from (seed, epoch) and
them. Of the persons of the target only those of the labelled images are ever known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, default_collate

from gingham.data.batch_order import OrderedBatches, Position, mixed_seed
from gingham.data.identity_sampler import IdentityBatches
from gingham.data.reid import PersonDataset, PixelTransform
from gingham.errors import DataError

#: Images of the source with their persons; of the target with labels given or guessed; of the target in clusters.
Stream = Literal["source", "assigned", "mined"]
STREAMS: tuple[Stream, ...] = ("source", "assigned", "mined")

Numbers = NDArray[np.int64]


class TargetLabels(NamedTuple):
    """What is held to be true of the N training images of the target in one iteration."""

    iteration: int
    first_epoch: int  # of the iteration
    persons: Numbers | None  # [N], -1 for images that do not take part; None for no such batches
    weights: NDArray[np.float32]  # [N], 0 to 1
    clusters: Numbers | None  # [N], -1 for noise; None for no such batches
    parts: Numbers | None = None  # [N, P], clusters of each part of the images, where parts have their own


class BatchShape(NamedTuple):
    """Persons of a batch of one process, and images of each."""

    persons: int
    images: int


class Streams(Dataset[dict[str, Any]]):
    """The images of source and target by position, each with the person and the weight that it is trained with.

    Args:
        source: training images, whose persons are known.
        target: training images.
        transforms: what is done to the pixels of each stream.

    Attributes:
        labels: of the target; None while the source is trained on.
    """

    def __init__(
        self, source: PersonDataset, target: PersonDataset, transforms: Mapping[Stream, PixelTransform]
    ) -> None:
        self.source, self.target, self.transforms = source, target, dict(transforms)
        self.labels: TargetLabels | None = None
        self._stride = max(len(source), len(target))

    def __len__(self) -> int:
        return self._stride * len(STREAMS)

    def index(self, stream: Stream, place: int) -> int:
        """Where an image of a stream stands in this data set."""
        return STREAMS.index(stream) * self._stride + place

    def persons(self, stream: Stream) -> Numbers | None:
        """Whom the images of a stream are held to be, -1 for none; None where the stream is not trained on now."""
        if self.labels is None:
            return self.source.persons if stream == "source" else None
        return {"source": None, "assigned": self.labels.persons, "mined": self.labels.clusters}[stream]

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, place = divmod(index, self._stride)
        stream = STREAMS[number]
        persons = self.persons(stream)
        assert persons is not None
        dataset = self.source if stream == "source" else self.target
        weight = float(self.labels.weights[place]) if stream == "assigned" and self.labels else 1.0
        image = self.transforms[stream](dataset.read(place))
        item = {"stream": stream, "image": image, "person": int(persons[place]), "weight": weight, "index": place}
        if stream == "mined" and self.labels is not None and self.labels.parts is not None:
            item["parts"] = self.labels.parts[place]
        return item


class StreamBatches(OrderedBatches[Position]):
    """Batches of persons of each stream that is trained on now, one after the other, as many an epoch as is asked for.

    A stream goes through its persons again and again in new orders, K images of each, from the beginning of an
    iteration; the persons that do not fill a last batch are left out.

    Args:
        streams: what is trained on.
        shapes: of the batches of each stream.
        steps: batches in an epoch.
        seed: of the orders.
        rank: of this process.
        world_size: number of processes.
        trained: gives the number of batches trained so far, see `gingham.data.batch_order.OrderedBatches`.

    Raises:
        DataError: when batches are drawn, a stream has too few persons for one of all processes.
    """

    def __init__(
        self,
        streams: Streams,
        shapes: Mapping[Stream, BatchShape],
        steps: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        trained: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__(trained)
        self.streams, self.shapes, self.steps, self.seed = streams, dict(shapes), steps, seed
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return self.steps

    def batches(self, epoch: int) -> list[list[Position]]:
        found: list[list[Position]] = [[] for _ in range(self.steps)]
        for stream in STREAMS:
            for batch, positions in zip(found, self._batches_of(stream, epoch), strict=False):
                batch += positions
        return found

    def _batches_of(self, stream: Stream, epoch: int) -> list[list[Position]]:
        persons, labels = self.streams.persons(stream), self.streams.labels
        if persons is None:
            return []
        seed = mixed_seed(self.seed, STREAMS.index(stream))
        first_epoch = 0
        if labels is not None:
            seed, first_epoch = mixed_seed(seed, 1 + labels.iteration), labels.first_epoch
        shape = self.shapes[stream]
        rounds = IdentityBatches(persons, shape.persons, shape.images, seed, rank=self.rank, world_size=self.world_size)
        if len(rounds) == 0:
            raise DataError(
                f"the {stream} images are of {len(np.unique(persons[persons >= 0]))} persons, fewer than a batch of "
                f"all processes has: {shape.persons} x {self.world_size}"
            )
        # Epochs after the present iteration are asked for only by loaders that fetch ahead, and thrown away.
        before = max(0, epoch - first_epoch) * self.steps
        found: list[list[Position]] = []
        drawn: list[list[tuple[int, int, int]]] = []
        for step in range(before, before + self.steps):
            number, batch = divmod(step, len(rounds))
            if batch == 0 or not drawn:
                drawn = rounds.batches(number)
            moment = epoch * self.steps + len(found)  # so that an image is augmented anew each time it comes
            found.append([(moment, self.streams.index(stream, place), copy) for _, place, copy in drawn[batch]])
        return found


def collate_streams(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of each stream that has items, by its name: ``image``, ``person``, ``weight`` and ``index``.

    Mined images whose parts have clusters of their own have ``parts``, int64 [B, P], too.
    """
    found: dict[str, Any] = {}
    for stream in STREAMS:
        part = [{name: value for name, value in x.items() if name != "stream"} for x in items if x["stream"] == stream]
        if part:
            found[stream] = default_collate(part)
            found[stream]["weight"] = found[stream]["weight"].float()
    return found
