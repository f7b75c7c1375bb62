"""Criss-cross attention (Huang et al., CCNet, https://arxiv.org/abs/1811.11721), 2-D and 3-D, as a torch function."""

from __future__ import annotations

import numbers
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gingham import reference
from gingham._library import load_torch_operators
from gingham.ops._register import FLOATING, autocast_dtype, cast, describe, fold_into_batch, unfold_from_batch

load_torch_operators()

# The public operators carry autograd formulas, for torch.compile and torch.export. The others are the same kernels
# without, for the eager path below, which is several microseconds faster than a formula registered from Python.
_forward = torch.ops.gingham.criss_cross_attention.default
_backward = torch.ops.gingham.criss_cross_attention_backward.default
_raw_forward = torch.ops.gingham._criss_cross_attention.default
_raw_backward = torch.ops.gingham._criss_cross_attention_backward.default
_call_raw_forward = _raw_forward._op  # what calling it comes to, without the frame of Python in between


def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float = 1.0) -> Tensor:
    """Attention of every position to those that differ from it in at most one coordinate, itself counted once.

    Source: Huang et al., CCNet, ICCV 2019, and in 3-D TPAMI 2020, https://arxiv.org/abs/1811.11721.

    One softmax runs over a position's row, column and, in 3-D, the frames behind it: H + W - 1 or T + H + W - 2
    positions. No attention weights are stored; backward keeps the log-sum-exp of each position.

    Args:
        query: [B, Ck, H, W] or [B, Ck, T, H, W]; float32, float64, float16 or bfloat16, on CPU or CUDA, with any
            strides (maps whose columns or channels are adjacent in memory are read in place).
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
            scale = _as_float(scale)
        is_cuda, is_compiling = value.is_cuda, torch.compiler.is_compiling()
        # Each of these questions takes a tenth of a microsecond; most calls ask the first two only, and torch.compile,
        # which cannot trace the second, only the first.
        if is_compiling or torch._C._is_any_autocast_enabled():
            dtype = autocast_dtype(value)
            if dtype is not None:
                query, key, value = cast(query, dtype), cast(key, dtype), cast(value, dtype)
        allow_tf32 = is_cuda and value.dtype == torch.float32 and _tf32_is_allowed()
        if is_compiling:
            _check(query, key, value, scale)
            return _forward(query, key, value, scale, allow_tf32)[0]
        if torch._C._are_functorch_transforms_active():
            return _Transformable.apply(query, key, value, scale, allow_tf32)[0]
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            return _CrissCrossAttention.apply(query, key, value, scale, allow_tf32)
        return _call_raw_forward(query, key, value, scale, allow_tf32)[0]
    except (RuntimeError, TypeError, AttributeError):
        _check(query, key, value, scale)  # says what is wrong with the arguments, if that is the reason
        raise


def _tf32_is_allowed() -> bool:
    # Not matmul.allow_tf32, which raises once the setting was made by this name; this one knows of both.
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


# torch.compile cannot trace it, but compiles anew when the setting changes. What torch.compiler.assume_constant_result
# sets, without the second that importing torch._dynamo takes.
_tf32_is_allowed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _as_float(scale: Any) -> Any:
    if isinstance(scale, torch.SymFloat):
        return scale
    try:
        return float(scale)
    except OverflowError:
        raise ValueError("criss_cross_attention: scale must be in the range of float64, got a number beyond") from None


def _check(query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
    arguments = {"query": query, "key": key, "value": value}
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"criss_cross_attention: {name} must be a tensor, got {describe(x)}")
        if x.layout != torch.strided or x.is_nested:
            raise TypeError(f"criss_cross_attention: {name} must be a dense tensor, got {describe(x)}")
        if x.dtype not in FLOATING:
            raise TypeError(
                f"criss_cross_attention: {name} must be float32, float64, float16 or bfloat16, got {describe(x)}"
            )
    if not isinstance(scale, (numbers.Real, torch.SymFloat)):
        raise TypeError(f"criss_cross_attention: scale must be a number, got {describe(scale)}")
    if query.dim() not in (4, 5):
        raise ValueError(
            f"criss_cross_attention: query must be [B, Ck, H, W] or [B, Ck, T, H, W], got {describe(query)}"
        )
    if query.size(1) == 0:
        raise ValueError(f"criss_cross_attention: query must have at least one channel, got {describe(query)}")
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise TypeError(
                f"criss_cross_attention: {name} must have the dtype of query, got {describe(x)} "
                f"and query {describe(query)}"
            )
        if x.device != query.device:
            raise ValueError(
                f"criss_cross_attention: {name} must be on the device of query, got {describe(x)} "
                f"and query {describe(query)}"
            )
        expected = [query.size(0), query.size(1) if name == "key" else "Cv", *query.shape[2:]]
        if x.dim() != query.dim() or any(e not in ("Cv", s) for e, s in zip(expected, x.shape, strict=True)):
            wanted = ", ".join(str(e) for e in expected)
            raise ValueError(
                f"criss_cross_attention: {name} must be [{wanted}] to match query {list(query.shape)}, "
                f"got {describe(x)}"
            )


# ------------------------------------------------------------------------------------------------ shapes without data


def _empty_map(shape: torch.Size, like: Tensor, channels_last: bool) -> Tensor:
    if not channels_last:
        return like.new_empty(shape)
    return like.new_empty(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def _is_channels_last(value: Tensor) -> bool:  # as csrc/torch/tensor.h decides
    return bool(value.stride(1) == 1 and value.stride(-1) != 1)


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, scale: float, allow_tf32: bool = False) -> Any:
    _check(query, key, value, scale)
    lse = value.new_empty(value.shape[0], *value.shape[2:], dtype=torch.float64)
    return _empty_map(value.shape, value, _is_channels_last(value)), lse


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
    last = _is_channels_last(value)
    return tuple(_empty_map(x.shape, x, last) for x in (query, key, value))


# ------------------------------------------------------------------------------------------------ autograd


class _CrissCrossAttention(torch.autograd.Function):
    """The eager path. In the style without setup_context, whose binding of arguments takes longer than the operator."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, allow_tf32: bool) -> Tensor:
        output, lse = _call_raw_forward(query, key, value, scale, allow_tf32)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.scale, ctx.allow_tf32 = scale, allow_tf32
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        call = _backward if torch.is_grad_enabled() else _raw_backward
        return *call(grad_output, *ctx.saved_tensors, ctx.scale, ctx.allow_tf32), None, None


