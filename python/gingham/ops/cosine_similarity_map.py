"""The cosine of every pixel with a set of prototypes (Zhang et al., SG-One, https://arxiv.org/abs/1810.09091)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gingham import reference
from gingham.ops._register import (
    LEAST_DIVISOR,
    Registered,
    check_eps,
    check_like,
    check_tensor,
    describe,
    empty_map,
    is_channels_last,
    promote,
    sums_dtype,
)


def cosine_similarity_map(
    features: Tensor, prototypes: Tensor, *, eps: float = 1e-8, torch_compat: bool = False
) -> Tensor:
    """The cosine of every pixel of a feature map with each of a set of vectors.

    Source: Zhang et al., SG-One, IEEE Transactions on Cybernetics 2020, https://arxiv.org/abs/1810.09091.

    ``<features[b, :, y, x], prototypes[b, k]> / (max(|features[b, :, y, x]|, eps) * max(|prototypes[b, k]|, eps))``,
    in one pass over the features for all prototypes; neither are normalised copies of them stored.

    Args:
        features: [B, C, H, W] with at least one channel; float32, float64, float16 or bfloat16, on CPU or CUDA, with
            any strides (maps whose columns or channels are adjacent in memory are read in place).
        prototypes: [B, P, C], batch, channels, dtype and device of `features`; any number of them.
        eps: norms up to this one, finite and not negative, have cosine 0 and let no gradient through.
        torch_compat: such norms count as `eps` instead, and gradients, of order 1 / `eps` there, are those of
            `torch.nn.functional.cosine_similarity`. `eps` is then 0 or at least the smallest normal number of float32
            (of float64 for float64).

    Returns:
        [B, P, H, W] between -1 and 1 but for rounding, in the dtype and memory format of `features`. Sums are held in
        float32 (float64 for float64), so that squares of large numbers fit. Under autocast, arguments of mixed dtypes
        are cast to the widest of them.

    Note:
        In float16 and bfloat16 gradients are computed from the rounded cosines. On CPUs that multiply pairs of bfloat16
        numbers more than eight prototypes of that dtype do so, also in backward, where factors of the gradient are
        rounded to bfloat16 first; such CPUs take subnormal numbers for zero.

    Raises:
        TypeError: an argument is no tensor, the dtypes are not one supported floating type, or an option is not of its
            type.
        ValueError: shapes or devices do not agree, or `eps` is negative or not finite.

    Example:
        >>> import torch
        >>> features = torch.tensor([[3.0, 0.0], [4.0, 0.0]]).reshape(1, 2, 1, 2)
        >>> cosine_similarity_map(features, torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])).flatten(2)
        tensor([[[0.6000, 0.0000],
                 [0.8000, 0.0000]]])
    """
    try:
        if type(eps) is not float:
            _check(features, prototypes, eps, torch_compat)
            eps = float(eps)
        if not 0.0 <= eps < math.inf or type(torch_compat) is not bool or (torch_compat and eps < LEAST_DIVISOR):
            _check(features, prototypes, eps, torch_compat)
        is_compiling = torch.compiler.is_compiling()
        # Each of these questions takes a tenth of a microsecond; torch.compile cannot trace the second.
        if is_compiling or torch._C._is_any_autocast_enabled():
            features, prototypes = promote((features, prototypes))
        if is_compiling:
            _check(features, prototypes, eps, torch_compat)
        return _call(features, prototypes, eps, torch_compat)
    except (RuntimeError, TypeError, AttributeError):
        _check(features, prototypes, eps, torch_compat)  # says what is wrong with the arguments, if that is the reason
        raise


def _check(features: Tensor, prototypes: Tensor, eps: float, torch_compat: bool) -> None:
    check_tensor("cosine_similarity_map", "features", features)
    check_tensor("cosine_similarity_map", "prototypes", prototypes)
    if not isinstance(torch_compat, bool):
        raise TypeError(f"cosine_similarity_map: torch_compat must be a bool, got {describe(torch_compat)}")
    check_eps("cosine_similarity_map", eps, divides=sums_dtype(features) if torch_compat else None)
    if features.dim() != 4:
        raise ValueError(f"cosine_similarity_map: features must be [B, C, H, W], got {describe(features)}")
    if features.size(1) == 0:
        raise ValueError(f"cosine_similarity_map: features must have at least one channel, got {describe(features)}")
    check_like("cosine_similarity_map", "prototypes", prototypes, "features", features)
    batch, channels = features.shape[:2]
    if prototypes.dim() != 3 or prototypes.size(0) != batch or prototypes.size(2) != channels:
        raise ValueError(
            f"cosine_similarity_map: prototypes must be [{batch}, P, {channels}] to match features "
            f"{list(features.shape)}, got {describe(prototypes)}"
        )


# ------------------------------------------------------------------------------------------------ registration


def _fake_forward(features: Tensor, prototypes: Tensor, eps: float, torch_compat: bool = False) -> Any:
    _check(features, prototypes, eps, torch_compat)
    batch, _, height, width = features.shape
    count = prototypes.size(1)
    sums = sums_dtype(features)
    return (
        empty_map((batch, count, height, width), features, is_channels_last(features)),
        features.new_empty(batch, height, width, dtype=sums),
        features.new_empty(batch, count, dtype=sums),
    )


def _fake_backward(
    grad_output: Tensor,
    features: Tensor,
    prototypes: Tensor,
    output: Tensor,
    feature_norms: Tensor,
    prototype_norms: Tensor,
    eps: float,
    torch_compat: bool = False,
) -> Any:
    return empty_map(features.shape, features, is_channels_last(features)), prototypes.new_empty(prototypes.shape)


def _definition(features: Tensor, prototypes: Tensor, eps: float, torch_compat: bool) -> Tensor:
    return reference.cosine_similarity_map(features, prototypes, eps=eps, torch_compat=torch_compat)


_call = Registered(
    "cosine_similarity_map",
    tensors=2,
    differentiable=(0, 1),
    definition=_definition,
    fake=_fake_forward,
    fake_backward=_fake_backward,
    outputs=3,
    autocast=promote,
).call
