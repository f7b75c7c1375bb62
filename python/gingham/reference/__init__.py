"""Every operator in plain PyTorch, as short as it can be: the definition that the kernels are tested against."""

from gingham.reference.criss_cross_attention import criss_cross_attention
from gingham.reference.spatial_temporal_attention import (
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
