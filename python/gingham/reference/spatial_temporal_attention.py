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
    rows = _bands(features.size(3), parts)
    f = _widened(features)
    attention, shares = _attend(f, rows, energy, eps)
    scores, frames = _compare(shares, eps)
    weights = scores.detach() if detach_attention else scores
    clips = torch.arange(f.size(0), device=f.device)
    best, every = [], []  # the bands of the paper's P1 and P2
    for k, band in enumerate(rows):
        best.append(f[clips, frames[:, k], :, band])  # [B, C, rows, W]
        every.append((weights[:, :, k, None, None, None] * f[:, :, :, band]).sum(dim=1))
    fused = torch.cat([torch.cat(best, dim=2), torch.cat(every, dim=2)], dim=1)  # [B, 2C, H, W]
    pooled = fused.mean(dim=(2, 3)).to(features.dtype)
    return (pooled, scores, frames, attention) if return_map else (pooled, scores, frames)


def spatial_temporal_sums(
    features: Tensor, parts: int = 4, *, energy: str = "sq", eps: float = 1e-12
) -> tuple[Tensor, Tensor]:
    """What `spatial_temporal_attention_from_sums` needs to know of a frame, whatever clip it will be part of.

    Args:
        features: [N, C, H, W], floating point.
        parts: as of `spatial_temporal_attention`.
        energy: as of `spatial_temporal_attention`.
        eps: as of `spatial_temporal_attention`.

    Returns:
        sums [N, K, C] of the features over each band, and energies [N, K]: the attention that each band gets.

    Example:
        >>> import torch
        >>> spatial_temporal_sums(torch.ones(1, 3, 4, 2), parts=2)
        (tensor([[[4., 4., 4.],
                 [4., 4., 4.]]]), tensor([[0.5000, 0.5000]]))
    """
    rows = _bands(features.size(2), parts)
    f = _widened(features)
    sums = torch.stack([f[:, :, band].sum(dim=(2, 3)) for band in rows], dim=1)
    return sums, _attend(f[:, None], rows, energy, eps)[1][:, 0]


def spatial_temporal_attention_from_sums(
    sums: Tensor, energies: Tensor, positions: int, *, eps: float = 1e-12
) -> tuple[Tensor, Tensor, Tensor]:
    """The results of `spatial_temporal_attention` for clips of frames whose sums are known.

    Args:
        sums: [B, T, K, C].
        energies: [B, T, K].
        positions: H * W of the features.
        eps: as of `spatial_temporal_attention`.

    Returns:
        pooled [B, 2C], scores [B, T, K], frames [B, K].

    Example:
        >>> import torch
        >>> sums, energies = spatial_temporal_sums(torch.ones(2, 3, 4, 2), parts=2)
        >>> spatial_temporal_attention_from_sums(sums[None], energies[None], positions=8)[0]
        tensor([[1., 1., 1., 1., 1., 1.]])
    """
    scores, frames = _compare(energies, eps)
    best = sums.gather(1, frames[:, None, :, None].expand(-1, 1, -1, sums.size(3))).sum(dim=(1, 2))
    every = (scores[..., None] * sums).sum(dim=(1, 2))
    return torch.cat([best, every], dim=1) / positions, scores, frames


def _widened(features: Tensor) -> Tensor:
    return features if features.dtype == torch.float64 else features.float()


def _bands(height: int, parts: int) -> list[slice]:
    return [slice(k * height // parts, (k + 1) * height // parts) for k in range(parts)]


def _attend(f: Tensor, rows: list[slice], energy: str, eps: float) -> tuple[Tensor, Tensor]:
    """Spatial attention [B, T, H, W], each frame's by itself, and what the bands get of it, [B, T, K]."""
    squares = f.square().sum(dim=2)
    strength = squares if energy == "sq" else _square_root(squares)
    bands = torch.stack([strength[:, :, band].sum(dim=(2, 3)) for band in rows], dim=2)
    total = bands.sum(dim=2)
    if energy == "agrl":
        sizes = [f.size(4) * (band.stop - band.start) for band in rows]
        bands = torch.stack([bands[:, :, k] / size for k, size in enumerate(sizes)], dim=2)
        total = _square_root(squares.sum(dim=(2, 3)))
    return _divide(strength, total[:, :, None, None], eps), _divide(bands, total[:, :, None], eps)


def _compare(shares: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Scores [B, T, K], of which those of a part sum to 1, and the frame with the largest one, the first of equals.

    What is not a number is larger than nothing, and nothing is larger than it: it is chosen where it comes first.
    """
    scores = _divide(shares, shares.sum(dim=1, keepdim=True), eps)
    order = torch.arange(shares.size(1), device=shares.device)[:, None]
    shares = torch.where(shares.isnan(), torch.where(order == 0, torch.inf, -torch.inf), shares)
    is_best = shares == shares.amax(dim=1, keepdim=True)
    return scores, torch.where(is_best, order, order[-1]).amin(dim=1)


def _square_root(x: Tensor) -> Tensor:
    """The square root, whose gradient at 0 is taken for 0."""
    return torch.where(x > 0, torch.where(x > 0, x, 1).sqrt(), x)


def _divide(x: Tensor, total: Tensor, eps: float) -> Tensor:
    """``x / max(total, eps)``; no gradient passes where the total is not above eps."""
    return torch.where(total <= eps, (x / eps).detach(), x / torch.where(total <= eps, 1, total))
