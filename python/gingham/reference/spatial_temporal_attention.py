"""Spatial-temporal attention (Fu et al., STA, AAAI 2019, https://arxiv.org/abs/1811.04129)."""

import torch
from torch import Tensor


def spatial_temporal_attention(
    features: Tensor,
    parts: int = 4,
    *,
    energy: str = "sq",
    eps: float = 1e-12,
    detach_attention: bool = False,
    return_map: bool = False,
) -> tuple[Tensor, ...]:
    """The mean of two maps made of a clip's frames: of each body part the best frame, and the frames by their scores.

    Args:
        features: [B, T, C, H, W], floating point.
        parts: K, bands of rows, 1 to H; band k has the rows from ``k * H // K`` to ``(k + 1) * H // K``.
        energy: "sq" (squared norm of a position's features, divided by the frame's sum), "l2" (norm, divided likewise)
            or "agrl" (norm, divided by the L2 norm over positions; a band's mean instead of its sum).
        eps: totals are taken for at least this.
        detach_attention: take the scores for constants in `pooled`.
        return_map: return the attention map too.

    Returns:
        pooled [B, 2C], scores [B, T, K], frames [B, K], and, if asked for, the map [B, T, H, W].

    Example:
        >>> import torch
        >>> features = torch.ones(1, 2, 1, 4, 1)
        >>> features[0, 1, 0, 2:] = 0  # the lower half of the second frame is hidden
        >>> pooled, scores, frames = spatial_temporal_attention(features, parts=2)
        >>> scores
        tensor([[[0.3333, 1.0000],
                 [0.6667, 0.0000]]])
        >>> frames
        tensor([[1, 0]])
    """
    batch, length, _, height, width = features.shape
    rows = [slice(k * height // parts, (k + 1) * height // parts) for k in range(parts)]
    f = features if features.dtype == torch.float64 else features.float()

    strength = f.square().sum(dim=2)  # [B, T, H, W]
    if energy != "sq":
        strength = _square_root(strength)
    bands = torch.stack([strength[:, :, band].sum(dim=(2, 3)) for band in rows], dim=2)  # [B, T, K]
    if energy == "agrl":
        bands = bands / torch.tensor([width * (band.stop - band.start) for band in rows], device=f.device)
        total = _square_root(strength.square().sum(dim=(2, 3)))
    else:
        total = bands.sum(dim=2)
    attention = _divide(strength, total[:, :, None, None], eps)
    shares = _divide(bands, total[:, :, None], eps)
    scores = _divide(shares, shares.sum(dim=1, keepdim=True), eps)  # [B, T, K]
    order = torch.arange(length, device=f.device)[:, None]
    is_best = shares == shares.amax(dim=1, keepdim=True)
    frames = torch.where(is_best, order, length - 1).amin(dim=1)  # [B, K], the first of equals

    weights = scores.detach() if detach_attention else scores
    best, every = [], []  # the bands of the paper's P1 and P2
    for k, band in enumerate(rows):
        best.append(f[torch.arange(batch, device=f.device), frames[:, k], :, band])  # [B, C, rows, W]
        every.append((weights[:, :, k, None, None, None] * f[:, :, :, band]).sum(dim=1))
    fused = torch.cat([torch.cat(best, dim=2), torch.cat(every, dim=2)], dim=1)  # [B, 2C, H, W]
    pooled = fused.mean(dim=(2, 3)).to(features.dtype)
    return (pooled, scores, frames, attention) if return_map else (pooled, scores, frames)


def _square_root(x: Tensor) -> Tensor:
    """The square root, whose gradient at 0 is taken for 0."""
    return torch.where(x > 0, torch.where(x > 0, x, 1).sqrt(), x)


def _divide(x: Tensor, total: Tensor, eps: float) -> Tensor:
    """``x / max(total, eps)``; no gradient passes where the total is not above eps."""
    return torch.where(total <= eps, (x / eps).detach(), x / torch.where(total <= eps, 1, total))
