"""What every operator's registration shares: autograd, vmap, autocast, shapes without data, and the eager fast path.

Each operator exists twice in ``torch.ops.gingham``, with the same kernels: the public name carries autograd formulas,
for torch.compile and torch.export; the name with an underscore carries none, for the eager path, which is several
microseconds faster than a formula registered from Python.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gingham._library import load_torch_operators

load_torch_operators()

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

_library = torch.library.Library("gingham", "IMPL")


class Registered:
    """An operator of torch, registered with all that PyTorch asks for.

    Its schema takes `tensors` tensors, batch first, and options that are no tensors. Of its outputs the first
    `returned` are the user's, and all of these but those in `without_gradient` have gradients; others are for backward.
    The schema of ``<name>_backward`` takes the gradients of the returned outputs that have one, the tensors, the
    outputs in `kept`, the options, and with `optional_gradients` an int whose bit i says whether the gradient of tensor
    i is wanted; it returns the gradients of the tensors in `differentiable`, empty ones where not wanted.

    Args:
        name: under ``torch.ops.gingham``.
        tensors: how many leading arguments are tensors.
        differentiable: indices of the tensors that may have gradients.
        definition: the returned outputs that have gradients, as a differentiable function of the tensors and the
            options in plain PyTorch; the second derivative goes through it.
        fake: shapes without data of the outputs, from the arguments of the operator, which it checks: where one tensor
            is without data, no kernel sees any.
        fake_backward: the same of the backward operator.
        outputs, returned, without_gradient, kept: see above; by default every output is kept; those that are must be
            neighbours. An operator of one output returns it alone.
        autocast: what autocast does to the tensors: `lower` or `promote`.
        vmap, vmap_backward: rules ``(call, info, in_dims, *arguments)``; by default the mapped axis is folded into the
            batch.
        optional_gradients: see above.
        tensor_options: indices of options that are tensors without gradients, or None.

    Attributes:
        public, public_backward: the operators with formulas.
        call: the returned outputs, by the way that fits: compiled, under a transform, recorded, or none of these. A
            function and not a method, which would take a tenth of a microsecond more.
    """

    def __init__(
        self,
        name: str,
        *,
        tensors: int,
        differentiable: Sequence[int],
        definition: Callable[..., Any],
        fake: Callable[..., Any],
        fake_backward: Callable[..., Any],
        outputs: int,
        returned: int = 1,
        without_gradient: Sequence[int] = (),
        kept: Sequence[int] | None = None,
        autocast: Callable[[Sequence[Tensor]], Sequence[Tensor]],
        vmap: Callable[..., Any] | None = None,
        vmap_backward: Callable[..., Any] | None = None,
        optional_gradients: bool = False,
        tensor_options: Sequence[int] = (),
    ) -> None:
        ops = torch.ops.gingham
        self.public = getattr(ops, name).default
        self.public_backward = getattr(ops, f"{name}_backward").default
        raw_forward = getattr(ops, f"_{name}").default
        raw_backward = getattr(ops, f"_{name}_backward").default
        public, public_backward = self.public, self.public_backward
        # What calling an operator comes to, without a frame of Python in between.
        raw, raw_backward_op = raw_forward._op, raw_backward._op

        kept_outputs = tuple(range(outputs) if kept is None else kept)
        # Of neighbours, faster than one by one.
        pick = slice(kept_outputs[0], kept_outputs[-1] + 1) if kept_outputs else slice(0)
        if kept_outputs != tuple(range(outputs))[pick]:
            raise ValueError(f"kept must be neighbouring outputs, got {kept_outputs}")
        with_gradient = [i for i in range(returned) if i not in without_gradient]
        not_differentiable = [i for i in range(outputs) if i not in with_gradient]
        first_tensor = len(with_gradient)
        # Arguments of backward: gradients, tensors, kept outputs, options.
        first_option = first_tensor + tensors + len(kept_outputs)
        saved_tensors = tensors + len(kept_outputs)

        def watched(options: tuple[Any, ...]) -> list[Any]:
            """Saved only so that torch notices when they are changed before backward."""
            return [options[i] for i in tensor_options]

        def backward_options(needed: Sequence[bool], options: tuple[Any, ...]) -> tuple[Any, ...]:
            if not optional_gradients:
                return options
            return (*options, sum(1 << i for i in range(tensors) if needed[i]))

        def at_arguments(gradients: Sequence[Tensor], needed: Sequence[bool], arguments: int) -> list[Any]:
            """A gradient or None for each argument of the operator."""
            result: list[Any] = [None] * arguments
            for i, gradient in zip(differentiable, gradients, strict=True):
                if needed[i]:
                    result[i] = gradient
            return result

        class Recorded(torch.autograd.Function):
            # In the style without setup_context, whose binding of arguments takes longer than the operator.
            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> Any:
                results = raw(*arguments)
                kept = (results,)[pick] if outputs == 1 else results[pick]
                ctx.options = arguments[tensors:]
                ctx.save_for_backward(*arguments[:tensors], *kept, *watched(ctx.options))
                if returned == 1:
                    return results if outputs == 1 else results[0]
                for i in without_gradient:
                    ctx.mark_non_differentiable(results[i])
                return tuple(results[:returned])

            @staticmethod
            def backward(ctx: Any, *gradients: Tensor) -> Any:
                if forward_ad._current_level >= 0:
                    refuse_tangents(name, gradients)
                call = public_backward if torch.is_grad_enabled() else raw_backward_op
                needed = ctx.needs_input_grad
                given = gradients if len(with_gradient) == returned else [gradients[i] for i in with_gradient]
                results = call(*given, *ctx.saved_tensors[:saved_tensors], *backward_options(needed, ctx.options))
                results = results if isinstance(results, (tuple, list)) else (results,)
                return tuple(at_arguments(results, needed, tensors + len(ctx.options)))

        class TransformableBackward(torch.autograd.Function):
            @staticmethod
            def forward(*arguments: Any) -> Any:
                return raw_backward(*arguments)

            @staticmethod
            def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
                ctx.options = inputs[first_option:]
                ctx.save_for_backward(*inputs[: first_tensor + tensors], *watched(ctx.options))

            @staticmethod
            def backward(ctx: Any, *seconds: Tensor) -> Any:
                # The first gradients as a function of the gradients of the outputs and the tensors, differentiated
                # through the definition; the kept outputs depend on the same tensors, so nothing is left for them.
                options = ctx.options[:-1] if optional_gradients else ctx.options
                # The last option of backward says which gradients it gave; the others are empty and have no second.
                wanted = [i for i in differentiable if not optional_gradients or ctx.options[-1] >> i & 1]
                given = [s for i, s in zip(differentiable, seconds, strict=True) if i in wanted]
                saved = ctx.saved_tensors[: first_tensor + tensors]
                # The gradient of one tensor depends on the others too, wanted or not.
                floating = (i for i in differentiable if saved[first_tensor + i].is_floating_point())
                moving = [*range(first_tensor), *(first_tensor + i for i in floating)]

                def first_gradients(*variables: Tensor) -> Any:
                    values = list(saved)
                    for i, variable in zip(moving, variables, strict=True):
                        values[i] = variable
                    outer, inner = values[:first_tensor], values[first_tensor:]

                    def outputs_of(*maps: Tensor) -> Any:
                        arguments = list(inner)
                        for i, x in zip(wanted, maps, strict=True):
                            arguments[i] = x
                        return definition(*arguments, *options)

                    gradients = tuple(outer) if first_tensor > 1 else outer[0]
                    return torch.func.vjp(outputs_of, *(inner[i] for i in wanted))[1](gradients)

                second = torch.func.vjp(first_gradients, *(saved[i] for i in moving))[1](tuple(given))
                result: list[Any] = [None] * (first_option + len(ctx.options))
                for i, gradient in zip(moving, second, strict=True):
                    result[i] = gradient
                return tuple(result)

            @staticmethod
            def jvp(ctx: Any, *tangents: Any) -> Any:
                raise _no_forward_mode(name)

            @staticmethod
            def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
                return rule_backward(TransformableBackward.apply, info, in_dims, *arguments)

        class Transformable(torch.autograd.Function):
            # The path under torch.func transforms, which need setup_context and a vmap rule.
            @staticmethod
            def forward(*arguments: Any) -> Any:
                return raw_forward(*arguments)

            @staticmethod
            def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
                output = output if isinstance(output, (tuple, list)) else (output,)
                ctx.options = inputs[tensors:]
                ctx.save_for_backward(*inputs[:tensors], *output[pick], *watched(ctx.options))
                ctx.mark_non_differentiable(*(output[i] for i in not_differentiable))

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                return gradients_by(TransformableBackward.apply, ctx, gradients)

            @staticmethod
            def jvp(ctx: Any, *tangents: Any) -> Any:
                raise _no_forward_mode(name)

            @staticmethod
            def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
                return rule(Transformable.apply, info, in_dims, *arguments)

        def gradients_by(call: Callable[..., Any], ctx: Any, gradients: Sequence[Any]) -> Any:
            needed = ctx.needs_input_grad
            given = [gradients[i] for i in with_gradient]
            results = call(*given, *ctx.saved_tensors[:saved_tensors], *backward_options(needed, ctx.options))
            results = results if isinstance(results, (tuple, list)) else (results,)
            return tuple(at_arguments(results, needed, tensors + len(ctx.options)))

        rule = vmap or partial(_fold_all, tensors)
        rule_backward = vmap_backward or partial(_fold_all, first_option)
        recorded, transformable = Recorded.apply, Transformable.apply

        def call(*arguments: Any) -> Any:
            if torch.compiler.is_compiling():
                if forward_ad._current_level >= 0:
                    refuse_tangents(name, arguments[:tensors])
                results = public(*arguments)
            elif torch._C._are_functorch_transforms_active():
                results = transformable(*arguments)
            else:
                if forward_ad._current_level >= 0:
                    refuse_tangents(name, arguments[:tensors])
                if torch.is_grad_enabled():
                    for x in arguments[:tensors]:
                        if x.requires_grad:
                            return recorded(*arguments)
                results = raw(*arguments)
            if outputs == 1:
                return results
            return results[0] if returned == 1 else tuple(results[:returned])

        self.call = call

        for forward, backward in ((self.public, self.public_backward), (raw_forward, raw_backward)):
            torch.library.register_fake(forward, fake)
            torch.library.register_fake(backward, fake_backward)
            torch.library.register_vmap(forward, partial(rule, forward))
            torch.library.register_vmap(backward, partial(rule_backward, backward))
        torch.library.register_autograd(
            f"gingham::{name}",
            lambda ctx, *gradients: gradients_by(public_backward, ctx, gradients),
            setup_context=Transformable.setup_context,
        )
        torch.library.register_autograd(
            f"gingham::{name}_backward",
            TransformableBackward.backward,
            setup_context=TransformableBackward.setup_context,
        )
        for key in (torch._C.DispatchKey.AutocastCPU, torch._C.DispatchKey.AutocastCUDA):
            _library.impl(name, _autocast_kernel(self.public, key, tensors, autocast), key.name)


def refuse_tangents(operator: str, tensors: Sequence[Tensor]) -> None:
    """Raises NotImplementedError where a tensor has a tangent: the kernels would drop it, which reads as zero.

    To be called where ``forward_ad._current_level`` says that there may be any.
    """
    for x in tensors:
        if forward_ad.unpack_dual(x).tangent is not None:
            raise _no_forward_mode(operator)


def _no_forward_mode(operator: str) -> NotImplementedError:
    name = operator.removesuffix("_with_places")
    return NotImplementedError(
        f"{name}: forward-mode differentiation (torch.func.jvp, torch.autograd.forward_ad) is not supported; "
        f"use reverse mode (torch.func.vjp, torch.autograd.grad), or gingham.reference.{name}, which has both"
    )


def _autocast_kernel(
    operator: Any, key: torch._C.DispatchKey, tensors: int, autocast: Callable[[Sequence[Tensor]], Sequence[Tensor]]
) -> Callable[..., Any]:
    def kernel(*arguments: Any) -> Any:
        arguments = (*autocast(arguments[:tensors]), *arguments[tensors:])
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return operator(*arguments)

    return kernel


# ------------------------------------------------------------------------------------------------ vmap


def fold_into_batch(size: int, tensors: Sequence[Tensor], axes: Sequence[int | None]) -> list[Tensor]:
    """Moves each tensor's mapped axis into its batch axis; tensors that are not mapped are repeated."""
    moved = (
        x.expand(size, *x.shape) if axis is None else x.movedim(axis, 0) for x, axis in zip(tensors, axes, strict=True)
    )
    return [x.flatten(0, 1) for x in moved]


