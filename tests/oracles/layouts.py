"""Ways in which a tensor of one value can lie in memory. Maps are [B, C, *S]; what surrounds a view is not a number."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def sliced(x: Tensor) -> Tensor:
    room = x.new_full([extent + 3 for extent in x.shape], math.nan)
    view = room[tuple(slice(1, 1 + extent) for extent in x.shape)]
    return view.copy_(x)


def every_other_column(x: Tensor) -> Tensor:
    room = x.new_full([*x.shape[:-1], 2 * x.shape[-1] + 1], math.nan)
    return room[..., 1::2].copy_(x)


def some_of_the_channels_last(x: Tensor) -> Tensor:
    room = channels_last(x.new_full([x.shape[0], x.shape[1] + 5, *x.shape[2:]], math.nan))
    return room[:, 3 : 3 + x.shape[1]].copy_(x)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def batch_innermost(x: Tensor) -> Tensor:
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def expanded_batch(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


def expanded_channels(x: Tensor) -> Tensor:
    return x[:, :1].expand_as(x)


def expanded_columns(x: Tensor) -> Tensor:
    return x[..., :1].expand_as(x)


def one_number(x: Tensor) -> Tensor:
    return x.flatten()[:1].reshape([1] * x.dim()).expand_as(x) if x.numel() else x


LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    contiguous,
    channels_last,
    sliced,
    every_other_column,
    some_of_the_channels_last,
    transposed,
    batch_innermost,
    expanded_batch,
    expanded_channels,
    expanded_columns,
    one_number,
]
