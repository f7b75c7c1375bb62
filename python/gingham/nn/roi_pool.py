"""RoI max pooling as a module, whole or in parts of bounded size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from gingham.ops.roi_pool import join_boxes, pool, roi_pool


class RoIPool(nn.Module):
    """Pools each box of a feature map into a grid of maxima (see `gingham.ops.roi_pool`).

    Args:
        output_size: bins (down, across), or one number for both.
        spatial_scale: pixels of the map per unit of the boxes.

    Raises:
        ValueError: `output_size` is not positive, or `spatial_scale` not finite; when called, as
            `gingham.ops.roi_pool`.

    Example:
        >>> import torch
        >>> pool = RoIPool(7, spatial_scale=0.25)
        >>> boxes = torch.tensor([[0.0, 8.0, 8.0, 60.0, 40.0], [1.0, 0.0, 0.0, 30.0, 70.0]])
        >>> pool(torch.randn(2, 16, 20, 24), boxes).shape
        torch.Size([2, 16, 7, 7])
    """

    def __init__(self, output_size: int | Sequence[int], spatial_scale: float = 1.0) -> None:
        super().__init__()
        size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
        if len(size) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in size):
            raise ValueError(f"RoIPool: output_size must be a positive whole number or two, got {output_size!r}")
        if not math.isfinite(spatial_scale):
            raise ValueError(f"RoIPool: spatial_scale must be finite, got {spatial_scale}")
        self.output_size: tuple[int, int] = (size[0], size[1])
        self.spatial_scale = float(spatial_scale)

    def forward(self, features: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
        """[N, C, *output_size] of features [B, C, H, W] and boxes [N, 5], or a list of B tensors [n, 4]."""
        return roi_pool(features, boxes, self.output_size, self.spatial_scale)

    def chunks(
        self, features: Tensor, boxes: Tensor | Sequence[Tensor], *, max_bytes: int
    ) -> Iterator[tuple[slice, Tensor]]:
        """Pools as many boxes at a time as `max_bytes` of output hold, for grids that are too large at once.

        Gradients flow through each part as through the whole, for which nothing is kept but the inputs; what consumes
        a part should reduce it before the next one is asked for.

        Args:
            features: [B, C, H, W].
            boxes: [N, 5], or a list of B tensors [n, 4], which count one after the other.
            max_bytes: most bytes of a part, at least those of one box.

        Yields:
            Which of the N boxes, and their pooled features [n, C, *output_size].

        Raises:
            TypeError: `max_bytes` is no whole number.
            ValueError: `max_bytes` is less than one box takes, or `features` are no [B, C, H, W].

        Example:
            >>> import torch
            >>> boxes = torch.tensor([[0.0, 0.0, 0.0, 9.0, 9.0]]).repeat(10, 1)
            >>> for part, pooled in RoIPool(4).chunks(torch.randn(1, 8, 10, 10), boxes, max_bytes=2048):
            ...     print(part, tuple(pooled.shape))
            slice(0, 4, None) (4, 8, 4, 4)
            slice(4, 8, None) (4, 8, 4, 4)
            slice(8, 10, None) (2, 8, 4, 4)
        """
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
            raise TypeError(f"RoIPool: max_bytes must be a whole number, got {max_bytes!r}")
        if features.dim() != 4:
            raise ValueError(f"RoIPool: features must be [B, C, H, W], got shape {list(features.shape)}")
        joined = boxes if isinstance(boxes, Tensor) else join_boxes(features, boxes)
        bytes_of_box = features.size(1) * self.output_size[0] * self.output_size[1] * features.element_size()
        if max_bytes < bytes_of_box:
            raise ValueError(
                f"RoIPool: max_bytes must be at least {bytes_of_box}, which one box of {features.size(1)} channels and "
                f"{self.output_size} bins takes, got {max_bytes}"
            )
        return self._chunks(features, joined, joined.size(0) if bytes_of_box == 0 else max_bytes // bytes_of_box)

    def _chunks(self, features: Tensor, boxes: Tensor, count: int) -> Iterator[tuple[slice, Tensor]]:
        for first in range(0, boxes.size(0), max(count, 1)):
            part = slice(first, min(first + count, boxes.size(0)))
            # What backward keeps of all parts together has no bound. No name here keeps a part that has been yielded.
            yield part, pool(features, boxes[part], self.output_size, self.spatial_scale, may_keep_places=False)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}"
