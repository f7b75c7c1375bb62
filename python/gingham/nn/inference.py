"""Segmenting whole pictures: as one input, in overlapping tiles, over scales and mirrored.

Every function takes `predict`, something that maps images [B, 3, H, W] to logits: a model, whose logits may be coarser
than its input, or another function of this file bound to one. All treat every image of a batch on its own and return
[B, K, H, W]: average logits, or, over scales and mirrored images where it is asked for, the logarithm of average
probabilities.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Predict = Callable[[Tensor], Any]


def whole_image(predict: Predict, images: Tensor, *, align_corners: bool = True) -> Tensor:
    """Logits of images taken as one input, upsampled to their size.

    Args:
        predict: gives [B, K, h, w] or an object with such ``logits``.
        images: [B, 3, H, W].
        align_corners: of the upsampling.

    Returns:
        [B, K, H, W].

    Example:
        >>> whole_image(torch.nn.AvgPool2d(2), torch.rand(1, 3, 8, 6)).shape
        torch.Size([1, 3, 8, 6])
    """
    _check_images(images)
    return _resized(_logits(predict, images), images.shape[-2:], align_corners)


def sliding_window(
    predict: Predict,
    images: Tensor,
    *,
    tile: int | tuple[int, int] = 769,
    stride: int | tuple[int, int] | None = None,
    align_corners: bool = True,
) -> Tensor:
    """Logits of images taken in overlapping tiles, averaged where tiles overlap.

    Tiles start every `stride` pixels; the last ones are shifted inward so that they end with the image. An image
    smaller than a tile is padded with zeros at the bottom and on the right.

    Args:
        predict: gives [B, K, h, w] or an object with such ``logits``.
        images: [B, 3, H, W], normalised such that 0 is a neutral padding.
        tile: rows and columns of a tile, in pixels.
        stride: pixels between tiles; two thirds of the tile, rounded up, by default.
        align_corners: of the upsampling from features to tile.

    Returns:
        [B, K, H, W].

    Raises:
        ValueError: a tile or stride below 1, or a stride beyond the tile.

    Source: CCNet's official evaluation; right for any batch size.

    Example:
        >>> sliding_window(torch.nn.AvgPool2d(2), torch.rand(2, 3, 20, 30), tile=16).shape
        torch.Size([2, 3, 20, 30])
    """
    _check_images(images)
    tile_rows, tile_columns = _pair(tile)
    if min(tile_rows, tile_columns) < 1:
        raise ValueError(f"tile must be at least 1 pixel, got {tile}")
    steps = (math.ceil(tile_rows * 2 / 3), math.ceil(tile_columns * 2 / 3)) if stride is None else _pair(stride)
    if min(steps) < 1 or steps[0] > tile_rows or steps[1] > tile_columns:
        raise ValueError(f"stride must be between 1 and the tile {tile}, got {stride}")
    rows, columns = images.shape[-2:]
    padded = F.pad(images, (0, max(0, tile_columns - columns), 0, max(0, tile_rows - rows)))
    total: Tensor | None = None
    coverage = images.new_zeros(padded.shape[-2:], dtype=torch.float32)
    for top in _starts(padded.shape[-2], tile_rows, steps[0]):
        for left in _starts(padded.shape[-1], tile_columns, steps[1]):
            window = (..., slice(top, top + tile_rows), slice(left, left + tile_columns))
            logits = _resized(_logits(predict, padded[window]), (tile_rows, tile_columns), align_corners)
            if total is None:
                total = logits.new_zeros(logits.shape[0], logits.shape[1], *padded.shape[-2:])
            total[window] += logits
            coverage[window] += 1
    assert total is not None  # at least one tile covers an image
    return (total / coverage)[..., :rows, :columns]


def multi_scale_flip(
    predict: Predict,
    images: Tensor,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    mirror_pairs: Sequence[tuple[int, int]] = (),
    average: Literal["logits", "probabilities"] = "logits",
    align_corners: bool = True,
) -> Tensor:
    """Logits averaged over scaled, and optionally mirrored, versions of the images.

    Args:
        predict: gives [B, K, h, w] or an object with such ``logits``; bind `sliding_window` to a model to scale the
            picture and slide over it.
        images: [B, 3, H, W].
        scales: factors of the image size, equally weighted.
        flip: also predict from the images mirrored left to right, mirrored back.
        mirror_pairs: classes that have a left and a right, whose logits change places in the mirrored prediction.
        average: "logits", or "probabilities" of the classes at the size of the images.
        align_corners: of all resizing.

    Returns:
        [B, K, H, W]; of probabilities, the logarithm of their average, which a softmax gives back.

    Raises:
        ValueError: no scale, or one that is not positive, or another average.

    Source: CCNet's official evaluation, which resizes nothing back and mirrors rows in its batched form; this does.

    Example:
        >>> from functools import partial
        >>> predict = partial(sliding_window, torch.nn.AvgPool2d(2), tile=16)
        >>> multi_scale_flip(predict, torch.rand(2, 3, 20, 30), scales=(0.75, 1.0), flip=True).shape
        torch.Size([2, 3, 20, 30])
    """
    _check_images(images)
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales must be one or more positive numbers, got {scales}")
    if average not in ("logits", "probabilities"):
        raise ValueError(f"average must be 'logits' or 'probabilities', got {average!r}")
    size = images.shape[-2:]

    def views() -> Iterator[Tensor]:
        for scale in scales:
            scaled_size = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
            scaled = _resized(images, scaled_size, align_corners)
            yield _resized(_logits(predict, scaled), size, align_corners)
            if flip:
                mirrored = _logits(predict, scaled.flip(-1)).flip(-1)
                yield _resized(mirror_channels(mirrored, mirror_pairs), size, align_corners)

    count = len(scales) * (2 if flip else 1)
    if average == "logits":
        return reduce(torch.add, views()) / count
    return reduce(torch.logaddexp, (view.log_softmax(1) for view in views())) - math.log(count)


def mirror_channels(maps: Tensor, mirror_pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Exchange the channels of the classes of each pair, as a mirrored picture needs it; no pixel moves.

    Args:
        maps: [..., K, H, W].
        mirror_pairs: indices below K of a left and its right.

    Returns:
        [..., K, H, W].

    Raises:
        ValueError: a pair that has no channel.

    Example:
        >>> mirror_channels(torch.arange(4).reshape(4, 1, 1), ((1, 2),)).flatten()
        tensor([0, 2, 1, 3])
    """
    order = list(range(maps.shape[-3]))
    for left, right in mirror_pairs:
        if not (0 <= left < len(order) and 0 <= right < len(order)):
            raise ValueError(f"mirror_pairs must be below the {len(order)} channels, got {(left, right)}")
        order[left], order[right] = right, left
    return maps[..., order, :, :] if mirror_pairs else maps


def _logits(predict: Predict, images: Tensor) -> Tensor:
    output = predict(images)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _resized(maps: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=align_corners)


def _starts(extent: int, tile: int, stride: int) -> Iterator[int]:
    """First pixel of each tile along one axis; the last tile ends with the image."""
    count = math.ceil((extent - tile) / stride) + 1
    return (min(index * stride, extent - tile) for index in range(count))


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _check_images(images: Tensor) -> None:
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"images must be floating [B, C, H, W], got {images.dtype} {list(images.shape)}")
