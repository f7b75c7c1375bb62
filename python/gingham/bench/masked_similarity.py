"""Masked similarity: its sizes, and what one would use instead of `gingham.ops.masked_similarity`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gingham.bench.definition import OURS, Case, Function, Level, Operator, Pass, Peer
from gingham.bench.masked_average_pool import Resize, both_conventions, pool_under_resized_mask, pool_upsampled


def _similarity(query: Tensor, support: Tensor, mask: Tensor, pool: Function) -> Tensor:
    pooled = pool(support.flatten(0, 1), mask.flatten(0, 1)).unflatten(0, support.shape[:2])  # [B, K, C]
    prototype = pooled.mean(dim=1)[:, :, None, None]
    return F.cosine_similarity(query, prototype, dim=1).unsqueeze(1)


def with_upsampled_features(query: Tensor, support: Tensor, mask: Tensor) -> Tensor:
    """SG-One's form: the features of the supports are interpolated to the size of their masks."""
    return _similarity(query, support, mask, pool_upsampled)


def with_resized_masks(query: Tensor, support: Tensor, mask: Tensor) -> Tensor:
    """The cheaper convention of later methods: the masks are interpolated to the size of the features."""
    return _similarity(query, support, mask, pool_under_resized_mask)


def _reference(case: Case) -> Function:
    from gingham.reference import masked_similarity

    resize: Resize = case.options["resize"]
    return lambda query, support, mask: masked_similarity(query, support, mask, resize=resize)


def _ours(case: Case, device: torch.device) -> Function:
    from gingham.ops import masked_similarity

    resize: Resize = case.options["resize"]
    return lambda query, support, mask: masked_similarity(query, support, mask, resize=resize)


def _case(
    batch: int,
    shots: int,
    channels: int,
    size: tuple[int, int],
    mask_size: tuple[int, int],
    resize: Resize = "features",
    *,
    level: Level,
    headline: bool = False,
    passes: tuple[Pass, ...] = (Pass.FORWARD, Pass.TRAINING),
) -> Case:
    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        query = torch.randn(batch, channels, *size, generator=generator) + 1  # of a mean that is not zero
        support = torch.randn(batch, shots, channels, *size, generator=generator) + 1
        return query, support, torch.rand(batch, shots, 1, *mask_size, generator=generator) > 0.5

    query, supports = batch * channels * size[0] * size[1], batch * shots * channels * size[0] * size[1]
    forward = query + supports
    return Case(
        label=f"{batch}x{shots}, {channels}x{size[0]}x{size[1]}, {mask_size[0]}x{mask_size[1]}, {resize}",
        inputs=inputs,
        operations={
            Pass.FORWARD: 4 * query + 2 * supports,
            Pass.RECORDED: 4 * query + 2 * supports,
            Pass.TRAINING: 9 * query + 3 * supports,
        },
        elements={Pass.FORWARD: forward, Pass.RECORDED: forward, Pass.TRAINING: 3 * query + 2 * supports},
        options={"resize": resize},
        level=level,
        headline=headline,
        passes=passes,
        measure_memory=headline,
    )


OPERATOR = Operator(
    name="masked_similarity",
    inputs="batch x shots, features, mask, what is resized",
    cases=(
        _case(1, 1, 512, (47, 63), (375, 500), level=Level.QUICK, headline=True),
        _case(1, 5, 512, (47, 63), (375, 500), level=Level.DEFAULT),
        _case(1, 1, 512, (47, 63), (375, 500), "mask", level=Level.DEFAULT),
        _case(4, 1, 256, (60, 60), (473, 473), level=Level.DEFAULT),
        _case(8, 1, 512, (41, 41), (321, 321), level=Level.FULL),
        _case(1, 1, 8, (2, 3), (5, 7), level=Level.QUICK, passes=(Pass.FORWARD, Pass.RECORDED, Pass.TRAINING)),
    ),
    peers=(
        Peer(OURS, _ours),
        *both_conventions(with_upsampled_features, with_resized_masks),
    ),
    reference=_reference,
    differentiable=(0, 1),
    baseline="eager",
    limit="copy",
)
