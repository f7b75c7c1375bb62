"""How well the features of pixels are grouped by class across images: nearest neighbours, and distances."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from gingham.nn.point_sampling import sample_at_points

_PAIRS_AT_ONCE = 2**24


class EmbeddingScores(NamedTuple):
    """Of the sampled pixels of all images."""

    purity: Tensor  # scalar in [0, 1]
    distance_ratio: Tensor  # scalar, 1 where features know nothing of classes
    pixels: Tensor  # scalar, how many were sampled; no score means anything where there are none


class EmbeddingPurity(Metric):
    """Whether the pixel of another image with the most similar feature is of the same class.

    From each image, `pixels` pixels of each class are taken, evenly spaced in the order of the rows, and the features
    are read there and scaled to length 1. Purity: for each pixel, its nearest neighbour among the pixels of all other
    images; the share whose neighbour has their class, for each class, averaged over the classes. Distance ratio: the
    mean distance over all pairs of pixels of different images and different classes, divided by the mean over those of
    different images and one class. The result does not depend on batches, their order or the number of processes.

    Args:
        pixels: of a class in an image, 1 or more.
        ignore_index: label of pixels that do not count.
        align_corners: how features lie on the image.

    Raises:
        ValueError: pixels below 1.

    Example:
        >>> meter = EmbeddingPurity(pixels=1)
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).T.reshape(1, 2, 1, 2).repeat(2, 1, 1, 1)
        >>> meter.update(features, torch.tensor([[[0, 1]], [[0, 1]]]))
        >>> meter.compute().purity
        tensor(1.)
    """

    full_state_update = False
    embeddings: list[Tensor]  # [n, C] each
    classes: list[Tensor]  # [n] each
    images: list[Tensor]  # [n] each, a number for every image of all processes

    def __init__(self, pixels: int = 4, *, ignore_index: int = 255, align_corners: bool = True) -> None:
        super().__init__()
        if pixels < 1:
            raise ValueError(f"pixels must be at least 1, got {pixels}")
        self.pixels, self.ignore_index, self.align_corners = pixels, ignore_index, align_corners
        self._counted = 0
        for name in ("embeddings", "classes", "images"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Take pixels of a batch.

        Args:
            features: [B, C, h, w].
            labels: [B, H, W] integers.
        """
        image, y, x = self._evenly(labels)
        sampled = sample_at_points(features, image, y, x, labels.shape[-2:], align_corners=self.align_corners)
        several = dist.is_available() and dist.is_initialized()
        rank, processes = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        self.embeddings.append(F.normalize(sampled.float()))
        self.classes.append(labels[image, y, x])
        self.images.append((image + self._counted) * processes + rank)
        self._counted += len(labels)

    def _evenly(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image, row and column of the pixels to take."""
        taken = []
        for number, label in enumerate(labels):
            for class_index in label[label != self.ignore_index].unique():
                places = (label == class_index).nonzero()
                count = min(self.pixels, len(places))
                # The middles of `count` equal parts of the list.
                at = (2 * torch.arange(count, device=labels.device) + 1) * len(places) // (2 * count)
                taken.append(F.pad(places[at], (1, 0), value=number))
        chosen = torch.cat(taken) if taken else torch.zeros(0, 3, dtype=torch.int64, device=labels.device)
        return chosen[:, 0], chosen[:, 1], chosen[:, 2]

    def reset(self) -> None:
        super().reset()
        self._counted = 0

    def compute(self) -> EmbeddingScores:
        """The scores of all pixels taken so far."""
        embeddings, classes, images = (_joined(state) for state in (self.embeddings, self.classes, self.images))
        number = len(classes)
        counted = torch.tensor(number, device=classes.device)
        if not number:
            nothing = torch.tensor(torch.nan, device=classes.device)
            return EmbeddingScores(nothing, nothing, counted)
        sums = torch.zeros(2, dtype=torch.float64, device=classes.device)  # of distances: one class, two classes
        counts = torch.zeros_like(sums)
        pure, judged = [], []
        for rows in torch.arange(number, device=classes.device).split(max(1, _PAIRS_AT_ONCE // number)):
            distance = torch.cdist(embeddings[rows], embeddings)
            elsewhere = images[rows, None] != images
            same = classes[rows, None] == classes
            nearest = distance.masked_fill(~elsewhere, torch.inf).argmin(dim=1)
            pure.append(classes[nearest] == classes[rows])
            judged.append(elsewhere.any(dim=1))
            for which, pairs in enumerate((same & elsewhere, ~same & elsewhere)):
                sums[which] += (distance.double() * pairs).sum()
                counts[which] += pairs.sum()
        within, between = sums / counts.clamp(min=1)
        asked = torch.cat(judged)
        kinds, kind = classes[asked].unique(return_inverse=True)
        hits = torch.zeros(len(kinds), dtype=torch.float64, device=classes.device)
        hits.index_add_(0, kind, torch.cat(pure)[asked].double())
        purity = (hits / torch.bincount(kind, minlength=len(kinds))).mean()
        return EmbeddingScores(purity.float(), (between / within).float(), counted)


def _joined(state: Any) -> Tensor:
    # A list before torchmetrics has brought the processes' states together, a tensor after.
    if isinstance(state, Tensor):
        return state
    return torch.cat(state) if state else torch.zeros(0, dtype=torch.int64)
