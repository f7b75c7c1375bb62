"""Exporting models without the native library: to ONNX and to other runtimes that know PyTorch's own operators."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gingham import ops, reference

_ENERGIES = ("sq", "l2", "agrl")  # gingham::SpatialEnergy


def plain_decompositions() -> dict[Any, Callable[..., Any]]:
    """Decompositions that replace the package's operators by their definitions in plain PyTorch.

    For `torch.export.ExportedProgram.run_decompositions`, of a program that was exported for inference. The result
    holds PyTorch's own operators only, so ``torch.onnx.export`` needs no custom ones. It stores what the native
    operators never do, as the attention weights.

    Not replaced are `roi_pool` and `k_reciprocal_rerank`, whose definitions take as many steps as the boxes or the
    sizes say, and `masked_similarity` of supports that differ in size.

    Example:
        >>> from gingham.nn import RecurrentCrissCrossAttention
        >>> attention = RecurrentCrissCrossAttention(16).eval().requires_grad_(False)
        >>> program = torch.export.export(attention, (torch.randn(1, 16, 5, 7),))
        >>> plain = program.run_decompositions(plain_decompositions())
        >>> any("gingham" in str(node.target) for node in plain.graph.nodes)
        False
    """
    assert ops  # importing it registers the operators
    operators = torch.ops.gingham
    return {
        operators.criss_cross_attention.default: _criss_cross_attention,
        operators.masked_average_pool.default: _masked_average_pool,
        operators.cosine_similarity_map.default: _cosine_similarity_map,
        operators.masked_similarity.default: _masked_similarity,
        operators.spatial_temporal_attention.default: _spatial_temporal_attention,
        operators.spatial_temporal_sums.default: _spatial_temporal_sums,
        operators.spatial_temporal_attention_from_sums.default: _spatial_temporal_attention_from_sums,
    }


def _with_unread(results: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
    """Results, and as many outputs that only backward reads, which is not exported."""
    return (*results, *(results[0].new_zeros(0) for _ in range(count)))


def _criss_cross_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, allow_tf32: bool = False) -> Any:
    return _with_unread([reference.criss_cross_attention(query, key, value, scale=scale)], 1)


def _masked_average_pool(features: Tensor, mask: Tensor, resize_mask: bool = False) -> Any:
    return _with_unread([reference.masked_average_pool(features, mask, resize=_resize(resize_mask))], 2)


def _cosine_similarity_map(features: Tensor, prototypes: Tensor, eps: float, torch_compat: bool = False) -> Any:
    cosines = reference.cosine_similarity_map(features, prototypes, eps=eps, torch_compat=torch_compat)
    return _with_unread([cosines], 2)


def _masked_similarity(
    query: Tensor,
    support: Tensor,
    mask: Tensor,
    valid_sizes: Tensor | None,
    resize_mask: bool,
    eps: float,
    torch_compat: bool,
) -> Any:
    if valid_sizes is not None:
        return NotImplemented
    # Not by the reference, which goes from image to image: of these a program may take any number.
    dtype = query.dtype if query.dtype == torch.float64 else torch.float32
    supports, masks = support.flatten(0, 1).to(dtype), mask.flatten(0, 1)
    pooled = reference.masked_average_pool(supports, masks, resize=_resize(resize_mask))  # [B * K, C]
    prototype = pooled.unflatten(0, support.shape[:2]).mean(dim=1, keepdim=True)
    cosines = reference.cosine_similarity_map(query.to(dtype), prototype, eps=eps, torch_compat=torch_compat)
    return _with_unread([cosines.to(query.dtype)], 4)


def _spatial_temporal_attention(features: Tensor, parts: int, energy: int, eps: float, detach_attention: bool) -> Any:
    results = reference.spatial_temporal_attention(features, parts, energy=_ENERGIES[energy], eps=eps, return_map=True)
    return _with_unread(results, 3)


def _spatial_temporal_sums(features: Tensor, parts: int, energy: int, eps: float) -> Any:
    return _with_unread(reference.spatial_temporal_sums(features, parts, energy=_ENERGIES[energy], eps=eps), 2)


def _spatial_temporal_attention_from_sums(sums: Tensor, energies: Tensor, positions: int, eps: float) -> Any:
    return _with_unread(reference.spatial_temporal_attention_from_sums(sums, energies, positions, eps=eps), 1)


def _resize(resize_mask: bool) -> str:
    return "mask" if resize_mask else "features"
