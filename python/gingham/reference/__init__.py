"""Every operator in plain PyTorch, as short as it can be: the definition that the kernels are tested against."""

from gingham.reference.cosine_similarity_map import cosine_similarity_map
from gingham.reference.criss_cross_attention import criss_cross_attention
from gingham.reference.k_reciprocal_rerank import k_reciprocal_rerank
from gingham.reference.masked_average_pool import masked_average_pool
from gingham.reference.masked_similarity import masked_similarity
from gingham.reference.roi_pool import roi_pool
from gingham.reference.spatial_temporal_attention import (
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
