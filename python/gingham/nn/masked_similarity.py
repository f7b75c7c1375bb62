"""The similarity of a query with masked supports as a module (Zhang et al., SG-One, https://arxiv.org/abs/1810.09091)."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from gingham import ops


class MaskedSimilarity(nn.Module):
    """The cosine of every pixel of a query with the mean of masked supports, `gingham.ops.masked_similarity`.

    Args:
        resize: "features": the supports count as interpolated to the size of their masks, as in SG-One. "mask": the
            masks are interpolated to the size of the supports.
        eps: norms up to this one, finite and not negative, have cosine 0 and let no gradient through.
        torch_compat: such norms count as `eps` instead, as in `torch.nn.CosineSimilarity`.

    Shape:
        query [B, C, h, w], support [B, K, C, h', w'] and mask [B, K, 1, H, W] (or lists of K tensors of different
        sizes), valid_sizes [B, K, 4] or None -> [B, 1, h, w].

    Raises:
        ValueError: if `resize` is neither of the two, `eps` is negative or not finite, or the shapes do not agree.

    Source: SG-One, similarity guidance (https://arxiv.org/abs/1810.09091).

    Example:
        >>> import torch
        >>> similarity = MaskedSimilarity()
        >>> query, support = torch.randn(2, 64, 5, 7), torch.randn(2, 3, 64, 6, 6)
        >>> similarity(query, support, torch.rand(2, 3, 1, 48, 48) > 0.5).shape
        torch.Size([2, 1, 5, 7])
    """

    def __init__(
        self, *, resize: Literal["features", "mask"] = "features", eps: float = 1e-8, torch_compat: bool = False
    ) -> None:
        super().__init__()
        if resize not in ("features", "mask"):
            raise ValueError(f"resize must be 'features' or 'mask', got {resize!r}")
        if not 0 <= eps < float("inf"):
            raise ValueError(f"eps must be finite and not negative, got {eps}")
        self.resize: Literal["features", "mask"] = resize
        self.eps, self.torch_compat = eps, torch_compat

    def forward(
        self,
        query: Tensor,
        support: Tensor | Sequence[Tensor],
        mask: Tensor | Sequence[Tensor],
        valid_sizes: Tensor | None = None,
    ) -> Tensor:
        return ops.masked_similarity(
            query,
            support,
            mask,
            resize=self.resize,
            valid_sizes=valid_sizes,
            eps=self.eps,
            torch_compat=self.torch_compat,
        )

    def extra_repr(self) -> str:
        return f"resize={self.resize!r}, eps={self.eps}" + (", torch_compat=True" if self.torch_compat else "")
