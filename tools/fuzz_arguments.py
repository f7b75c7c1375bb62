"""Arguments of every operator for fuzz_operators.py: well-formed ones, what comes out of them, how to spoil them."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
Arguments = dict[str, Any]
Expected = list[tuple[tuple[int, ...], torch.dtype]]


def size_of(value: Any) -> float:
    """Bytes of an argument or result when nothing of it is shared."""
    if isinstance(value, (Tensor, np.ndarray)):
        if isinstance(value, Tensor) and (value.is_nested or value.layout != torch.strided):
            return 0
        item = value.element_size() if isinstance(value, Tensor) else value.itemsize
        return float(math.prod(value.shape)) * item
    return sum(size_of(x) for x in value) if isinstance(value, (list, tuple)) else 0


# ------------------------------------------------------------------------------------------------ well-formed arguments


class Draw(random.Random):
    """Random choices, and tensors that repeat with them."""

    def extent(self, most: int = 9) -> int:
        return self.choice([1, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33, 64][: most + 3])

    def dtype(self) -> torch.dtype:
        return self.choice(FLOATING)

    def likely(self, probability: float) -> bool:
        return self.random() < probability

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(self.getrandbits(32))
        return self.laid_out(torch.randn(tuple(shape), generator=generator).to(dtype))

    def mask(self, shape: Sequence[int]) -> Tensor:
        x = self.tensor(shape, torch.float32)
        return self.choice([x > 0, (x > 0).to(torch.uint8), x.abs().to(self.dtype()), (x > 0).to(self.dtype())])

    def laid_out(self, x: Tensor) -> Tensor:
        """The same numbers, elsewhere in memory."""
        order = list(range(x.dim()))
        self.shuffle(order)
        inverse = sorted(range(x.dim()), key=order.__getitem__)
        match self.choice(
            ["as it is", "as it is", "channels last", "permuted", "sliced", "stepped", "expanded", "far"]
        ):
            case "channels last" if x.dim() > 2:
                return x.movedim(-3, -1).contiguous().movedim(-1, -3)
            case "permuted":
                return x.permute(order).contiguous().permute(inverse)
            case "sliced":
                room = x.new_zeros([extent + 3 for extent in x.shape])
                return room[tuple(slice(1, 1 + extent) for extent in x.shape)].copy_(x)
            case "stepped" if x.dim() > 0:
                axis = self.randrange(x.dim())
                room = x.repeat_interleave(2, dim=axis)
                return room[(slice(None),) * axis + (slice(None, None, 2),)]
            case "expanded" if x.dim() > 0 and x.numel() > 0:
                axis = self.randrange(x.dim())
                return x.narrow(axis, 0, 1).expand_as(x)
            case "far":  # steps that are never taken
                strides = [2**40 + 1 if extent <= 1 else s for extent, s in zip(x.shape, x.stride(), strict=True)]
                return x.as_strided(x.shape, strides)
        return x


def _criss_cross(draw: Draw) -> Arguments:
    batch, size, dtype = draw.randrange(4), [draw.extent() for _ in range(draw.choice([2, 2, 3]))], draw.dtype()
    keys = batch, draw.extent(), *size
    value = draw.tensor((batch, draw.randrange(20), *size), dtype)
    arguments = {"query": draw.tensor(keys, dtype), "key": draw.tensor(keys, dtype), "value": value}
    return arguments | ({"scale": draw.choice([1.0, 0.25, -2.0, 0.0, 3])} if draw.likely(0.5) else {})


def _norm_options(draw: Draw) -> Arguments:
    options = {"eps": draw.choice([1e-8, 1e-3, 1, 0.0]), "torch_compat": draw.likely(0.5)}
    return {name: value for name, value in options.items() if draw.likely(0.5)}


def _cosine(draw: Draw) -> Arguments:
    batch, channels, dtype = draw.randrange(4), draw.extent(11), draw.dtype()
    features = draw.tensor((batch, channels, draw.extent(), draw.extent()), dtype)
    prototypes = draw.tensor((batch, draw.choice([0, 1, 1, 2, 5, 8, 9, 21]), channels), dtype)
    return {"features": features, "prototypes": prototypes} | _norm_options(draw)


def _resize(draw: Draw) -> Arguments:
    return {"resize": draw.choice(["features", "mask"])} if draw.likely(0.5) else {}


def _masked_pool(draw: Draw) -> Arguments:
    batch = draw.randrange(4)
    features = draw.tensor((batch, draw.extent(), draw.extent(), draw.extent()), draw.dtype())
    return {"features": features, "mask": draw.mask((batch, 1, draw.extent(), draw.extent()))} | _resize(draw)


def _masked_similarity(draw: Draw) -> Arguments:
    batch, channels, shots, dtype = 1 + draw.randrange(3), draw.extent(), 1 + draw.randrange(3), draw.dtype()
    query = draw.tensor((batch, channels, draw.extent(), draw.extent()), dtype)
    options = _norm_options(draw) | _resize(draw)
    if draw.likely(0.3):  # a list of shots of their own sizes; not on arrays
        sizes = [tuple(draw.extent() for _ in range(4)) for _ in range(shots)]
        supports = [draw.tensor((batch, channels, *size[:2]), dtype) for size in sizes]
        masks = [(draw.tensor((batch, 1, *size[2:]), torch.float32) > 0).to(dtype) for size in sizes]
        return {"query": query, "support": supports, "mask": masks} | options
    size = [draw.extent() for _ in range(4)]
    if draw.likely(0.3):
        valid = [[[draw.randint(1, extent) for extent in size] for _ in range(shots)] for _ in range(batch)]
        options["valid_sizes"] = torch.tensor(valid)
    support = draw.tensor((batch, shots, channels, *size[:2]), dtype)
    return {"query": query, "support": support, "mask": draw.mask((batch, shots, 1, *size[2:]))} | options


def _roi_pool(draw: Draw) -> Arguments:
    batch, dtype = 1 + draw.randrange(3), draw.dtype()
    size = draw.extent(), draw.extent()
    features = draw.tensor((batch, draw.randrange(20), *size), dtype)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    count = draw.randrange(6)
    corners = draw.tensor((count, 4), kind) * draw.choice([1.0, 20.0, 1e6])
    images = torch.tensor([[draw.randrange(batch)] for _ in range(count)], dtype=kind).reshape(count, 1)
    boxes = torch.cat([images, corners], dim=1)
    rows, columns = draw.randint(1, 7), draw.randint(1, 7)
    arguments = {"features": features, "boxes": draw.laid_out(boxes), "output_size": (rows, columns)}
    if draw.likely(0.2):
        arguments["boxes"] = [draw.laid_out(corners[images[:, 0] == i]) for i in range(batch)]  # not on arrays
    if draw.likely(0.3):
        arguments["output_size"] = rows
    return arguments | ({"spatial_scale": draw.choice([1.0, 0.0625, 1, -0.5])} if draw.likely(0.5) else {})


def _part_options(draw: Draw, height: int) -> Arguments:
    options = {"parts": draw.randint(1, height), "energy": draw.choice(["sq", "l2", "agrl"]), "eps": 1e-6}
    return options | ({} if height >= 4 and draw.likely(0.3) else {"parts": draw.randint(1, height)})


def _attention_of_clips(draw: Draw) -> Arguments:
    shape = draw.randrange(4), draw.extent(), draw.extent(), draw.extent(), draw.extent()
    arguments = {"features": draw.tensor(shape, draw.dtype())} | _part_options(draw, shape[3])
    return arguments | ({"return_map": True} if draw.likely(0.5) else {})


def _sums_of_frames(draw: Draw) -> Arguments:
    shape = draw.randrange(4), draw.extent(), draw.extent(), draw.extent()
    return {"features": draw.tensor(shape, draw.dtype())} | _part_options(draw, shape[2])


def _attention_from_sums(draw: Draw) -> Arguments:
    shape, dtype = (draw.randrange(4), draw.extent(), draw.extent(), draw.extent()), draw.choice(FLOATING[:2])
    energies = draw.laid_out(draw.tensor(shape[:3], dtype).abs())
    return {"sums": draw.tensor(shape, dtype), "energies": energies, "positions": draw.randint(1, 100)}


def _rerank(draw: Draw) -> Arguments:
    dtype, features = draw.dtype(), draw.extent()
    arguments = {
        "query_features": draw.tensor((draw.extent(), features), dtype),
        "gallery_features": draw.tensor((draw.extent(11), features), dtype),
    }
    options = {"k1": draw.randint(1, 30), "k2": draw.randint(1, 9), "lambda_value": draw.choice([0.3, 0.0, 1.0])}
    return arguments | {name: value for name, value in options.items() if draw.likely(0.5)}


# ------------------------------------------------------------------------------------------------ what is to come out


def _sums(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _results_of_clips(features: Tensor, parts: int = 4, return_map: bool = False, **_: Any) -> Expected:
    batch, frames, channels, *size = features.shape
    sums = _sums(features.dtype)
    results: Expected = [((batch, 2 * channels), features.dtype), ((batch, frames, parts), sums)]
    results.append(((batch, parts), torch.int64))
    return [*results, ((batch, frames, *size), sums)] if return_map else results


def _results_of_frames(features: Tensor, parts: int = 4, **_: Any) -> Expected:
    frames, channels = features.shape[:2]
    return [((frames, parts, channels), _sums(features.dtype)), ((frames, parts), _sums(features.dtype))]


def _results_from_sums(sums: Tensor, **_: Any) -> Expected:
    batch, frames, parts, channels = sums.shape
    return [
        ((batch, 2 * channels), sums.dtype),
        ((batch, frames, parts), sums.dtype),
        ((batch, parts), torch.int64),
    ]


def _results_of_pooling(features: Tensor, boxes: Any, output_size: Any, **_: Any) -> Expected:
    count = sum(len(x) for x in boxes) if isinstance(boxes, (list, tuple)) else boxes.shape[0]
    bins = tuple(output_size) if isinstance(output_size, (list, tuple)) else (int(output_size),) * 2
    return [((count, features.shape[1], *bins), features.dtype)]


@dataclass(frozen=True)
class Target:
    """An operator: how to draw its arguments and what must come out, the same for tensors and arrays.

    Attributes:
        draw: well-formed arguments, with tensors.
        results: shapes and dtypes of the results, from the arguments.
        raw: the arguments of the raw operator, by the names in its schema.
        gradients: which outputs of the raw operator backward takes gradients of; None when it has no backward. Of the
            other outputs it takes the last ones.
    """

    draw: Callable[[Draw], Arguments]
    results: Callable[..., Expected]
    raw: Callable[[Arguments], Arguments]
    gradients: tuple[int, ...] | None = (0,)


def _raw_norms(arguments: Arguments) -> Arguments:
    return {"eps": float(arguments.get("eps", 1e-8)), "torch_compat": arguments.get("torch_compat", False)}


def _raw_similarity(arguments: Arguments) -> Arguments:
    support, mask = arguments["support"], arguments["mask"]
    if isinstance(support, list):
        support, mask = support[0][:, None], mask[0][:, None]
    maps = {"query": arguments["query"], "support": support, "mask": mask}
    maps["valid_sizes"] = arguments.get("valid_sizes")
    return maps | {"resize_mask": arguments.get("resize") == "mask"} | _raw_norms(arguments)


def _raw_pooling(arguments: Arguments) -> Arguments:
    boxes, size = arguments["boxes"], arguments["output_size"]
    if isinstance(boxes, list):
        boxes = torch.cat([torch.cat([x.new_full((len(x), 1), i), x], dim=1) for i, x in enumerate(boxes)])
    rows, columns = (size, size) if isinstance(size, int) else size
    scale = float(arguments.get("spatial_scale", 1.0))
    return {"features": arguments["features"], "boxes": boxes, "rows": rows, "columns": columns, "spatial_scale": scale}


def _raw_parts(arguments: Arguments) -> Arguments:
    energy = ["sq", "l2", "agrl"].index(arguments.get("energy", "sq"))
    parts = {"features": arguments["features"], "parts": arguments.get("parts", 4), "energy": energy}
    return parts | {"eps": arguments.get("eps", 1e-12), "detach_attention": arguments.get("detach_attention", False)}


TARGETS = {
    "cosine_similarity_map": Target(
        _cosine,
        lambda features, prototypes, **_: [
            ((features.shape[0], prototypes.shape[1], *features.shape[2:]), features.dtype)
        ],
        lambda a: {"features": a["features"], "prototypes": a["prototypes"]} | _raw_norms(a),
    ),
    "criss_cross_attention": Target(
        _criss_cross,
        lambda value, **_: [(tuple(value.shape), value.dtype)],
        lambda a: a | {"scale": float(a.get("scale", 1.0))},
    ),
    "k_reciprocal_rerank": Target(
        _rerank,
        lambda query_features, gallery_features, **_: [
            ((query_features.shape[0], gallery_features.shape[0]), _sums(query_features.dtype))
        ],
        lambda a: a,
        gradients=None,
    ),
    "masked_average_pool": Target(
        _masked_pool,
        lambda features, **_: [(tuple(features.shape[:2]), features.dtype)],
        lambda a: {"features": a["features"], "mask": a["mask"], "resize_mask": a.get("resize") == "mask"},
    ),
    "masked_similarity": Target(
        _masked_similarity,
        lambda query, **_: [((query.shape[0], 1, *query.shape[2:]), query.dtype)],
        _raw_similarity,
    ),
    "roi_pool": Target(_roi_pool, _results_of_pooling, _raw_pooling),
    "spatial_temporal_attention": Target(_attention_of_clips, _results_of_clips, _raw_parts, gradients=(0, 1, 3)),
    "spatial_temporal_sums": Target(_sums_of_frames, _results_of_frames, _raw_parts, gradients=(0, 1)),
    "spatial_temporal_attention_from_sums": Target(
        _attention_from_sums, _results_from_sums, lambda a: a | {"eps": a.get("eps", 1e-12)}, gradients=(0, 1)
    ),
}


# ------------------------------------------------------------------------------------------------ malformed arguments

NUMBERS: list[Any] = [
    *(0, 1, 2, -1, 7, 2**31, 2**62, 2**63, -(2**63) - 1, 10**400),
    *(0.0, -0.0, 0.5, -1.0, 1e308, 5e-324, math.nan, math.inf, -math.inf),
    *(True, np.float32(0.5), np.int64(3), np.float64("nan"), Fraction(1, 3), Fraction(10**400), Decimal(1), 1j),
]
NEITHER: list[Any] = [
    None,
    "sq",
    "",
    b"x",
    [],
    (),
    [1, 2],
    (3,),
    (2, 2),
    ("a", 1),
    [2**31, 1],
    {},
    object(),
    torch.float32,
]
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.int8,
]
DTYPES += [torch.bool, torch.complex64, torch.float8_e4m3fn]


def spoil_number(draw: Draw, value: Any) -> Any:
    if isinstance(value, (tuple, list)) and draw.likely(0.5):
        return draw.choice([value[:1], [*value, 1], [0, *value[1:]], [*value[:-1], None], list(value)])
    return draw.choice([*NUMBERS, *NUMBERS, *NEITHER, torch.tensor(2.0), torch.tensor([1, 2]), np.ones(2)])


def spoil_tensor(draw: Draw, x: Tensor) -> Any:
    axis = draw.randrange(x.dim()) if x.dim() else 0
    flat = x.detach().reshape(-1)
    kinds = ["extent", "extent", "axis", "dtype", "dtype", "content", "content", "huge", "meta", "other", "layout"]
    match draw.choice([*kinds, "overlap", "sparse", "nested", "negated", "grad", "empty", "swapped", "array"]):
        case "extent" if x.dim():
            extent = draw.choice([0, 1, x.shape[axis] + 1, x.shape[axis] - 1, 2 * x.shape[axis], 97])
            shape = [*x.shape[:axis], max(extent, 0), *x.shape[axis + 1 :]]
            return x.new_ones(shape) if math.prod(shape) < 2**22 else x
        case "axis":
            if x.dim() and draw.likely(0.5):
                return x.select(axis, 0) if x.shape[axis] else x.sum(dim=axis)
            return x.unsqueeze(axis)
        case "dtype":
            return x.to(draw.choice(DTYPES))
        case "content" if x.numel() and not x.is_meta:
            numbers = [math.nan, math.inf, -math.inf, 0.0, 1e30, -1e30, 1e-30, 1e300, 65504.0, 2.0**31, -1.0, 5e-324]
            spoilt = x.clone().contiguous()
            whole = draw.likely(0.3)
            number = draw.choice(numbers) if x.is_floating_point() else draw.choice([0, 1, 255, 127])
            (spoilt.view(-1) if whole else spoilt.view(-1)[draw.randrange(x.numel()) :][:1]).copy_(
                torch.tensor(number, dtype=torch.float64)
            )
            return spoilt
        case "huge" if x.dim():  # in extent, not in memory
            extent = draw.choice([2**24, 2**31, 2**33, 2**40, 2**62])
            shape = [*x.shape[:axis], extent, *x.shape[axis + 1 :]]
            with contextlib.suppress(RuntimeError):
                return flat[:1].reshape([1] * x.dim()).expand(shape)
            return x
        case "meta":
            return x.to("meta")
        case "other":
            numpy = np.ones(tuple(x.shape), np.float32) if x.numel() < 2**22 else np.ones(1)
            return draw.choice([*NEITHER, *NUMBERS[:8], numpy, [x], torch.tensor(1.0), torch.ones(0)])
        case "layout":
            return draw.laid_out(x)
        case "overlap" if x.numel() and not x.is_meta:
            return (
                flat.clone().as_strided(x.shape, [draw.choice([0, 1]) if e > 1 else 1 for e in x.shape])
                if (sum(e - 1 for e in x.shape) < flat.numel())
                else x
            )
        case "sparse" if x.layout == torch.strided and not x.is_meta:
            return x.to_sparse()
        case "nested" if x.dim() > 1 and x.shape[0] and not x.is_meta:
            return torch.nested.nested_tensor([x[0], x[0]])
        case "negated" if x.is_floating_point() and x.dtype in FLOATING[:2] and not x.is_meta:
            return torch.complex(torch.zeros_like(x), -x).conj().imag
        case "grad" if x.is_floating_point():
            return x.detach().clone().requires_grad_()
        case "empty" if x.dim():
            return x.narrow(axis, 0, 0)
        case "swapped" if x.dim() > 1:
            return x.transpose(axis, draw.randrange(x.dim()))
        case "array":
            return draw.choice([x.tolist() if x.numel() < 1000 else [], np.float32(1), range(3)])
    return x


def spoil_array(draw: Draw, x: np.ndarray) -> Any:
    axis = draw.randrange(x.ndim) if x.ndim else 0
    kinds = [
        "dtype",
        "flipped",
        "masked",
        "swapped bytes",
        "unaligned",
        "read-only",
        "huge",
        "step",
        "tensor",
        "overlap",
    ]
    match draw.choice([*kinds, *["as a tensor"] * 10]):
        case "dtype":
            dtypes: list[Any] = [np.float32, np.float64, np.float16, np.int64, np.complex64, bool, object, "S3"]
            return x.astype(draw.choice(dtypes))
        case "flipped" if x.ndim:
            return np.flip(x, axis)
        case "masked":
            return np.ma.masked_array(x, mask=np.zeros(x.shape, bool))
        case "swapped bytes":
            return x.astype(x.dtype.newbyteorder()) if x.dtype.name != "bfloat16" else x
        case "unaligned" if x.size:
            room = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
            room[...] = x
            return room
        case "read-only":
            copy = x.copy()
            copy.flags.writeable = False
            return copy
        case "huge" if x.ndim and x.size:
            shape = [*x.shape[:axis], draw.choice([2**24, 2**31, 2**40, 2**59]), *x.shape[axis + 1 :]]
            with contextlib.suppress(ValueError):
                return np.broadcast_to(x.ravel()[:1].reshape([1] * x.ndim), shape)
            return x
        case "step" if x.ndim and x.size:  # not in whole elements
            room = np.zeros((*x.shape[:axis], x.shape[axis], x.itemsize + 1), np.uint8)
            strides = [3 * x.itemsize + 1] * x.ndim
            span = sum((e - 1) * s for e, s in zip(x.shape, strides, strict=True)) + x.itemsize
            room = np.zeros(span, np.uint8)
            return np.lib.stride_tricks.as_strided(room[: x.itemsize].view(x.dtype), x.shape, strides)
        case "tensor":
            return torch.ones(tuple(x.shape))
        case "overlap" if x.size:
            return np.lib.stride_tricks.as_strided(np.ones(x.size, x.dtype), x.shape, [x.itemsize] * x.ndim)
        case "as a tensor" if x.dtype.name != "bfloat16":
            with contextlib.suppress(TypeError, ValueError):
                return as_array(spoil_tensor(draw, torch.from_numpy(np.ascontiguousarray(x))))
    return x


def as_array(value: Any) -> Any:
    """What is handed to gingham.array for a tensor."""
    if isinstance(value, list):
        return [as_array(x) for x in value]
    if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided or value.is_nested:
        return value
    x = value.detach().resolve_neg()
    if x.dtype == torch.bfloat16:
        import ml_dtypes

        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    try:
        return x.numpy()
    except TypeError:  # a dtype that NumPy has not got
        return value


def spoil(draw: Draw, value: Any, *, arrays: bool = False) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], (Tensor, np.ndarray)):
        i = draw.randrange(len(value))
        changed = [*value[:i], spoil(draw, value[i], arrays=arrays), *value[i + 1 :]]
        return draw.choice([changed, changed, value[:-1], [*value, value[0]], [], tuple(value), value[0]])
    if isinstance(value, (Tensor, np.ndarray)) and size_of(value) > 2**24:
        return value
    with contextlib.suppress(RuntimeError, TypeError, ValueError):  # of what cannot be done to a value already spoilt
        if isinstance(value, Tensor):
            return spoil_tensor(draw, value)
        if isinstance(value, np.ndarray):
            return spoil_array(draw, value)
        return spoil_number(draw, value)
    return value
