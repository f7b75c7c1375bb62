"""Every CUDA kernel once, on shapes small enough for compute-sanitizer, under which bench/gpu.sh runs this."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gingham import ops

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Call = tuple[Callable[..., object], tuple[Tensor, ...]]  # a function of tensors whose gradients are wanted


def maps(*shapes: tuple[int, ...], dtype: torch.dtype, last: bool) -> list[Tensor]:
    """Random maps [..., C, H, W] on the GPU, contiguous or with their channels adjacent."""
    made = []
    for shape in shapes:
        x = torch.randn(shape, device="cuda").to(dtype)
        if last:
            x = x.flatten(0, -4).contiguous(memory_format=torch.channels_last).reshape(shape)
        made.append(x)
    return made


def criss_cross_attention(dtype: torch.dtype, last: bool) -> Iterator[Call]:
    for size, tf32 in itertools.product(((5, 6), (1, 19), (18, 2, 3), (2, 131)), (False, True)):
        torch.backends.cuda.matmul.allow_tf32 = tf32  # and 131 is more than a warp holds
        query, key, value = (torch.randn(2, *size, c, device="cuda").to(dtype).movedim(-1, 1) for c in (5, 5, 24))
        if not last:
            query, key, value = (x.contiguous() for x in (query, key, value))
        yield lambda *x: ops.criss_cross_attention(*x, scale=0.5), (query, key, value)


def masked_average_pool(dtype: torch.dtype, last: bool) -> Iterator[Call]:
    for resize, size in itertools.product(("features", "mask"), ((11, 17), (3, 2))):
        (features,) = maps((2, 19, 4, 7), dtype=dtype, last=last)
        soft = torch.rand(2, 1, *size, device="cuda")
        yield lambda x, y, r=resize: ops.masked_average_pool(x, y, resize=r), (features, soft)
        for mask in (soft > 0.5, (255 * soft).to(torch.uint8)):
            yield lambda x, m=mask, r=resize: ops.masked_average_pool(x, m, resize=r), (features,)


def cosine_similarity_map(dtype: torch.dtype, last: bool) -> Iterator[Call]:
    for prototypes, compatible in itertools.product((1, 3, 21), (False, True)):
        (features,) = maps((2, 19, 4, 7), dtype=dtype, last=last)
        vectors = torch.randn(2, prototypes, 19, device="cuda").to(dtype)
        yield lambda *x, c=compatible: ops.cosine_similarity_map(*x, torch_compat=c), (features, vectors)


def masked_similarity(dtype: torch.dtype, last: bool) -> Iterator[Call]:
    query, support = maps((2, 19, 4, 7), (2, 3, 19, 5, 6), dtype=dtype, last=last)
    mask = torch.rand(2, 3, 1, 23, 31, device="cuda")
    sizes = torch.tensor([5, 6, 23, 31], device="cuda").expand(2, 3, 4) - torch.arange(3, device="cuda")[:, None]
    for valid in (None, sizes):
        yield lambda *x, v=valid: ops.masked_similarity(*x, valid_sizes=v), (query, support, mask)


def roi_pool(dtype: torch.dtype, last: bool) -> Iterator[Call]:
    (features,) = maps((2, 19, 9, 13), dtype=dtype, last=last)
    corners = 60 * torch.rand(7, 4, device="cuda") - 5
    boxes = torch.cat([torch.arange(7, device="cuda")[:, None] % 2, corners], dim=1)
    boxes = boxes.double() if dtype == torch.float64 else boxes.float()
    for size in ((7, 7), (1, 1), (3, 28)):
        yield lambda x, s=size: ops.roi_pool(x, boxes, s, 0.25), (features,)


def spatial_temporal_attention(dtype: torch.dtype, last: bool) -> Iterator[Call]:
    (features,) = maps((2, 3, 19, 7, 5), dtype=dtype, last=last)
    for energy, with_map in itertools.product(("sq", "l2", "agrl"), (False, True)):
        yield (
            lambda x, e=energy, m=with_map: ops.spatial_temporal_attention(x, 3, energy=e, return_map=m),
            (features,),
        )


OPERATORS = (
    criss_cross_attention,
    masked_average_pool,
    cosine_similarity_map,
    masked_similarity,
    roi_pool,
    spatial_temporal_attention,
)


def main() -> None:
    torch.manual_seed(0)
    for operator, dtype, last in itertools.product(OPERATORS, DTYPES, (False, True)):
        for function, tensors in operator(dtype, last):
            leaves = [x.detach().requires_grad_() for x in tensors]
            results = function(*leaves)
            outputs = [x for x in (results if isinstance(results, tuple) else (results,)) if x.requires_grad]
            gradients = torch.autograd.grad(outputs, leaves, [torch.randn_like(x) for x in outputs])
            assert all(x.isfinite().all() for x in (*outputs, *gradients)), operator.__name__
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
