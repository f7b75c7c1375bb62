"""What every operator's registration shares: folding vmap's axis into the batch, and the autocast rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def fold_into_batch(size: int, tensors: Sequence[Tensor], axes: Sequence[int | None]) -> list[Tensor]:
    """Moves each tensor's mapped axis into its batch axis; tensors that are not mapped are repeated."""
    moved = (
        x.expand(size, *x.shape) if axis is None else x.movedim(axis, 0) for x, axis in zip(tensors, axes, strict=True)
    )
    return [x.flatten(0, 1) for x in moved]


def unfold_from_batch(size: int, tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The inverse for results, as vmap rules return them."""
    return tuple(x.unflatten(0, (size, x.size(0) // size)) for x in tensors), (0,) * len(tensors)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on the tensor's device; None when autocast is off there."""
    device = "cuda" if tensor.is_cuda else "cpu"  # torch has no answer for the device of tensors without data
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts what autocast would cast: floating tensors other than float64."""
    eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if eligible else tensor


def describe(value: object) -> str:
    """A value in an error message."""
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided else f"{str(value.layout).removeprefix('torch.')} "
        shape = "of several shapes" if value.is_nested else list(value.shape)
        return f"{layout}{str(value.dtype).removeprefix('torch.')} {shape} on {value.device}"
    return type(value).__name__
