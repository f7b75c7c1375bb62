"""RoI max pooling (Girshick, Fast R-CNN, https://arxiv.org/abs/1504.08083, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def roi_pool(features: Tensor, boxes: Tensor, output_size: int | Sequence[int], spatial_scale: float = 1.0) -> Tensor:
    """The largest pixel in each bin of a grid over each box; zero in bins that lie outside of the map.

    Args:
        features: [B, C, H, W], floating point.
        boxes: [N, 5], rows (image, x1, y1, x2, y2). The edges of bins are computed in their dtype.
        output_size: bins (per column, per row), or one number for both.
        spatial_scale: pixels of the map per unit of the boxes.

    Returns:
        [N, C, *output_size], the dtype of `features`. Only pixels greater than -3.4028235e38 count, which NaN is not;
        the first of several equal ones gets the gradient; a bin of others is -3.4028235e38.

    Example:
        >>> import torch
        >>> ramp = torch.arange(1.0, 65.0).reshape(1, 1, 8, 8)
        >>> roi_pool(ramp, torch.tensor([[0.0, 0.0, 0.0, 3.0, 3.0]]), 2).squeeze()
        tensor([[10., 12.],
                [26., 28.]])
    """
    rows, columns = (output_size, output_size) if isinstance(output_size, int) else output_size
    channels, height, width = features.shape[1:]
    if features.numel() == 0 or boxes.size(0) == 0:
        return features.new_zeros(boxes.size(0), channels, rows, columns) + 0 * features.sum()
    top, bottom = _bins(boxes[:, 2], boxes[:, 4], spatial_scale, rows, height)  # [N, rows]
    left, right = _bins(boxes[:, 1], boxes[:, 3], spatial_scale, columns, width)  # [N, columns]
    image = boxes[:, 0].long()[:, None, None]

    # What only greater pixels can beat, in float64 too; infinite in half precision.
    lowest = torch.tensor(-torch.finfo(torch.float32).max, dtype=torch.float64, device=features.device)
    lowest = lowest.to(features.dtype)
    best = lowest.expand(boxes.size(0), rows, columns, channels)
    place = torch.full(best.shape, -1, device=features.device)  # y * W + x; -1: none
    for down in range(int((bottom - top).max())):
        for across in range(int((right - left).max())):
            y, x = (top + down)[:, :, None], (left + across)[:, None, :]
            inside = (y < bottom[:, :, None]) & (x < right[:, None, :])
            y, x = y.clamp(max=height - 1), x.clamp(max=width - 1)
            pixel = features.detach()[image, :, y, x]  # [N, rows, columns, C]
            better = inside[..., None] & (pixel > best)
            best = torch.where(better, pixel, best)
            place = torch.where(better, (y * width + x)[..., None], place)

    channel = torch.arange(channels, device=features.device)
    pixels = features if features.dtype == torch.float64 else features.float()  # in which gradients are summed
    largest = pixels[image[..., None], channel, place.clamp(min=0) // width, place.clamp(min=0) % width]
    largest = largest.to(features.dtype)
    empty = (bottom <= top)[:, :, None, None] | (right <= left)[:, None, :, None]
    return torch.where(place >= 0, largest, torch.where(empty, 0.0, lowest)).permute(0, 3, 1, 2)


def _bins(first: Tensor, last: Tensor, scale: float, count: int, extent: int) -> tuple[Tensor, Tensor]:
    """Where bins begin and end, [N, count], cut off at the edges of the map."""
    start, stop = _round(first * scale), _round(last * scale)
    bins = torch.arange(count + 1, dtype=first.dtype, device=first.device)
    size = (stop - start + 1).clamp(min=1).to(first.dtype) / bins[-1]  # in the boxes' dtype, as are the products
    begin = (bins[:-1] * size[:, None]).floor().long() + start[:, None]
    end = (bins[1:] * size[:, None]).ceil().long() + start[:, None]
    return begin.clamp(0, extent), end.clamp(0, extent)


def _round(x: Tensor) -> Tensor:
    """To the nearest integer, half away from zero, at the ends of int32 at most."""
    whole = x.trunc()
    nearest = torch.where((x - whole).abs() >= 0.5, whole + x.sign(), whole)
    return nearest.clamp(-(2.0**31), 2.0**31).long().clamp(max=2**31 - 1)
