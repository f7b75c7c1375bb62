"""The similarity of a query with masked supports (Zhang et al., SG-One, https://arxiv.org/abs/1810.09091)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gingham import reference
from gingham.ops._register import (
    FLOATING,
    LEAST_DIVISOR,
    Registered,
    check_eps,
    check_like,
    check_tensor,
    describe,
    empty_map,
    fold_into_batch,
    is_channels_last,
    promote,
    sums_dtype,
    unfold_from_batch,
)
from gingham.ops.masked_average_pool import MASKS


def masked_similarity(
    query: Tensor,
    support: Tensor | Sequence[Tensor],
    mask: Tensor | Sequence[Tensor],
    *,
    resize: Literal["features", "mask"] = "features",
    valid_sizes: Tensor | None = None,
    eps: float = 1e-8,
    torch_compat: bool = False,
) -> Tensor:
    """The cosine of every pixel of a query with the mean of K masked averages of supports, in one call.

    Source: Zhang et al., SG-One, IEEE Transactions on Cybernetics 2020, https://arxiv.org/abs/1810.09091.

    `masked_average_pool` of each support, the mean of these vectors as they are, not normalised, and
    `cosine_similarity_map` of the query with that mean. Query and supports are read once.

    Args:
        query: [B, C, h, w] with at least one channel; float32, float64, float16 or bfloat16, on CPU or CUDA, with any
            strides (maps whose columns or channels are adjacent in memory are read in place).
        support: [B, K, C, h', w'] with at least one shot, the dtype and device of `query`; or K maps [B, C, h_k, w_k]
            of different sizes, which are padded.
        mask: [B, K, 1, H, W], or K masks [B, 1, H_k, W_k], on the device of `query`; of any of these dtypes, bool or
            uint8, larger or smaller than the supports.
        resize: "features": the supports count as interpolated to the size of their masks, as in SG-One. "mask": the
            masks are interpolated to the size of the supports.
        valid_sizes: int64 [B, K, 4]: the rows and the columns of each support, then those of its mask, that count, from
            the upper left; what pads a support changes nothing. Not with lists. On CUDA, sizes out of range count as
            the nearest in it.
        eps: norms up to this one, finite and not negative, have cosine 0 and let no gradient through.
        torch_compat: such norms count as `eps` instead, and gradients, of order 1 / `eps` there, are those of
            `torch.nn.functional.cosine_similarity`. `eps` is then 0 or at least the smallest normal number of float32
            (of float64 for float64).

    Returns:
        [B, 1, h, w] between -1 and 1 but for rounding, contiguous, in the dtype of `query`. Sums, and the mean of the
        supports, are held in float32 (float64 for float64). Under autocast, query and support of mixed dtypes are cast
        to the widest of them. Gradients go to `query`, `support` and masks of floating dtype.

    Note:
        In float16 and bfloat16 gradients are computed from the rounded cosines.

    Raises:
        TypeError: an argument is no tensor, or a dtype or the type of an option is not supported.
        ValueError: shapes or devices do not agree, `resize` is neither of the two, `eps` is negative or not finite, or
            on the CPU `valid_sizes` are out of range (under torch.compile a RuntimeError of the same text).

    Example:
        >>> import torch
        >>> query = torch.tensor([[3.0, 0.0], [4.0, 1.0]]).reshape(1, 2, 1, 2)
        >>> mask = torch.tensor([[True, False]]).reshape(1, 1, 1, 1, 2)
        >>> masked_similarity(query, query[:, None], mask).squeeze()
        tensor([1.0000, 0.8000])
    """
    if not isinstance(support, Tensor) or not isinstance(mask, Tensor):
        support, mask, valid_sizes = _stack(query, support, mask, valid_sizes)
    options = resize, valid_sizes, eps, torch_compat
    try:
        if type(eps) is not float:
            check_eps("masked_similarity", eps)
            eps = float(eps)
        if (
            type(resize) is not str
            or (resize != "features" and resize != "mask")
            or not 0.0 <= eps < math.inf
            or type(torch_compat) is not bool
            or (torch_compat and eps < LEAST_DIVISOR)
        ):
            _check(query, support, mask, *options)
        is_compiling = torch.compiler.is_compiling()
        # Each of these questions takes a tenth of a microsecond; torch.compile cannot trace the second.
        if is_compiling or torch._C._is_any_autocast_enabled():
            query, support, mask = _promote_maps((query, support, mask))
        if is_compiling:
            _check(query, support, mask, *options)
        result: Tensor = _call(query, support, mask, valid_sizes, resize == "mask", eps, torch_compat)
        return result
    except (RuntimeError, TypeError, AttributeError):
        _check(query, support, mask, *options)  # says what is wrong with the arguments, if that is the reason
        raise


def _stack(query: Tensor, support: Any, mask: Any, valid_sizes: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Lists as padded tensors with their valid sizes."""
    lists = {}
    for name, value in (("support", support), ("mask", mask)):
        if isinstance(value, Tensor) or not isinstance(value, Sequence):
            raise TypeError(
                f"masked_similarity: support and mask must be both tensors or both lists, got {name} {describe(value)}"
            )
        if not value:
            raise ValueError(f"masked_similarity: {name} must have at least one shot, got none")
        for index, x in enumerate(value):
            check_tensor("masked_similarity", f"{name}[{index}]", x, FLOATING if name == "support" else MASKS)
            if x.dim() != 4:
                layout = "[B, C, h, w]" if name == "support" else "[B, 1, H, W]"
                raise ValueError(f"masked_similarity: {name}[{index}] must be {layout}, got {describe(x)}")
            check_like("masked_similarity", f"{name}[{index}]", x, f"{name}[0]", value[0])
            if x.shape[:2] != value[0].shape[:2]:
                raise ValueError(
                    f"masked_similarity: {name}[{index}] must differ from {name}[0] in its size only, got "
                    f"{describe(x)} and {describe(value[0])}"
                )
        lists[name] = list(value)
    if valid_sizes is not None:
        raise ValueError(
            f"masked_similarity: valid_sizes must be None for lists, whose sizes are their own, got "
            f"{describe(valid_sizes)}"
        )
    supports, masks = lists["support"], lists["mask"]
    if len(supports) != len(masks):
        raise ValueError(
            f"masked_similarity: mask must have as many shots as support, got {len(masks)} and {len(supports)}"
        )
    sizes = [[*x.shape[2:], *y.shape[2:]] for x, y in zip(supports, masks, strict=True)]
    if any(size != sizes[0] for size in sizes):
        valid_sizes = torch.tensor(sizes, device=supports[0].device).expand(supports[0].size(0), -1, -1)
    return _pad(supports), _pad(masks), valid_sizes


