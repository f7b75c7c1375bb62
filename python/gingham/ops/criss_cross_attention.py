"""Criss-cross attention (Huang et al., CCNet, https://arxiv.org/abs/1811.11721), 2-D and 3-D, as a torch function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gingham import reference
from gingham.ops._register import (
    Registered,
    as_float,
    check_like,
    check_tensor,
    describe,
    empty_map,
    is_channels_last,
    lower,
)


def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float = 1.0) -> Tensor:
    """Attention of every position to those that differ from it in at most one coordinate, itself counted once.

    Source: Huang et al., CCNet, ICCV 2019, and in 3-D TPAMI 2020, https://arxiv.org/abs/1811.11721.

    One softmax runs over a position's row, column and, in 3-D, the frames behind it: H + W - 1 or T + H + W - 2
    positions. No attention weights are stored; backward keeps the log-sum-exp of each position.

    Args:
        query: [B, Ck, H, W] or [B, Ck, T, H, W]; float32, float64, float16 or bfloat16, on CPU or CUDA, with any
            strides (read in place where channels are adjacent in memory, and on the CPU where columns are; others
            are copied, on CUDA up to 256 MiB at a time: give it channels-last maps).
        key: shape, dtype and device of `query`.
        value: [B, Cv, *S], batch, spatial sizes, dtype and device of `query`.
        scale: factor on the logits, any real number. CCNet uses none: 1.0.

    Returns:
        [B, Cv, *S] in the dtype and memory format of `value`. Sums are held in float32 (float64 for float64); results
        of 16 bits are rounded to their dtype once per axis, and once more for every 128 positions on CUDA or 288 on the
        CPU that an axis goes on; the gradient of `query` on the CPU also for every part of the keys of a line that it
        takes at a time (three for a column of 97 in bfloat16). Under autocast the inputs are cast to its dtype.

    Note:
        In float16 and bfloat16 the gradient of `query` is less exact where the keys share a large offset, as it is
        taken from the rounded output (so does torch's ``scaled_dot_product_attention``). The instruction sets
        avx512_bf16 and amx take subnormal bfloat16 numbers for zero.

        ``torch.compile`` traces ``torch.vmap`` of this, but not ``torch.func.grad``, ``vjp`` or ``jacrev`` of it: it
        cannot trace these through any operator registered with ``torch.library``. They work outside of it, as does
        ``torch.autograd`` on what is compiled.

    Raises:
        TypeError: an argument is no tensor, or the dtypes are not one supported floating type.
        ValueError: shapes or devices do not agree, or `scale` is beyond the range of float64.

    Example:
        >>> import torch
        >>> query, key = torch.randn(2, 2, 8, 5, 6)
        >>> criss_cross_attention(query, key, torch.randn(2, 32, 5, 6)).shape
        torch.Size([2, 32, 5, 6])
    """
    try:
        if type(scale) is not float:
            _check(query, key, value, scale)  # torch would take a tensor for a number, and its gradient for none
            scale = as_float("criss_cross_attention", "scale", scale)
        is_compiling = torch.compiler.is_compiling()
        # Each of these questions takes a tenth of a microsecond; torch.compile cannot trace the second.
        if is_compiling or torch._C._is_any_autocast_enabled():
            query, key, value = lower((query, key, value))
        if is_compiling:
            _check(query, key, value, scale)
        allow_tf32 = value.is_cuda and value.dtype == torch.float32 and _tf32_is_allowed()
        return _call(query, key, value, scale, allow_tf32)
    except (RuntimeError, TypeError, AttributeError):
        _check(query, key, value, scale)  # says what is wrong with the arguments, if that is the reason
        raise


def _tf32_is_allowed() -> bool:
    # Not matmul.allow_tf32, which raises once the setting was made by this name; this one knows of both.
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


# torch.compile cannot trace it, but compiles anew when the setting changes. What torch.compiler.assume_constant_result
# sets, without the second that importing torch._dynamo takes.
_tf32_is_allowed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check(query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor("criss_cross_attention", name, x)
    as_float("criss_cross_attention", "scale", scale)
    if query.dim() not in (4, 5):
        raise ValueError(
            f"criss_cross_attention: query must be [B, Ck, H, W] or [B, Ck, T, H, W], got {describe(query)}"
        )
    if query.size(1) == 0:
        raise ValueError(f"criss_cross_attention: query must have at least one channel, got {describe(query)}")
    for name, x in (("key", key), ("value", value)):
        check_like("criss_cross_attention", name, x, "query", query)
        expected = [query.size(0), query.size(1) if name == "key" else "Cv", *query.shape[2:]]
        if x.dim() != query.dim() or any(e not in ("Cv", s) for e, s in zip(expected, x.shape, strict=True)):
            wanted = ", ".join(str(e) for e in expected)
            raise ValueError(
                f"criss_cross_attention: {name} must be [{wanted}] to match query {list(query.shape)}, "
                f"got {describe(x)}"
            )


# ------------------------------------------------------------------------------------------------ registration


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, scale: float, allow_tf32: bool = False) -> Any:
    _check(query, key, value, scale)
    lse = value.new_empty(value.shape[0], *value.shape[2:], dtype=torch.float64)
    return empty_map(value.shape, value, is_channels_last(value)), lse


def _fake_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
    allow_tf32: bool = False,
) -> Any:
    last = is_channels_last(value)
    return tuple(empty_map(x.shape, x, last) for x in (query, key, value))


def _definition(query: Tensor, key: Tensor, value: Tensor, scale: float, allow_tf32: bool) -> Tensor:
    return reference.criss_cross_attention(query, key, value, scale=scale)


_call = Registered(
    "criss_cross_attention",
    tensors=3,
    differentiable=(0, 1, 2),
    definition=_definition,
    fake=_fake_forward,
    fake_backward=_fake_backward,
    outputs=2,
    autocast=lower,
).call
