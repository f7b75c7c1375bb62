"""Criss-cross attention as modules: one pass, and the recurrent form that CCNet uses.

Paper: Huang et al., CCNet: Criss-Cross Attention for Semantic Segmentation, https://arxiv.org/abs/1811.11721
(section 3.2 and 3.3; the module with the learnable factor ``gamma`` follows the official code).
"""

from typing import Any

import torch
from torch import Tensor, nn

from gingham import ops


class _CrissCross(nn.Module):
    """What the 2-D and the 3-D module share: three 1x1 convolutions and the factor of the residual."""

    convolution: type[nn.Conv2d] | type[nn.Conv3d]
    layout: str  # of the features, for error texts

    def __init__(self, channels: int, *, reduction: int = 8) -> None:
        super().__init__()
        if reduction < 1:
            raise ValueError(f"reduction must be at least 1, got {reduction}")
        if channels < reduction:
            raise ValueError(
                f"channels must be at least reduction={reduction}, or queries and keys have no channel; got {channels}"
            )
        self.channels = channels
        self.key_channels = channels // reduction
        self.query_conv = self.convolution(channels, self.key_channels, kernel_size=1)
        self.key_conv = self.convolution(channels, self.key_channels, kernel_size=1)
        self.value_conv = self.convolution(channels, channels, kernel_size=1)
        self.gamma = nn.Parameter(torch.zeros(1))  # 0: the module starts as the identity

    def forward(self, features: Tensor) -> Tensor:
        if features.dim() != len(self.layout.split(",")) or features.shape[1] != self.channels:
            raise ValueError(
                f"features must be [{self.layout}] with C={self.channels}, got shape {list(features.shape)}"
            )
        context = ops.criss_cross_attention(
            self.query_conv(features), self.key_conv(features), self.value_conv(features)
        )
        # The factor takes the context's dtype: under autocast the residual would otherwise be promoted to float32.
        return features + self.gamma.to(context.dtype) * context

    def extra_repr(self) -> str:
        return f"channels={self.channels}, key_channels={self.key_channels}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # mmcv keeps gamma as a 0-dimensional tensor, the official code and this module as one of shape [1].
        gamma = state_dict.get(f"{prefix}gamma")
        if isinstance(gamma, Tensor) and gamma.dim() == 0:
            state_dict[f"{prefix}gamma"] = gamma.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)


class CrissCrossAttention(_CrissCross):
    """Criss-cross attention over the row and the column of every pixel: ``gamma * attention(features) + features``.

    Queries, keys and values are 1x1 convolutions with bias in torch's default initialisation; scores are not scaled.
    ``gamma`` starts at 0, so an untrained module returns its input.

    Args:
        channels: C, channels of the features, at least `reduction`.
        reduction: queries and keys have ``channels // reduction`` channels.

    Shape:
        features [B, C, H, W] -> [B, C, H, W]; H and W are free.

    Raises:
        ValueError: if `channels` is smaller than `reduction`, or the features have another shape.

    Source: CCNet, section 3.2 (https://arxiv.org/abs/1811.11721).

    Example:
        >>> attention = CrissCrossAttention(64)
        >>> attention(torch.randn(2, 64, 5, 7)).shape
        torch.Size([2, 64, 5, 7])
    """

    convolution = nn.Conv2d
    layout = "B, C, H, W"


class CrissCrossAttention3d(_CrissCross):
    """Criss-cross attention over the frame axis, the column and the row of every position of a clip.

    Like `CrissCrossAttention`, with T + H + W - 2 positions, the position itself counted once.

    Args:
        channels: C, channels of the features, at least `reduction`.
        reduction: queries and keys have ``channels // reduction`` channels.

    Shape:
        features [B, C, T, H, W] -> [B, C, T, H, W].

    Raises:
        ValueError: if `channels` is smaller than `reduction`, or the features have another shape.

    Source: CCNet, journal version, section 3.4 (https://arxiv.org/abs/1811.11721).

    Example:
        >>> attention = CrissCrossAttention3d(16)
        >>> attention(torch.randn(1, 16, 3, 5, 7)).shape
        torch.Size([1, 16, 3, 5, 7])
    """

    convolution = nn.Conv3d
    layout = "B, C, T, H, W"


