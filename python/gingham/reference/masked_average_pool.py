"""Masked average pooling (Zhang et al., SG-One, https://arxiv.org/abs/1810.09091)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_average_pool(features: Tensor, mask: Tensor, *, resize: str = "features") -> Tensor:
    """The mean of a feature map under a mask.

    Args:
        features: [B, C, h, w], floating point.
        mask: [B, 1, H, W], floating point, bool or uint8.
        resize: "features": the features are interpolated to the size of the mask. "mask": the mask to that of the
            features. Both bilinearly, with `align_corners=False`.

    Returns:
        [B, C], the dtype of `features`; zeros where the mask sums to zero. Half-precision features are computed in
        float32.

    Example:
        >>> import torch
        >>> features = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).reshape(1, 1, 2, 2)
        >>> mask = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).reshape(1, 1, 2, 2)
        >>> masked_average_pool(features, mask)
        tensor([[2.]])
    """
    dtype = features.dtype if features.dtype == torch.float64 else torch.float32
    maps, weights = features.to(dtype), mask.to(dtype)
    if 0 in (*maps.shape, *weights.shape):
        nothing = features.flatten(2)[:, :, :0].sum(dim=2)  # whose gradient is zero, whatever the features are
        return nothing + mask.flatten()[:0].sum().to(features.dtype)
    if resize == "features":
        maps = F.interpolate(maps, weights.shape[2:], mode="bilinear", align_corners=False)
    else:
        weights = F.interpolate(weights, maps.shape[2:], mode="bilinear", align_corners=False)
    total = weights.sum(dim=(2, 3))
    mean = (maps * weights).sum(dim=(2, 3)) / total.masked_fill(total == 0, 1)
    return mean.masked_fill(total == 0, 0).to(features.dtype)
