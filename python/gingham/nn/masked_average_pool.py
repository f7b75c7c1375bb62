"""Masked average pooling as a module (Zhang et al., SG-One, https://arxiv.org/abs/1810.09091)."""

from typing import Literal

from torch import Tensor, nn

from gingham import ops


class MaskedAveragePool(nn.Module):
    """The mean of a feature map under a mask of any size, `gingham.ops.masked_average_pool`.

    Args:
        resize: "features": the features count as interpolated to the size of the mask, as in SG-One. "mask": the mask
            is interpolated to the size of the features.

    Shape:
        features [B, C, h, w], mask [B, 1, H, W] -> [B, C].

    Raises:
        ValueError: if `resize` is neither of the two, or the shapes do not agree.

    Source: SG-One, "masked average pooling" (https://arxiv.org/abs/1810.09091).

    Example:
        >>> import torch
        >>> pool = MaskedAveragePool()
        >>> pool(torch.randn(2, 64, 5, 7), torch.rand(2, 1, 40, 56) > 0.5).shape
        torch.Size([2, 64])
    """

    def __init__(self, *, resize: Literal["features", "mask"] = "features") -> None:
        super().__init__()
        if resize not in ("features", "mask"):
            raise ValueError(f"resize must be 'features' or 'mask', got {resize!r}")
        self.resize: Literal["features", "mask"] = resize

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        return ops.masked_average_pool(features, mask, resize=self.resize)

    def extra_repr(self) -> str:
        return f"resize={self.resize!r}"
