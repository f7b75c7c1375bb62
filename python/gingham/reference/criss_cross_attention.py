"""Criss-cross attention (Huang et al., CCNet, https://arxiv.org/abs/1811.11721, section 3.2)."""

import torch
from torch import Tensor


def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float = 1.0) -> Tensor:
    """Attention of every position to those that differ from it in at most one coordinate, itself counted once.

    Args:
        query: [B, Ck, H, W] or [B, Ck, T, H, W], floating point.
        key: like `query`.
        value: [B, Cv, *S] with the spatial sizes of `query`.
        scale: factor on the logits; CCNet uses none.

    Returns:
        [B, Cv, *S], the dtype of `value`. Half-precision inputs are computed in float32.

    Example:
        >>> import torch
        >>> value = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]).reshape(1, 1, 2, 3)
        >>> none = torch.zeros(1, 1, 2, 3)
        >>> criss_cross_attention(none, none, value).squeeze()
        tensor([[1.5000, 1.7500, 2.0000],
                [3.0000, 3.2500, 3.5000]])
    """
    dtype = value.dtype if value.dtype == torch.float64 else torch.float32
    q, k, v = (x.to(dtype) for x in (query, key, value))
    axes = range(2, value.dim())
    blocks = []
    for axis in axes:
        # [B, *S, L]: the logits of each position along the line through it
        logits = scale * torch.einsum("bc...i,bc...j->b...ij", q.transpose(axis, -1), k.transpose(axis, -1))
        if axis != value.dim() - 1:  # the position itself belongs to its row alone
            itself = torch.eye(value.size(axis), dtype=torch.bool, device=value.device)
            logits = logits.masked_fill(itself, float("-inf"))
        blocks.append(logits.transpose(axis - 1, -2))
    weights = torch.cat(blocks, dim=-1).softmax(dim=-1).split([value.size(axis) for axis in axes], dim=-1)
    output = torch.zeros_like(v)
    for axis, weight in zip(axes, weights, strict=True):
        line = torch.einsum("b...ij,bc...j->bc...i", weight.transpose(axis - 1, -2), v.transpose(axis, -1))
        output = output + line.transpose(axis, -1)
    return output.to(value.dtype)
