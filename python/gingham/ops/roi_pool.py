"""RoI max pooling (Girshick, Fast R-CNN, https://arxiv.org/abs/1504.08083), as a torch function."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gingham.ops._register import (
    Registered,
    as_float,
    autocast_dtype,
    check_tensor,
    describe,
    empty_map,
    fold_into_batch,
    is_channels_last,
    unfold_from_batch,
)


def roi_pool(
    features: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
) -> Tensor:
    """The largest pixel in each bin of a grid over each box; zero in bins that lie outside of the map.

    Source: Girshick, Fast R-CNN, ICCV 2015, section 2.1, https://arxiv.org/abs/1504.08083. The same numbers as those of
    ``torchvision.ops.roi_pool``, bit for bit, gradients included, in float32 and float64, where torchvision's integers
    of 32 bits hold the rounded coordinates and the height and width of each box: beyond, those wrap around.

    A box covers the pixels from ``round(x1 * spatial_scale)`` to ``round(x2 * spatial_scale)``, both included, rounded
    half away from zero, and at least one; of rounded numbers that 32 bits do not hold, the nearest that they do. Bins
    that do not divide it overlap. The grid is that of the whole box where the map covers a part of it.

    Args:
        features: [B, C, H, W]; float32, float64, float16 or bfloat16, on CPU or CUDA, with any strides (maps whose
            columns or channels are adjacent in memory are read in place). H * W is less than 2^31.
        boxes: [N, 5], rows (image, x1, y1, x2, y2) with an image in [0, B), or a list of B tensors [n, 4], one an
            image; float64 beside float64 features, otherwise float32. Any finite coordinates; they have no gradient.
        output_size: bins (down, across), or one number for both; positive, with a product less than 2^31.
        spatial_scale: pixels of the map per unit of the boxes, any finite number.

    Returns:
        [N, C, *output_size] in the dtype and memory format of `features`. Pixels that are not greater than
        -3.4028235e38, NaN among them, never win; a bin that has no others is -3.4028235e38 (-inf in float16 and
        bfloat16) and has no gradient. That of other bins goes to their first maximum in raster order. Under autocast
        `features` keep their dtype, as a maximum is exact, and boxes are cast to float32.

    Note:
        On CUDA no box is looked at before the kernel runs: one that names no image or has a coordinate that is not
        finite gives NaN, and no gradient, where the CPU raises.

        Where `features` require grad, the places of the maxima are kept for backward if they take no more memory than
        `features` (a quarter of that for channels-last maps on the CPU), as with a few hundred boxes of 7x7 bins on a
        large map: backward gains more than forward loses. Otherwise backward finds them anew, and nothing is kept but
        the inputs. It adds in a fixed order, without atomics, on CUDA too.

    Raises:
        TypeError: an argument is no tensor or of a dtype that is not supported.
        ValueError: shapes or devices do not agree; a box names no image or is not finite (on the CPU); `output_size` is
            not positive; `spatial_scale` is not finite.

    Example:
        >>> import torch
        >>> ramp = torch.arange(1.0, 65.0).reshape(1, 1, 8, 8)
        >>> roi_pool(ramp, torch.tensor([[0.0, 0.0, 0.0, 3.0, 3.0]]), 2).squeeze()
        tensor([[10., 12.],
                [26., 28.]])
    """
    return pool(features, boxes, output_size, spatial_scale, may_keep_places=True)


def pool(
    features: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float,
    *,
    may_keep_places: bool,
) -> Tensor:
    """`roi_pool`, which keeps places for backward only where it may."""
    joined: Any = boxes
    try:
        if not isinstance(boxes, Tensor):
            joined = join_boxes(features, boxes)
        rows, columns = (output_size, output_size) if type(output_size) is int else _as_pair(output_size)
        if type(spatial_scale) is not float:
            spatial_scale = as_float("roi_pool", "spatial_scale", spatial_scale)
        is_compiling = torch.compiler.is_compiling()
        # Each of these questions takes a tenth of a microsecond; torch.compile cannot trace the second.
        if is_compiling or torch._C._is_any_autocast_enabled():
            features, joined = _autocast((features, joined))
        if is_compiling:
            _check(features, joined, rows, columns, spatial_scale)
        keep = may_keep_places and features.requires_grad and _places_pay(features, joined, rows * columns)
        result: Tensor = (_call_with_places if keep else _call)(features, joined, rows, columns, spatial_scale)
        return result
    except (RuntimeError, TypeError, AttributeError, OverflowError) as error:
        if isinstance(joined, Tensor):
            _check(features, joined, *_as_pair(output_size), as_float("roi_pool", "spatial_scale", spatial_scale))
        message = str(error)
        if isinstance(error, RuntimeError) and "must name an image" in message:
            raise ValueError(message[message.index("roi_pool: ") :].splitlines()[0]) from None
        raise


def join_boxes(features: Tensor, boxes: Sequence[Tensor]) -> Tensor:
    """[N, 5] boxes with the image in front, from a list of [n, 4] boxes, one tensor an image."""
    check_tensor("roi_pool", "features", features)
    if not isinstance(boxes, (list, tuple)):
        raise TypeError(f"roi_pool: boxes must be a tensor or a list of tensors, got {describe(boxes)}")
    if features.dim() != 4 or len(boxes) != features.size(0):
        raise ValueError(
            f"roi_pool: boxes must be a list of B tensors for features [B, C, H, W], got {len(boxes)} tensors "
            f"and features {list(features.shape)}"
        )
    for i, x in enumerate(boxes):
        check_tensor("roi_pool", f"boxes[{i}]", x)
        if x.dim() != 2 or x.size(1) != 4:
            raise ValueError(f"roi_pool: boxes[{i}] must be [n, 4], got {list(x.shape)}")
        if x.device != features.device:
            raise ValueError(f"roi_pool: boxes[{i}] must be on the device of features, got {describe(x)}")
    boxes = [_autocast((features, x))[1] for x in boxes]
    if not boxes:
        return features.new_empty(0, 5, dtype=_dtype_of_boxes(features))
    images = [x.new_full((x.size(0), 1), i) for i, x in enumerate(boxes)]
    return torch.cat([torch.cat(images), torch.cat(boxes)], dim=1)


def _dtype_of_boxes(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _autocast(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    features, boxes = tensors
    if autocast_dtype(features) is None or not boxes.is_floating_point():
        return tensors
    return features, boxes.to(_dtype_of_boxes(features))


def _places_pay(features: Tensor, boxes: Tensor, outputs: int) -> bool:
    """Whether to keep them: false also for arguments that the operator will refuse."""
    if not torch.is_grad_enabled() or features.dim() != 4 or boxes.dim() != 2:
        return False
    batch, _, height, width = features.shape
    # Channels-last maps on the CPU have gradients scattered to each channel by its own places, which takes long.
    cost = 1 if features.is_cuda or not is_channels_last(features) else 4
    take_little = cost * boxes.size(0) * outputs * 4 <= batch * height * width * features.element_size()
    if not torch.compiler.is_compiling():
        return bool(take_little)
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # slow to import

    # What is exported is seldom trained. Of sizes that depend on data nothing is known.
    return not torch.compiler.is_exporting() and bool(guard_or_false(take_little))


def _as_pair(size: Any) -> tuple[int, int]:
    pair = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, (numbers.Integral, torch.SymInt)) for n in pair):
        raise TypeError(f"roi_pool: output_size must be a whole number or two, got {size!r}")
    rows, columns = (n if isinstance(n, torch.SymInt) else int(n) for n in pair)
    return rows, columns  # type: ignore[return-value]  # torch takes a SymInt for an int


def _check(features: Tensor, boxes: Tensor, rows: int, columns: int, spatial_scale: float) -> None:
    check_tensor("roi_pool", "features", features)
    check_tensor("roi_pool", "boxes", boxes)
    if features.dim() != 4:
        raise ValueError(f"roi_pool: features must be [B, C, H, W], got {describe(features)}")
    if boxes.dim() != 2 or boxes.size(1) != 5:
        raise ValueError(f"roi_pool: boxes must be [N, 5] or a list of [n, 4], got {describe(boxes)}")
    if boxes.dtype != _dtype_of_boxes(features):
        expected = str(_dtype_of_boxes(features)).removeprefix("torch.")
        raise TypeError(
            f"roi_pool: boxes must be {expected} beside {str(features.dtype).removeprefix('torch.')} features, "
            f"got {describe(boxes)}"
        )
    if boxes.device != features.device:
        raise ValueError(
            f"roi_pool: boxes must be on the device of features, got {describe(boxes)} "
            f"and features {describe(features)}"
        )
    if rows < 1 or columns < 1:
        raise ValueError(f"roi_pool: output_size must be positive, got {(rows, columns)}")
    if rows * columns >= 2**31:
        raise ValueError(f"roi_pool: output_size must have fewer than 2^31 bins, got {(rows, columns)}")
    if not -math.inf < spatial_scale < math.inf:
        raise ValueError(f"roi_pool: spatial_scale must be finite, got {spatial_scale}")
    if features.size(2) * features.size(3) >= 2**31:
        raise ValueError(f"roi_pool: features must have fewer than 2^31 pixels, got {describe(features)}")


# ------------------------------------------------------------------------------------------------ registration


def _fake_forward(features: Tensor, boxes: Tensor, rows: int, columns: int, spatial_scale: float) -> Tensor:
    _check(features, boxes, rows, columns, spatial_scale)
    return empty_map((boxes.size(0), features.size(1), rows, columns), features, is_channels_last(features))


def _fake_forward_with_places(*arguments: Any) -> tuple[Tensor, Tensor]:
    output, features = _fake_forward(*arguments), arguments[0]
    return output, empty_map(output.shape, features, is_channels_last(features), dtype=torch.int32)


def _fake_backward(grad_output: Tensor, features: Tensor, *arguments: Any) -> Tensor:
    return empty_map(features.shape, features, is_channels_last(features))


def _definition(features: Tensor, boxes: Tensor, *options: Any) -> Tensor:
    """Pixels by the places of the maxima: has the gradients of the reference, whose steps depend on the boxes."""
    places = _forward_with_places(features.detach(), boxes, *options)[1].flatten(2).long()  # [N, C, outputs]
    if features.numel() == 0:
        return (features.sum() * places).unflatten(2, options[:2])
    image = boxes[:, 0].nan_to_num().clamp(0, features.size(0) - 1).long()  # on CUDA a box may name any
    channel = torch.arange(features.size(1), device=features.device)
    pixels = features.flatten(2)[image[:, None, None], channel[:, None], places.clamp(min=0)]
    return torch.where(places >= 0, pixels, 0.0).unflatten(2, options[:2])


def _fold_boxes(size: int, boxes: Tensor, axis: int | None, images: int) -> Tensor:
    """Boxes of all samples, [S * N, 5], for features whose batch is that of all samples, [S * B, ...]."""
    boxes = boxes.expand(size, *boxes.shape) if axis is None else boxes.movedim(axis, 0)  # [S, N, 5]
    image = boxes[..., :1]
    first = torch.arange(size, dtype=boxes.dtype, device=boxes.device)[:, None, None] * images
    # An image that the sample has not must not become another sample's.
    exists = (image >= 0) & (image < images) & (image == image.floor())
    return torch.cat([torch.where(exists, image + first, -1), boxes[..., 1:]], dim=-1).flatten(0, 1)


def _vmap(call: Any, info: Any, in_dims: Any, features: Tensor, boxes: Tensor, *options: Any) -> Any:
    size, (features_axis, boxes_axis, *_) = info.batch_size, in_dims
    if features_axis is None:  # one map for all samples
        assert boxes_axis is not None
        results = call(features, boxes.movedim(boxes_axis, 0).flatten(0, 1), *options)
    else:
        (folded,) = fold_into_batch(size, (features,), (features_axis,))
        results = call(folded, _fold_boxes(size, boxes, boxes_axis, folded.size(0) // size), *options)
    if isinstance(results, Tensor):
        return results.unflatten(0, (size, results.size(0) // size)), 0
    return unfold_from_batch(size, results)


def _vmap_backward(
    call: Any, info: Any, in_dims: Any, grad_output: Tensor, features: Tensor, boxes: Tensor, *arguments: Any
) -> Any:
    """`arguments`: the places, if kept, and the options."""
    size, places = info.batch_size, [x for x in arguments if isinstance(x, Tensor)]
    maps = (grad_output, features, *places)
    grad_output, features, *places = fold_into_batch(size, maps, (*in_dims[:2], *in_dims[3 : 3 + len(places)]))
    images = features.size(0) // size
    boxes = _fold_boxes(size, boxes, in_dims[2], images)
    result = call(grad_output, features, boxes, *places, *arguments[len(places) :])
    return result.unflatten(0, (size, images)), 0


_register = partial(
    Registered,
    tensors=2,
    differentiable=(0,),
    definition=_definition,
    fake_backward=_fake_backward,
    autocast=_autocast,
    vmap=_vmap,
    vmap_backward=_vmap_backward,
)
_call = _register("roi_pool", fake=_fake_forward, outputs=1, kept=()).call
_call_with_places = _register("roi_pool_with_places", fake=_fake_forward_with_places, outputs=2, kept=(1,)).call
_forward_with_places = torch.ops.gingham._roi_pool_with_places.default
