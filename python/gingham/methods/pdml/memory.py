"""PDML's memory: the last features of each class, so that small batches too have features of their class to compare."""

import torch
from torch import Tensor, nn


class FeatureMemory(nn.Module):
    """A queue of features for each class; the newest take the place of the oldest.

    Its content is part of the module's state and so of checkpoints. No gradient flows into it.

    Args:
        num_classes: K.
        channels: D.
        size: Q, features of each class that are kept.

    Raises:
        ValueError: a number below 1.

    Source: not confirmed for the paper, which does not say how it compares across images with small batches.

    Example:
        >>> memory = FeatureMemory(num_classes=3, channels=2, size=2)
        >>> memory.push(torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]), torch.tensor([1, 1, 1]))
        >>> memory.contents()
        (tensor([[2., 0.],
                [3., 0.]]), tensor([1, 1]))
    """

    features: Tensor  # [K, Q, D], a ring for each class
    pushed: Tensor  # [K], how many features of the class have come in

    def __init__(self, num_classes: int, channels: int, size: int = 16) -> None:
        super().__init__()
        for name, value in {"num_classes": num_classes, "channels": channels, "size": size}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.register_buffer("features", torch.zeros(num_classes, size, channels))
        self.register_buffer("pushed", torch.zeros(num_classes, dtype=torch.int64))

    def contents(self) -> tuple[Tensor, Tensor]:
        """Features [M, D] and labels [M], class by class, the oldest of a class first."""
        classes, size, _ = self.features.shape
        slot = torch.arange(size, device=self.pushed.device)
        oldest = torch.where(self.pushed < size, 0, self.pushed % size)
        order = (oldest[:, None] + slot) % size
        filled = slot < self.pushed[:, None]
        labels = torch.arange(classes, device=self.pushed.device)[:, None].expand(classes, size)
        return self.features[labels[filled], order[filled]], labels[filled]

    @torch.no_grad()
    def push(self, features: Tensor, labels: Tensor) -> None:
        """Take features in, in their order.

        Args:
            features: [M, D].
            labels: [M].
        """
        size = self.features.shape[1]
        for label in labels.unique():
            newest = features[labels == label][-size:].to(self.features.dtype)
            came = int((labels == label).sum())
            begin = int(self.pushed[label]) + came - len(newest)
            slots = torch.arange(begin, begin + len(newest), device=labels.device) % size
            self.features[label, slots] = newest
            self.pushed[label] += came
