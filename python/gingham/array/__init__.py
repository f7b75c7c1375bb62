"""The operators on NumPy and CuPy arrays. Imports no torch.

NumPy arrays are computed on `threads` CPU threads (all cores unless the environment variable ``GINGHAM_NUM_THREADS``
or the argument says otherwise), CuPy arrays on their own device, on the stream that is CuPy's current one there.
"""

from gingham.array.cosine_similarity_map import cosine_similarity_map
from gingham.array.criss_cross_attention import criss_cross_attention
from gingham.array.k_reciprocal_rerank import k_reciprocal_rerank
from gingham.array.masked_average_pool import masked_average_pool
from gingham.array.masked_similarity import masked_similarity
from gingham.array.roi_pool import roi_pool
from gingham.array.spatial_temporal_attention import (
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