def _pad(maps: list[Tensor]) -> Tensor:
    height, width = (max(x.shape[axis] for x in maps) for axis in (2, 3))
    padded = [F.pad(x, (0, width - x.size(3), 0, height - x.size(2))) for x in maps]
    with torch.autocast("cuda" if maps[0].is_cuda else "cpu", enabled=False):  # which refuses the other 16-bit dtype
        return torch.stack(padded, dim=1)


def _check(
    query: Tensor,
    support: Tensor,
    mask: Tensor,
    resize: str,
    valid_sizes: Tensor | None,
    eps: float,
    torch_compat: bool,
) -> None:
    if not isinstance(resize, str) or resize not in ("features", "mask"):
        raise ValueError(f"masked_similarity: resize must be 'features' or 'mask', got {resize!r}")
    if not isinstance(torch_compat, bool):
        raise TypeError(f"masked_similarity: torch_compat must be a bool, got {describe(torch_compat)}")
    _check_shapes(query, support, mask, valid_sizes)
    check_eps("masked_similarity", eps, divides=sums_dtype(query) if torch_compat else None)
    if valid_sizes is not None and valid_sizes.device.type == "cpu" and not torch.compiler.is_compiling():
        most = valid_sizes.new_tensor([*support.shape[3:], *mask.shape[3:]])
        if bool(((valid_sizes < 0) | (valid_sizes > most)).any()):
            raise ValueError(
                f"masked_similarity: valid_sizes must be in [0, {list(support.shape[3:])}] for the support and "
                f"[0, {list(mask.shape[3:])}] for the mask, got {valid_sizes.tolist()}"
            )


