"""Masked similarity (Zhang et al., SG-One, https://arxiv.org/abs/1810.09091)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gingham.reference.cosine_similarity_map import cosine_similarity_map
from gingham.reference.masked_average_pool import masked_average_pool


def masked_similarity(
    query: Tensor,
    support: Tensor | Sequence[Tensor],
    mask: Tensor | Sequence[Tensor],
    *,
    resize: str = "features",
    valid_sizes: Tensor | None = None,
    eps: float = 1e-8,
    torch_compat: bool = False,
) -> Tensor:
    """The cosine of every pixel of a query with the mean of K masked averages of supports.

    Args:
        query: [B, C, h, w], floating point.
        support: [B, K, C, h', w'] or K maps [B, C, h_k, w_k], the dtype of `query`.
        mask: [B, K, 1, H, W] or K masks [B, 1, H_k, W_k], floating point, bool or uint8.
        resize: what is resized for the averages, see `masked_average_pool`.
        valid_sizes: [B, K, 4], int64: rows and columns of each support, then of its mask; the rest is padding. Of sizes
            that are out of range the nearest one within it counts.
        eps: norms that are not above it have cosine 0 and no gradient.
        torch_compat: such norms count as `eps` instead, as in `torch.nn.functional.cosine_similarity`.

    Returns:
        [B, 1, h, w], the dtype of `query`. Half-precision inputs are computed in float32.

    Example:
        >>> import torch
        >>> query = torch.tensor([[3.0, 0.0], [4.0, 1.0]]).reshape(1, 2, 1, 2)
        >>> mask = torch.tensor([[True, False]]).reshape(1, 1, 1, 1, 2)
        >>> masked_similarity(query, query[:, None], mask).squeeze()
        tensor([1.0000, 0.8000])
    """
    dtype = query.dtype if query.dtype == torch.float64 else torch.float32
    supports, masks = (list(x.unbind(1)) if isinstance(x, Tensor) else x for x in (support, mask))
    pooled = []
    for shot, (features, weights) in enumerate(zip(supports, masks, strict=True)):
        samples = []
        for index in range(query.size(0)):
            one, of_one = features[index, None], weights[index, None]
            if valid_sizes is not None:
                rows, columns, mask_rows, mask_columns = valid_sizes[index, shot].clamp(min=0).tolist()
                one, of_one = one[:, :, :rows, :columns], of_one[:, :, :mask_rows, :mask_columns]
            samples.append(masked_average_pool(one.to(dtype), of_one, resize=resize))
        pooled.append(torch.cat(samples) if samples else query.new_zeros(query.shape[:2], dtype=dtype))
    prototype = torch.stack(pooled, dim=1).mean(dim=1, keepdim=True)  # [B, 1, C]
    return cosine_similarity_map(query.to(dtype), prototype, eps=eps, torch_compat=torch_compat).to(query.dtype)
