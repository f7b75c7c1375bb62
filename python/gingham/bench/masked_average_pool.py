"""Masked average pooling: its sizes, and what one would use instead of `gingham.ops.masked_average_pool`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gingham.bench.definition import OURS, CannotRun, Case, Function, Level, Operator, Pass, Peer

Resize = Literal["features", "mask"]


def pool_upsampled(features: Tensor, mask: Tensor) -> Tensor:
    """SG-One's form: the features are interpolated to the size of the mask."""
    upsampled = F.interpolate(features, mask.shape[2:], mode="bilinear", align_corners=False)
    weights = mask.to(features.dtype)
    return (upsampled * weights).sum(dim=(2, 3)) / mask.sum(dim=(2, 3), dtype=torch.float32).to(features.dtype)


def pool_under_resized_mask(features: Tensor, mask: Tensor) -> Tensor:
    """The cheaper convention of later methods: the mask is interpolated to the size of the features."""
    weights = F.interpolate(mask.to(features.dtype), features.shape[2:], mode="bilinear", align_corners=False)
    return (features * weights).sum(dim=(2, 3)) / weights.sum(dim=(2, 3))


def _reference(case: Case) -> Function:
    from gingham.reference import masked_average_pool

    resize: Resize = case.options["resize"]
    return lambda features, mask: masked_average_pool(features, mask, resize=resize)


def _ours(case: Case, device: torch.device) -> Function:
    from gingham.ops import masked_average_pool

    resize: Resize = case.options["resize"]
    return lambda features, mask: masked_average_pool(features, mask, resize=resize)


def both_conventions(upsampled: Function, resized: Function) -> tuple[Peer, ...]:
    """Peers of an operator on masks: its own convention, and the cheaper one, which gives another result."""

    def own(case: Case, device: torch.device) -> Function:
        return upsampled if case.options["resize"] == "features" else resized

    def cheaper(case: Case, device: torch.device) -> Function:
        if case.options["resize"] == "mask":
            raise CannotRun("it is the operator's own convention here")
        return resized

    def compiled(build: Callable[[Case, torch.device], Function]) -> Callable[[Case, torch.device], Function]:
        return lambda case, device: torch.compile(build(case, device), dynamic=False)

    return (
        Peer("eager", own),
        Peer("compiled", compiled(own)),
        Peer("mask resized", cheaper, same_result=False),
        Peer("mask resized, compiled", compiled(cheaper), same_result=False),
    )


def _case(
    batch: int,
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
        features = torch.randn(batch, channels, *size, generator=generator) + 1  # of a mean that is not zero
        return features, torch.rand(batch, 1, *mask_size, generator=generator) > 0.5

    maps = batch * channels * size[0] * size[1]
    return Case(
        label=f"{batch}x{channels}x{size[0]}x{size[1]}, {mask_size[0]}x{mask_size[1]}, {resize}",
        inputs=inputs,
        operations={Pass.FORWARD: 2 * maps, Pass.RECORDED: 2 * maps, Pass.TRAINING: 3 * maps},
        elements={Pass.FORWARD: maps, Pass.RECORDED: maps, Pass.TRAINING: 2 * maps},
        options={"resize": resize},
        level=level,
        headline=headline,
        passes=passes,
        measure_memory=headline,
    )


OPERATOR = Operator(
    name="masked_average_pool",
    inputs="features, mask, what is resized",
    cases=(
        _case(1, 512, (47, 63), (375, 500), level=Level.QUICK, headline=True),
        _case(8, 512, (47, 63), (375, 500), level=Level.FULL),
        _case(1, 512, (47, 63), (375, 500), "mask", level=Level.DEFAULT),
        _case(1, 256, (60, 60), (473, 473), level=Level.DEFAULT),
        _case(8, 2048, (8, 16), (128, 256), level=Level.DEFAULT),
        _case(1, 8, (2, 3), (5, 7), level=Level.QUICK, passes=(Pass.FORWARD, Pass.RECORDED, Pass.TRAINING)),
    ),
    peers=(
        Peer(OURS, _ours),
        *both_conventions(pool_upsampled, pool_under_resized_mask),
    ),
    reference=_reference,
    differentiable=(0,),
    baseline="eager",
    limit="copy",
)
