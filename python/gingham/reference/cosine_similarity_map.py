"""The cosine of every pixel with a set of prototypes (Zhang et al., SG-One, https://arxiv.org/abs/1810.09091)."""

import torch
from torch import Tensor


def cosine_similarity_map(
    features: Tensor, prototypes: Tensor, *, eps: float = 1e-8, torch_compat: bool = False
) -> Tensor:
    """The cosine of every pixel of a feature map with each of a set of vectors.

    Args:
        features: [B, C, H, W], floating point.
        prototypes: [B, P, C], the dtype of `features`.
        eps: norms that are not above it have cosine 0 and no gradient.
        torch_compat: such norms count as `eps` instead, as in `torch.nn.functional.cosine_similarity`.

    Returns:
        [B, P, H, W], the dtype of `features`. Half-precision inputs are computed in float32.

    Example:
        >>> import torch
        >>> features = torch.tensor([[3.0, 0.0], [4.0, 0.0]]).reshape(1, 2, 1, 2)
        >>> cosine_similarity_map(features, torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])).flatten(2)
        tensor([[[0.6000, 0.0000],
                 [0.8000, 0.0000]]])
    """
    dtype = features.dtype if features.dtype == torch.float64 else torch.float32

    def directions(vectors: Tensor, axis: int) -> Tensor:
        vectors = vectors.to(dtype)
        norms = vectors.norm(dim=axis, keepdim=True)
        if torch_compat:
            return vectors / (norms + (norms.clamp_min(eps) - norms).detach())  # its gradient is that of the norm
        nothing = norms <= eps
        others = vectors.masked_fill(nothing, 1.0)  # whose norms can be differentiated, and again
        return (others / others.norm(dim=axis, keepdim=True)).masked_fill(nothing, 0.0)

    cosines = torch.einsum("bchw,bpc->bphw", directions(features, 1), directions(prototypes, 2))
    return cosines.to(features.dtype)
