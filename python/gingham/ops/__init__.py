"""The operators as functions on tensors: `torch.ops.gingham` with checks, autograd, autocast and vmap."""

from gingham.ops.cosine_similarity_map import cosine_similarity_map
from gingham.ops.criss_cross_attention import criss_cross_attention
from gingham.ops.k_reciprocal_rerank import k_reciprocal_rerank
from gingham.ops.masked_average_pool import masked_average_pool
from gingham.ops.masked_similarity import masked_similarity
from gingham.ops.roi_pool import roi_pool
from gingham.ops.spatial_temporal_attention import (
    spatial_temporal_attention,
    spatial_temporal_attention_from_sums,
    spatial_temporal_sums,
)

__all__ = [
    "cosine_similarity_map",
    "criss_cross_attention",
    "k_reciprocal_rerank",
    "masked_average_pool",
    "masked_similarity",
    "roi_pool",
    "spatial_temporal_attention",
    "spatial_temporal_attention_from_sums",
    "spatial_temporal_sums",
]
