"""The operators as functions on tensors: `torch.ops.gingham` with checks, autograd, autocast and vmap."""

from gingham.ops.criss_cross_attention import criss_cross_attention
from gingham.ops.spatial_temporal_attention import (
    spatial_temporal_attention,
    spatial_temporal_attention_from_sums,
    spatial_temporal_sums,
)

__all__ = [
    "criss_cross_attention",
    "spatial_temporal_attention",
    "spatial_temporal_attention_from_sums",
    "spatial_temporal_sums",
]
