"""Pyramid pooling: the context of a pixel as averages over the whole image, its quarters, ninths and 36ths.

Paper: Zhao et al., Pyramid Scene Parsing Network, https://arxiv.org/abs/1612.01105, section 3.2.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gingham.nn.activation import Activation
from gingham.nn.convolution import convolution


class PyramidPooling(nn.Module):
    """Average the features over grids of several sizes, bring the averages back to their size, and fuse all of them.

    Each bin: adaptive average pooling, 1x1 convolution, batch norm, activation, bilinear resizing. The fusion: the bins
    in their order and the input, concatenated, then a 3x3 convolution, batch norm, activation. Convolutions have no
    bias.

    Args:
        in_channels: of the features.
        out_channels: of the result.
        branch_channels: of each bin; `out_channels` where None.
        bins: rows and columns of the grids.
        activation: "relu" or "leaky_relu" (slope 0.01).
        align_corners: of the resizing.
        input_first: whether the input stands before the bins in the concatenation, and not after them.

    Shape:
        features [B, in_channels, h, w] -> [B, out_channels, h, w]. With a bin of 1, a training batch has two images or
        more: batch norm has no variance of one value.

    Raises:
        ValueError: a number below 1, no bin, an unknown activation; in training, a batch of one image with a bin of 1.

    Source: PSPNet, figure 3.

    Example:
        >>> PyramidPooling(64, 32)(torch.randn(2, 64, 9, 17)).shape
        torch.Size([2, 32, 9, 17])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        branch_channels: int | None = None,
        bins: Sequence[int] = (1, 2, 3, 6),
        activation: Activation = "relu",
        align_corners: bool = True,
        input_first: bool = False,
    ) -> None:
        super().__init__()
        branch_channels = out_channels if branch_channels is None else branch_channels
        channels = {"in_channels": in_channels, "out_channels": out_channels, "branch_channels": branch_channels}
        for name, value in channels.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not bins or min(bins) < 1:
            raise ValueError(f"bins must be one or more numbers of at least 1, got {tuple(bins)}")
        self.stages = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), *convolution(in_channels, branch_channels, activation=activation))
            for size in bins
        )
        self.bottleneck = convolution(in_channels + len(bins) * branch_channels, out_channels, 3, activation=activation)
        self.bins = tuple(bins)
        self.align_corners, self.input_first = align_corners, input_first

    def forward(self, features: Tensor) -> Tensor:
        if 1 in self.bins:
            norm = self.stages[self.bins.index(1)][2]  # type: ignore[index]
            # A synchronised batch norm is another class, and sees the images of other processes too.
            if isinstance(norm, nn.BatchNorm2d) and norm.training and features.shape[0] == 1:
                raise ValueError("features must have two images or more in training, got a batch of one (bin of 1)")
        size = features.shape[-2:]
        context = [
            F.interpolate(stage(features), size=size, mode="bilinear", align_corners=self.align_corners)
            for stage in self.stages
        ]
        maps = [features, *context] if self.input_first else [*context, features]
        fused: Tensor = self.bottleneck(torch.cat(maps, dim=1))
        return fused
