"""Modules on top of the operators, and the layers that more than one method uses.

`gingham.nn` itself needs torch alone; `gingham.nn.backbone` needs timm and `gingham.nn.pretrained` huggingface_hub
(both in the extra ``train``), so they are imported by name.
"""

from gingham.nn.cosine_similarity_map import CosineSimilarityMap
from gingham.nn.criss_cross_attention import (
    CrissCrossAttention,
    CrissCrossAttention3d,
    RecurrentCrissCrossAttention,
    RecurrentCrissCrossAttention3d,
)
from gingham.nn.masked_average_pool import MaskedAveragePool
from gingham.nn.masked_similarity import MaskedSimilarity
from gingham.nn.roi_pool import RoIPool
from gingham.nn.spatial_temporal_attention import SpatialTemporalAttention, interframe_regularization

__all__ = [
    "CosineSimilarityMap",
    "CrissCrossAttention",
    "CrissCrossAttention3d",
    "MaskedAveragePool",
    "MaskedSimilarity",
    "RecurrentCrissCrossAttention",
    "RecurrentCrissCrossAttention3d",
    "RoIPool",
    "SpatialTemporalAttention",
    "interframe_regularization",
]