def _check_shapes(query: Tensor, support: Tensor, mask: Tensor, valid_sizes: Tensor | None) -> None:
    check_tensor("masked_similarity", "query", query)
    check_tensor("masked_similarity", "support", support)
    check_tensor("masked_similarity", "mask", mask, MASKS)
    if query.dim() != 4:
        raise ValueError(f"masked_similarity: query must be [B, C, h, w], got {describe(query)}")
    if query.size(1) == 0:
        raise ValueError(f"masked_similarity: query must have at least one channel, got {describe(query)}")
    check_like("masked_similarity", "support", support, "query", query)
    batch, channels = query.shape[:2]
    if support.dim() != 5 or support.size(0) != batch or support.size(2) != channels or support.size(1) == 0:
        raise ValueError(
            f"masked_similarity: support must be [{batch}, K, {channels}, h', w'] with K > 0 to match query "
            f"{list(query.shape)}, got {describe(support)}"
        )
    check_like("masked_similarity", "mask", mask, "query", query, dtype=False)
    shots = support.size(1)
    if mask.dim() != 5 or mask.size(0) != batch or mask.size(1) != shots or mask.size(2) != 1:
        raise ValueError(
            f"masked_similarity: mask must be [{batch}, {shots}, 1, H, W] to match support {list(support.shape)}, got "
            f"{describe(mask)}"
        )
    if valid_sizes is not None:
        check_tensor("masked_similarity", "valid_sizes", valid_sizes, (torch.int64,))
        check_like("masked_similarity", "valid_sizes", valid_sizes, "query", query, dtype=False)
        if valid_sizes.dim() != 3 or tuple(valid_sizes.shape) != (batch, shots, 4):
            raise ValueError(
                f"masked_similarity: valid_sizes must be [{batch}, {shots}, 4] to match support "
                f"{list(support.shape)}, got {describe(valid_sizes)}"
            )


# ------------------------------------------------------------------------------------------------ registration


def _promote_maps(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Autocast: the mask need not have the dtype of the others."""
    return (*promote(tensors[:2]), tensors[2])


def _fake_forward(
    query: Tensor,
    support: Tensor,
    mask: Tensor,
    valid_sizes: Tensor | None,
    resize_mask: bool,
    eps: float,
    torch_compat: bool,
) -> Any:
    _check_shapes(query, support, mask, valid_sizes)
    batch, channels, height, width = query.shape
    shots = support.size(1)
    sums = sums_dtype(query)
    return (
        query.new_empty(batch, 1, height, width),
        query.new_empty(batch, shots, support.size(3) * support.size(4), dtype=sums),
        query.new_empty(batch, shots, dtype=sums),
        query.new_empty(batch, channels, dtype=sums),
        query.new_empty(batch, height, width, dtype=sums),
    )


def _fake_backward(
    grad_similarity: Tensor,
    query: Tensor,
    support: Tensor,
    mask: Tensor,
    similarity: Tensor,
    weights: Tensor,
    totals: Tensor,
    prototype: Tensor,
    query_norms: Tensor,
    valid_sizes: Tensor | None,
    resize_mask: bool,
    eps: float,
    torch_compat: bool,
    wanted: int,
) -> Any:
    return (
        empty_map(query.shape, query, is_channels_last(query)) if wanted & 1 else query.new_empty(0),
        empty_map(support.shape, support, is_channels_last(support, 2), 2) if wanted & 2 else support.new_empty(0),
        mask.new_empty(mask.shape) if wanted & 4 else mask.new_empty(0),
    )


def _definition(
    query: Tensor,
    support: Tensor,
    mask: Tensor,
    valid_sizes: Tensor | None,
    resize_mask: bool,
    eps: float,
    torch_compat: bool,
) -> Tensor:
    resize = "mask" if resize_mask else "features"
    return reference.masked_similarity(
        query, support, mask, resize=resize, valid_sizes=valid_sizes, eps=eps, torch_compat=torch_compat
    )


def _fold(tensors: int, call: Callable[..., Any], info: Any, in_dims: Any, *arguments: Any) -> Any:
    """vmap: everything begins with the batch, valid_sizes, the first option, too."""
    with_sizes = tensors if arguments[tensors] is None else tensors + 1
    folded = fold_into_batch(info.batch_size, arguments[:with_sizes], in_dims[:with_sizes])
    return unfold_from_batch(info.batch_size, call(*folded, *arguments[with_sizes:]))


_call = Registered(
    "masked_similarity",
    tensors=3,
    differentiable=(0, 1, 2),
    definition=_definition,
    fake=_fake_forward,
    fake_backward=_fake_backward,
    outputs=5,
    autocast=_promote_maps,
    vmap=partial(_fold, 3),
    vmap_backward=partial(_fold, 9),
    optional_gradients=True,
    tensor_options=(0,),
).call