def unfold_from_batch(size: int, tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The inverse for results, as vmap rules return them."""
    return tuple(x.unflatten(0, (size, x.size(0) // size)) for x in tensors), (0,) * len(tensors)


def _fold_all(tensors: int, call: Callable[..., Any], info: Any, in_dims: Any, *arguments: Any) -> Any:
    """The rule for operators whose tensors and results all begin with the batch."""
    folded = fold_into_batch(info.batch_size, arguments[:tensors], in_dims[:tensors])
    results = call(*folded, *arguments[tensors:])
    if isinstance(results, Tensor):
        return results.unflatten(0, (info.batch_size, results.size(0) // info.batch_size)), 0
    return unfold_from_batch(info.batch_size, results)


# ------------------------------------------------------------------------------------------------ autocast


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on the tensor's device; None when autocast is off there."""
    device = "cuda" if tensor.is_cuda else "cpu"  # torch has no answer for the device of tensors without data
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts what autocast would cast: floating tensors other than float64."""
    eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if eligible else tensor


def lower(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Autocast for products of matrices: floating tensors take autocast's dtype, as ``torch.matmul``'s do."""
    dtype = autocast_dtype(tensors[-1])
    return tensors if dtype is None else [_cast(x, dtype) for x in tensors]


def promote(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Autocast for what holds its sums in float32 anyway: floating tensors of mixed dtypes take the widest of them."""
    if autocast_dtype(tensors[0]) is None:
        return tensors
    dtypes = {x.dtype for x in tensors if x.is_floating_point()}
    if len(dtypes) <= 1:
        return tensors
    widest = torch.float64 if torch.float64 in dtypes else torch.float32
    return [x.to(widest) if x.is_floating_point() else x for x in tensors]


# ------------------------------------------------------------------------------------------------ checks


def describe(value: object) -> str:
    """A value in an error message."""
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided else f"{str(value.layout).removeprefix('torch.')} "
        shape = "of several shapes" if value.is_nested else list(value.shape)
        return f"{layout}{str(value.dtype).removeprefix('torch.')} {shape} on {value.device}"
    return type(value).__name__


def check_tensor(operator: str, name: str, value: Any, dtypes: Sequence[torch.dtype] = FLOATING) -> None:
    """Raises TypeError unless `value` is a dense tensor of one of the dtypes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{operator}: {name} must be a tensor, got {describe(value)}")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{operator}: {name} must be a dense tensor, got {describe(value)}")
    if value.dtype not in dtypes:
        words = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        known = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
        raise TypeError(f"{operator}: {name} must be {known}, got {describe(value)}")


def check_like(operator: str, name: str, value: Tensor, like_name: str, like: Tensor, *, dtype: bool = True) -> None:
    """Raises TypeError or ValueError unless `value` has the dtype (if asked) and the device of `like`."""
    if dtype and value.dtype != like.dtype:
        raise TypeError(
            f"{operator}: {name} must have the dtype of {like_name}, got {describe(value)} "
            f"and {like_name} {describe(like)}"
        )
    if value.device != like.device:
        raise ValueError(
            f"{operator}: {name} must be on the device of {like_name}, got {describe(value)} "
            f"and {like_name} {describe(like)}"
        )


def as_float(operator: str, name: str, value: Any) -> Any:
    """A real number as a float; under torch.compile it may be a ``torch.SymFloat``."""
    if isinstance(value, torch.SymFloat):
        return value
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{operator}: {name} must be a number, got {describe(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{operator}: {name} must be in the range of float64, got a number beyond") from None


def check_whole_number(operator: str, name: str, value: Any) -> None:
    """Raises TypeError unless `value` is a whole number, and no bool."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{operator}: {name} must be a whole number, got {describe(value)}")


def sums_dtype(tensor: Tensor) -> torch.dtype:
    """In which an operator holds the sums of the tensor's elements."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


LEAST_DIVISOR = torch.finfo(torch.float32).tiny  # `check_eps` need not be asked about a positive `eps` from here on


def check_eps(operator: str, eps: Any, *, positive: bool = False, divides: torch.dtype | None = None) -> None:
    """Raises TypeError or ValueError unless `eps` is a finite number that is not negative, or is `positive`.

    Where sums are divided by `eps`, `divides` is their dtype: there it must not underflow, which would give NaN.
    """
    value = eps if isinstance(eps, torch.SymInt) else as_float(operator, "eps", eps)
    if not 0 <= value < math.inf or (positive and value == 0):
        raise ValueError(
            f"{operator}: eps must be finite and {'positive' if positive else 'not negative'}, got {value}"
        )
    if divides is not None and 0 < value < torch.finfo(divides).tiny:
        raise ValueError(
            f"{operator}: eps must be at least {torch.finfo(divides).tiny}, the smallest normal number of "
            f"{str(divides).removeprefix('torch.')}, in which sums are divided by it, got {value}"
        )


# ------------------------------------------------------------------------------------------------ shapes without data


def is_channels_last(map_: Tensor, channel: int = 1) -> bool:
    """As csrc/torch/tensor.h decides."""
    return bool(map_.stride(channel) == 1 and map_.stride(-1) != 1)


def empty_map(
    shape: Sequence[Any], like: Tensor, channels_last: bool, channel: int = 1, *, dtype: torch.dtype | None = None
) -> Tensor:
    """What csrc/torch/tensor.h allocates for a map of this shape."""
    if not channels_last:
        return like.new_empty(shape, dtype=dtype)
    rest = [extent for axis, extent in enumerate(shape) if axis != channel]
    return like.new_empty([*rest, shape[channel]], dtype=dtype).movedim(-1, channel)
