"""Maps of low resolution read at single points of the image, without upsampling them."""

import torch
from torch import Tensor


def sample_at_points(
    maps: Tensor,
    image: Tensor,
    y: Tensor,
    x: Tensor,
    size: tuple[int, int] | torch.Size,
    *,
    align_corners: bool = True,
) -> Tensor:
    """What upsampling maps bilinearly to the size of the image and picking the pixels would give.

    Args:
        maps: [B, C, h, w].
        image: [M] int64, which of the B maps each point reads.
        y: [M], rows of the image; fractions count, and what lies outside reads the edge.
        x: [M], columns of the image.
        size: (H, W) of the image.
        align_corners: of the upsampling.

    Returns:
        [M, C], float64 for float64 maps and else float32.

    Raises:
        ValueError: maps that are not [B, C, h, w], or image, y and x that are not [M] alike.

    Example:
        >>> maps = torch.arange(9.0).reshape(1, 1, 3, 3)
        >>> y, x = torch.tensor([1.0, 3.0]), torch.tensor([3.0, 1.0])
        >>> sample_at_points(maps, torch.tensor([0, 0]), y, x, (5, 5)).flatten().tolist()
        [3.0, 5.0]
    """
    if maps.dim() != 4:
        raise ValueError(f"maps must be [B, C, h, w], got {list(maps.shape)}")
    if image.dim() != 1 or not image.shape == y.shape == x.shape:
        raise ValueError(
            f"image, y and x must be [M] alike, got {list(image.shape)}, {list(y.shape)} and {list(x.shape)}"
        )
    rows, columns = maps.shape[-2:]
    dtype = torch.float64 if maps.dtype == torch.float64 else torch.float32
    y = _position(y.to(dtype), size[0], rows, align_corners)
    x = _position(x.to(dtype), size[1], columns, align_corners)
    top, left = y.floor().long(), x.floor().long()
    bottom, right = (top + 1).clamp(max=rows - 1), (left + 1).clamp(max=columns - 1)
    down, across = (y - top)[:, None], (x - left)[:, None]
    pixels = maps.movedim(1, -1)  # [B, h, w, C]

    def row(index: Tensor) -> Tensor:
        return pixels[image, index, left].to(dtype) * (1 - across) + pixels[image, index, right].to(dtype) * across

    return row(top) * (1 - down) + row(bottom) * down


def _position(position: Tensor, extent: int, size: int, align_corners: bool) -> Tensor:
    """Where a row of an image of `extent` rows lies in a map of `size` rows."""
    if align_corners:
        return (position * ((size - 1) / max(extent - 1, 1))).clamp(0, size - 1)
    return ((position + 0.5) * (size / extent) - 0.5).clamp(0, size - 1)