class _Transformable(torch.autograd.Function):
    """The path under torch.func transforms, which need setup_context and a vmap rule."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _raw_forward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        query, key, value, ctx.scale, ctx.allow_tf32 = inputs
        ctx.save_for_backward(query, key, value, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_lse: Tensor | None) -> Any:
        grads = _TransformableBackward.apply(grad_output, *ctx.saved_tensors, ctx.scale, ctx.allow_tf32)
        return *grads, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _vmap_forward(_Transformable.apply, info, in_dims, *arguments)


class _TransformableBackward(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _raw_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        grad_output, query, key, value, _, _, ctx.scale, _ = inputs
        ctx.save_for_backward(grad_output, query, key, value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # The first gradients as a function of (grad_output, query, key, value), differentiated through the definition;
        # output and lse depend on the same inputs, so nothing is left for them.
        def first_gradients(grad_output: Tensor, *maps: Tensor) -> Any:
            definition = partial(reference.criss_cross_attention, scale=ctx.scale)
            return torch.func.vjp(definition, *maps)[1](grad_output)

        second = torch.func.vjp(first_gradients, *ctx.saved_tensors)[1](grads)
        return *second, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _vmap_backward(_TransformableBackward.apply, info, in_dims, *arguments)


def _formula(ctx: Any, grad_output: Tensor, grad_lse: Tensor | None) -> Any:
    return *_backward(grad_output, *ctx.saved_tensors, ctx.scale, ctx.allow_tf32), None, None


# ------------------------------------------------------------------------------------------------ vmap


def _vmap_forward(call: Any, info: Any, in_dims: Any, query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Any:
    maps = fold_into_batch(info.batch_size, (query, key, value), in_dims[:3])
    return unfold_from_batch(info.batch_size, call(*maps, *options))


def _vmap_backward(call: Any, info: Any, in_dims: Any, *arguments: Any) -> Any:
    maps = fold_into_batch(info.batch_size, arguments[:6], in_dims[:6])
    return unfold_from_batch(info.batch_size, call(*maps, *arguments[6:]))


for _forward_operator, _backward_operator in ((_forward, _backward), (_raw_forward, _raw_backward)):
    torch.library.register_fake(_forward_operator, _fake_forward)
    torch.library.register_fake(_backward_operator, _fake_backward)
    torch.library.register_vmap(_forward_operator, partial(_vmap_forward, _forward_operator))
    torch.library.register_vmap(_backward_operator, partial(_vmap_backward, _backward_operator))
torch.library.register_autograd("gingham::criss_cross_attention", _formula, setup_context=_Transformable.setup_context)
torch.library.register_autograd(
    "gingham::criss_cross_attention_backward",
    _TransformableBackward.backward,
    setup_context=_TransformableBackward.setup_context,
)


def _autocast(device: str, key: torch._C.DispatchKey) -> Any:
    def kernel(query: Tensor, key_: Tensor, value: Tensor, scale: float, allow_tf32: bool = False) -> Any:
        dtype = autocast_dtype(value) or value.dtype
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return _forward(cast(query, dtype), cast(key_, dtype), cast(value, dtype), scale, allow_tf32)

    return kernel


_library = torch.library.Library("gingham", "IMPL")
_library.impl("criss_cross_attention", _autocast("cpu", torch._C.DispatchKey.AutocastCPU), "AutocastCPU")
_library.impl("criss_cross_attention", _autocast("cuda", torch._C.DispatchKey.AutocastCUDA), "AutocastCUDA")