class _Recurrent(_CrissCross):
    """Applies criss-cross attention `loops` times; the weights of the first loop are the module's own."""

    single: type[_CrissCross]  # one loop, where the loops have weights of their own

    def __init__(self, channels: int, *, loops: int, shared: bool = True, reduction: int = 8) -> None:
        super().__init__(channels, reduction=reduction)
        if loops < 0:
            raise ValueError(f"loops must not be negative, got {loops}")
        self.loops = loops
        self.shared = shared
        further = 0 if shared else max(loops - 1, 0)
        self.further = nn.ModuleList(self.single(channels, reduction=reduction) for _ in range(further))
        if loops == 0:
            # No loop, no weights: DistributedDataParallel refuses parameters that never receive a gradient.
            del self.query_conv, self.key_conv, self.value_conv, self.gamma

    def forward(self, features: Tensor) -> Tensor:
        if self.shared:
            for _ in range(self.loops):
                features = super().forward(features)
            return features
        if self.loops:
            features = super().forward(features)
        for attention in self.further:
            features = attention(features)
        return features

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, loops={self.loops}, shared={self.shared}"


class RecurrentCrissCrossAttention(_Recurrent):
    """Criss-cross attention applied `loops` times (RCCA); two loops let every pixel see every other.

    State-dict names are those of the official code (``query_conv``, ``key_conv``, ``value_conv``, ``gamma``); with
    separate weights the loops after the first are ``further.0``, ``further.1``, ...

    Args:
        channels: C, channels of the features, at least `reduction`.
        loops: R, how often the attention is applied. 0 makes the module the identity, without weights.
        shared: one set of weights for all loops (the paper), or one for each.
        reduction: queries and keys have ``channels // reduction`` channels.

    Shape:
        features [B, C, H, W] -> [B, C, H, W].

    Raises:
        ValueError: if `channels` is smaller than `reduction`, `loops` is negative, or the features have another shape.

    Source: CCNet, section 3.3 (https://arxiv.org/abs/1811.11721).

    Example:
        >>> attention = RecurrentCrissCrossAttention(64, loops=2)
        >>> attention(torch.randn(2, 64, 5, 7)).shape
        torch.Size([2, 64, 5, 7])
    """

    single = CrissCrossAttention
    convolution = nn.Conv2d
    layout = "B, C, H, W"

    def __init__(self, channels: int, *, loops: int = 2, shared: bool = True, reduction: int = 8) -> None:
        super().__init__(channels, loops=loops, shared=shared, reduction=reduction)

    def flops(self, rows: int, columns: int) -> int:
        """Floating-point operations of one forward pass over one map, as the paper counts them.

        A multiply-add counts as two operations; the row and column of a pixel count as ``rows + columns + 1``
        positions, which is the author's own count and reproduces the paper's figures.

        Example:
            >>> round(RecurrentCrissCrossAttention(512, loops=2).flops(97, 97) / 1e9, 2)
            16.58
        """
        pixels, cross = rows * columns, rows + columns + 1
        convolutions = (self.channels + 1) * (2 * self.key_channels + self.channels)
        attention = cross * (self.key_channels + self.channels)
        return self.loops * 2 * pixels * (convolutions + attention)


class RecurrentCrissCrossAttention3d(_Recurrent):
    """3-D criss-cross attention applied `loops` times; three loops let every position see every other.

    Args:
        channels: C, channels of the features, at least `reduction`.
        loops: R, how often the attention is applied. The paper's count is not confirmed; 3 is the smallest that covers
            a whole clip. 0 makes the module the identity, without weights.
        shared: one set of weights for all loops, or one for each.
        reduction: queries and keys have ``channels // reduction`` channels.

    Shape:
        features [B, C, T, H, W] -> [B, C, T, H, W].

    Raises:
        ValueError: if `channels` is smaller than `reduction`, `loops` is negative, or the features have another shape.

    Source: CCNet, journal version, section 3.4 (https://arxiv.org/abs/1811.11721).

    Example:
        >>> attention = RecurrentCrissCrossAttention3d(16)
        >>> attention(torch.randn(1, 16, 3, 5, 7)).shape
        torch.Size([1, 16, 3, 5, 7])
    """

    single = CrissCrossAttention3d
    convolution = nn.Conv3d
    layout = "B, C, T, H, W"

    def __init__(self, channels: int, *, loops: int = 3, shared: bool = True, reduction: int = 8) -> None:
        super().__init__(channels, loops=loops, shared=shared, reduction=reduction)
