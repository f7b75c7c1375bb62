"""Every operator in plain PyTorch, as short as it can be: the definition that the kernels are tested against."""

from gingham.reference.cosine_similarity_map import cosine_similarity_map
from gingham.reference.criss_cross_attention import criss_cross_attention

__all__ = ["cosine_similarity_map", "criss_cross_attention"]
