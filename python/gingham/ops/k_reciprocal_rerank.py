"""k-reciprocal re-ranking (Zhong et al., CVPR 2017, https://arxiv.org/abs/1701.08398) as a torch function."""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gingham.ops._register import as_float, check_like, check_tensor, check_whole_number, describe

_NAME = "k_reciprocal_rerank"
_public = torch.ops.gingham.k_reciprocal_rerank.default
_raw = torch.ops.gingham._k_reciprocal_rerank.default
_call_raw = _raw._op  # what calling it comes to, without a frame of Python in between


def k_reciprocal_rerank(
    query_features: Tensor, gallery_features: Tensor, k1: int = 20, k2: int = 6, lambda_value: float = 0.3
) -> Tensor:
    """Distances of queries to gallery items that take into account which items are among each other's nearest.

    Source: Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding, CVPR 2017,
    https://arxiv.org/abs/1701.08398.

    All N = Nq + Ng items take part, queries first. Each is described by weights on the items of its k-reciprocal
    neighbourhood; the result is ``(1 - lambda_value)`` times the Jaccard distance of two descriptions plus
    ``lambda_value`` times the squared Euclidean distance in units of the query's largest one. Unlike in the usual NumPy
    form no N x N matrix exists: memory beyond the result is a few kilobytes an item and a few megabytes a thread.

    Args:
        query_features: [Nq, D]; float32, float64, float16 or bfloat16, finite, with any strides (rows whose features
            are adjacent in memory are read in place).
        gallery_features: [Ng, D], dtype and device of `query_features`.
        k1: neighbours in the reciprocal neighbourhood, at least 1. From N - 1 on, all items are neighbours.
        k2: items whose descriptions are averaged, the item itself among them, at least 1; 1 averages nothing. From N
            on, all are averaged.
        lambda_value: share of the original distance, in [0, 1]. With 1 the order of the gallery is the original one.

    Returns:
        [Nq, Ng], contiguous: float64 for float64 features, otherwise float32, in which features of 16 bits are
        computed too. It never requires gradients: neighbourhoods are sets, which have none. Of equal distances the one
        to the item with the smaller index counts as the smaller; an item itself comes first in its own order.

    Note:
        Computed on the CPU. Features on another device are copied there, and the result is copied back. Autocast
        changes nothing.

    Raises:
        TypeError: an argument is no tensor, dtypes are not one supported floating type, or an option is no number.
        ValueError: shapes or devices do not agree, a feature is NaN or infinite, or an option is out of range.

    Example:
        >>> import torch
        >>> people = torch.randn(10, 64)
        >>> queries = people + 0.1 * torch.randn(10, 64)
        >>> gallery = people.repeat_interleave(5, 0) + 0.1 * torch.randn(50, 64)
        >>> distances = k_reciprocal_rerank(queries, gallery, k1=5, k2=3)
        >>> bool((distances.argmin(dim=1) // 5 == torch.arange(10)).all())
        True
    """
    try:
        if type(k1) is not int or type(k2) is not int or type(lambda_value) is not float:
            _check(query_features, gallery_features, k1, k2, lambda_value)
            k1, k2, lambda_value = operator.index(k1), operator.index(k2), as_float(_NAME, "lambda_value", lambda_value)
        is_compiling = torch.compiler.is_compiling()
        if is_compiling:
            _check(query_features, gallery_features, k1, k2, lambda_value)
        # torch.compile cannot trace the second question.
        if is_compiling or torch._C._are_functorch_transforms_active():
            return _public(query_features.detach(), gallery_features.detach(), k1, k2, lambda_value)
        if query_features.requires_grad or gallery_features.requires_grad:
            query_features, gallery_features = query_features.detach(), gallery_features.detach()
        return _call_raw(query_features, gallery_features, k1, k2, lambda_value)
    except (RuntimeError, TypeError, AttributeError):
        _check(query_features, gallery_features, k1, k2, lambda_value)
        _check_finite(query_features, gallery_features)
        raise


def _check(query_features: Tensor, gallery_features: Tensor, k1: int, k2: int, lambda_value: float) -> None:
    for name, x in (("query_features", query_features), ("gallery_features", gallery_features)):
        check_tensor(_NAME, name, x)
        if x.dim() != 2 or x.size(1) == 0:
            shape = "[Nq, D]" if name == "query_features" else "[Ng, D]"
            raise ValueError(f"{_NAME}: {name} must be {shape} with D >= 1, got {describe(x)}")
    check_like(_NAME, "gallery_features", gallery_features, "query_features", query_features)
    if gallery_features.size(1) != query_features.size(1):
        raise ValueError(
            f"{_NAME}: gallery_features must be [Ng, {query_features.size(1)}] to match query_features "
            f"{list(query_features.shape)}, got {describe(gallery_features)}"
        )
    for name, k in (("k1", k1), ("k2", k2)):
        check_whole_number(_NAME, name, k)
        if not 1 <= k < 2**63:
            raise ValueError(f"{_NAME}: {name} must be at least 1 and fit 64 bits, got {k}")
    if not 0 <= as_float(_NAME, "lambda_value", lambda_value) <= 1:
        raise ValueError(f"{_NAME}: lambda_value must be in [0, 1], got {lambda_value}")


def _check_finite(query_features: Tensor, gallery_features: Tensor) -> None:
    for name, x in (("query_features", query_features), ("gallery_features", gallery_features)):
        if x.device.type != "meta" and not bool(x.isfinite().all()):
            raise ValueError(f"{_NAME}: {name} must be finite, got NaN or infinity in {describe(x)}")


# ------------------------------------------------------------------------------------------------ registration


def _fake(
    query_features: Tensor, gallery_features: Tensor, k1: int = 20, k2: int = 6, lambda_value: float = 0.3
) -> Tensor:
    _check(query_features, gallery_features, k1, k2, lambda_value)
    dtype = torch.float64 if query_features.dtype == torch.float64 else torch.float32
    return query_features.new_empty(query_features.size(0), gallery_features.size(0), dtype=dtype)


def _on_the_cpu(query_features: Tensor, gallery_features: Tensor, *options: Any) -> Tensor:
    result: Tensor = _raw(query_features.cpu(), gallery_features.cpu(), *options)
    return result.to(query_features.device)


def _one_by_one(call: Any, info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
    """The rule for vmap: items of different samples are no neighbours, so nothing can be folded into an axis."""
    features, options = arguments[:2], arguments[2:]
    samples = [
        [x] * info.batch_size if axis is None else x.unbind(axis) for x, axis in zip(features, in_dims[:2], strict=True)
    ]
    return torch.stack([call(query, gallery, *options) for query, gallery in zip(*samples, strict=True)]), 0


def _without_gradient(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


def _no_gradients(ctx: Any, grad_output: Tensor) -> tuple[None, ...]:
    return (None,) * 5


for _operator in (_public, _raw):
    torch.library.register_fake(_operator, _fake)
    torch.library.register_kernel(_operator, "cuda", _on_the_cpu)
    torch.library.register_vmap(_operator, partial(_one_by_one, _operator))
torch.library.register_autograd(f"gingham::{_NAME}", _no_gradients, setup_context=_without_gradient)
