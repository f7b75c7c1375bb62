"""Cosines of pixels with prototypes as a module (Zhang et al., SG-One, https://arxiv.org/abs/1810.09091)."""

from torch import Tensor, nn

from gingham import ops


class CosineSimilarityMap(nn.Module):
    """The cosine of every pixel of a feature map with each of a set of vectors, `gingham.ops.cosine_similarity_map`.

    Args:
        eps: norms up to this one, finite and not negative, have cosine 0 and let no gradient through.
        torch_compat: such norms count as `eps` instead, as in `torch.nn.CosineSimilarity`.

    Shape:
        features [B, C, H, W], prototypes [B, P, C] -> [B, P, H, W].

    Raises:
        ValueError: if `eps` is negative or not finite, or the shapes do not agree.

    Source: SG-One, section III-B (https://arxiv.org/abs/1810.09091).

    Example:
        >>> import torch
        >>> similarity = CosineSimilarityMap()
        >>> similarity(torch.randn(2, 64, 5, 7), torch.randn(2, 3, 64)).shape
        torch.Size([2, 3, 5, 7])
    """

    def __init__(self, *, eps: float = 1e-8, torch_compat: bool = False) -> None:
        super().__init__()
        if not 0 <= eps < float("inf"):
            raise ValueError(f"eps must be finite and not negative, got {eps}")
        self.eps, self.torch_compat = eps, torch_compat

    def forward(self, features: Tensor, prototypes: Tensor) -> Tensor:
        return ops.cosine_similarity_map(features, prototypes, eps=self.eps, torch_compat=self.torch_compat)

    def extra_repr(self) -> str:
        return f"eps={self.eps}" + (", torch_compat=True" if self.torch_compat else "")
