"""Spatial-temporal attention as a module, and the regularisation of its maps.

Paper: Fu et al., STA: Spatial-Temporal Attention for Large-Scale Video-based Person Re-Identification, AAAI 2019,
https://arxiv.org/abs/1811.04129
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from gingham import ops


class SpatialTemporalAttention(nn.Module):
    """`gingham.ops.spatial_temporal_attention` as a module without parameters.

    Args:
        parts: K, number of horizontal bands, at least 1 and at most H.
        energy: "sq", "l2" or "agrl".
        eps: totals of energy are taken for at least this.
        detach_attention: whether gradients of the pooled features shall not pass through the scores.
        return_map: whether to return the attention map too, for `interframe_regularization`.

    Shape:
        features [B, T, C, H, W] -> pooled [B, 2C], scores [B, T, K], frames [B, K], and with `return_map` the map
        [B, T, H, W].

    Raises:
        ValueError: `parts`, `energy` or `eps` is out of range.
        TypeError, ValueError: as `gingham.ops.spatial_temporal_attention`, when called.

    Source: STA, section 3 (https://arxiv.org/abs/1811.04129).

    Example:
        >>> import torch
        >>> attention = SpatialTemporalAttention(parts=2, return_map=True)
        >>> pooled, scores, frames, attention_map = attention(torch.rand(1, 4, 8, 6, 3))
        >>> pooled.shape, attention_map.shape
        (torch.Size([1, 16]), torch.Size([1, 4, 6, 3]))
    """

    def __init__(
        self,
        parts: int = 4,
        *,
        energy: str = "sq",
        eps: float = 1e-12,
        detach_attention: bool = False,
        return_map: bool = False,
    ) -> None:
        super().__init__()
        if parts < 1:
            raise ValueError(f"SpatialTemporalAttention: parts must be at least 1, got {parts}")
        if energy not in ("sq", "l2", "agrl"):
            raise ValueError(f'SpatialTemporalAttention: energy must be "sq", "l2" or "agrl", got {energy!r}')
        if not 0 < eps < math.inf:
            raise ValueError(f"SpatialTemporalAttention: eps must be finite and positive, got {eps}")
        self.parts, self.energy, self.eps = parts, energy, eps
        self.detach_attention, self.return_map = detach_attention, return_map

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        return ops.spatial_temporal_attention(
            features,
            self.parts,
            energy=self.energy,
            eps=self.eps,
            detach_attention=self.detach_attention,
            return_map=self.return_map,
        )

    def extra_repr(self) -> str:
        return (
            f"parts={self.parts}, energy={self.energy!r}, eps={self.eps}, detach_attention={self.detach_attention}, "
            f"return_map={self.return_map}"
        )


def interframe_regularization(
    attention_map: Tensor, pairs: Literal["one", "all"] = "one", generator: torch.Generator | None = None
) -> Tensor:
    """The mean distance between attention maps of two frames of a clip, which training keeps small.

    The distance is the Frobenius norm of the difference: 0 to sqrt(2) for maps that sum to 1. Where two maps are equal
    its gradient is 0.

    Args:
        attention_map: [B, T, H, W], floating point, as `gingham.ops.spatial_temporal_attention` returns it.
        pairs: "one", two different frames drawn at random from each clip, or "all", the mean over all pairs.
        generator: source of the random frames; torch's own when None.

    Returns:
        The mean over the clips, a scalar; 0 for clips of one frame and for no clips.

    Raises:
        ValueError: `attention_map` has not four axes, or `pairs` is neither of the two.

    Source: STA, section 3.4 (https://arxiv.org/abs/1811.04129); "all" is a variant without randomness.

    Example:
        >>> import torch
        >>> one_hot = torch.zeros(1, 2, 2, 2)
        >>> one_hot[0, 0, 0, 0] = one_hot[0, 1, 1, 1] = 1
        >>> interframe_regularization(one_hot)
        tensor(1.4142)
    """
    if attention_map.dim() != 4:
        raise ValueError(
            f"interframe_regularization: attention_map must be [B, T, H, W], got shape {list(attention_map.shape)}"
        )
    if pairs not in ("one", "all"):
        raise ValueError(f'interframe_regularization: pairs must be "one" or "all", got {pairs!r}')
    batch, length, *_ = attention_map.shape
    if batch == 0 or length < 2:
        return 0.0 * attention_map.sum()
    maps, device = attention_map.flatten(2), attention_map.device
    if pairs == "all":
        first, second = torch.triu_indices(length, length, offset=1, device=device)
        difference = maps[:, first] - maps[:, second]  # [B, pairs, H * W]
    else:
        source = device if generator is None else generator.device
        first = torch.randint(length, (batch,), generator=generator, device=source)
        step = torch.randint(1, length, (batch,), generator=generator, device=source)
        second = (first + step) % length
        clips = torch.arange(batch, device=device)
        difference = maps[clips, first.to(device)] - maps[clips, second.to(device)]
    squares = difference.square().sum(dim=-1)
    differs = squares > 0
    return torch.where(differs, torch.where(differs, squares, 1).sqrt(), squares).mean()
