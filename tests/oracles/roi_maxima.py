"""RoI max pooling, pixel by pixel in plain loops over NumPy arrays: the oracle of the tests of roi_pool."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

LOWEST = -3.4028234663852886e38


def bins(first: Any, last: Any, scale: float, count: int, extent: int) -> list[tuple[int, int]]:
    """Begin and end of each bin along one axis; every product is one of the numbers' own type."""
    kind = type(first)

    def rounded(x: Any) -> int:  # half away from zero, at the ends of int32 at most
        size = min(abs(float(x)), 2.0**40)
        whole = math.floor(size) + (size - math.floor(size) >= 0.5)
        return min(max(int(math.copysign(whole, float(x))), -(2**31)), 2**31 - 1)

    start, stop = rounded(first * kind(scale)), rounded(last * kind(scale))
    size = kind(max(stop - start + 1, 1)) / kind(count)
    clip = lambda x: min(max(x, 0), extent)  # noqa: E731
    return [
        (clip(math.floor(kind(i) * size) + start), clip(math.ceil(kind(i + 1) * size) + start)) for i in range(count)
    ]


def roi_maxima(
    features: np.ndarray, boxes: np.ndarray, size: tuple[int, int], scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """[N, C, *size] maxima, in the dtype of `features`, and their places row * W + column, -1 where there is none."""
    channels, height, width = features.shape[1:]
    output = np.zeros((len(boxes), channels, *size), dtype=features.dtype)
    places = np.full(output.shape, -1, dtype=np.int32)
    for n, (image, x1, y1, x2, y2) in enumerate(boxes):
        rows, columns = bins(y1, y2, scale, size[0], height), bins(x1, x2, scale, size[1], width)
        for i, (top, bottom) in enumerate(rows):
            for j, (left, right) in enumerate(columns):
                if bottom <= top or right <= left:
                    continue
                window = features[int(image), :, top:bottom, left:right].astype(np.float64).reshape(channels, -1)
                window = np.where(window > LOWEST, window, -np.inf)
                best = window.argmax(axis=1)  # the first one
                found = window.max(axis=1) > LOWEST
                place = (top + best // (right - left)) * width + left + best % (right - left)
                places[n, :, i, j] = np.where(found, place, -1)
                flat = features[int(image)].reshape(channels, -1)
                with np.errstate(over="ignore"):
                    lowest = np.float32(LOWEST).astype(features.dtype)
                output[n, :, i, j] = np.where(found, flat[np.arange(channels), np.where(found, place, 0)], lowest)
    return output, places


def scattered(places: np.ndarray, grad: np.ndarray, boxes: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The gradient of the features: sums in float32 (float64) over boxes, rows and columns of bins, in this order."""
    sums = np.zeros((*shape[:2], shape[2] * shape[3]), dtype=np.float64 if grad.dtype == np.float64 else np.float32)
    for n, image in enumerate(boxes[:, 0].astype(int)):
        for c in range(shape[1]):
            for place, g in zip(places[n, c].ravel(), grad[n, c].ravel(), strict=True):
                if place >= 0:
                    sums[image, c, place] += sums.dtype.type(g)
    return sums.reshape(shape).astype(grad.dtype)
