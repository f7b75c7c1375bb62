"""The operators as functions on tensors: `torch.ops.gingham` with checks, autograd, autocast and vmap."""

from gingham.ops.criss_cross_attention import criss_cross_attention

__all__ = ["criss_cross_attention"]
