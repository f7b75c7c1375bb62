"""RoI max pooling: its sizes, and what one would use instead of `gingham.ops.roi_pool`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gingham.bench.definition import OURS, CannotRun, Case, Function, Level, Operator, Pass, Peer

BOTH = (Pass.FORWARD, Pass.TRAINING)
_SCALE = 0.25


def _reference(case: Case) -> Function:
    size = case.options["pooled"]

    def pool(features: Tensor, boxes: Tensor) -> Tensor:
        if features.is_meta:
            return features.new_empty(boxes.size(0), features.size(1), size, size)
        from gingham.reference import roi_pool

        # The edges of bins are those of the boxes' own dtype. Some boxes at a time: it keeps a copy of each bin.
        parts = boxes.split(16)
        return torch.cat([roi_pool(features, part, size, _SCALE) for part in parts])

    return pool


def _ours(case: Case, device: torch.device) -> Function:
    from gingham.ops import roi_pool

    size = case.options["pooled"]

    def pool(features: Tensor, boxes: Tensor) -> Tensor:
        return roi_pool(features, boxes, size, _SCALE)

    return pool


def _torchvision(case: Case, device: torch.device) -> Function:
    try:
        from torchvision.ops import roi_pool
    except ImportError:
        raise CannotRun("torchvision is not installed") from None
    size = case.options["pooled"]

    def pool(features: Tensor, boxes: Tensor) -> Tensor:
        if features.dtype in (torch.float32, torch.float64):
            result: Tensor = roi_pool(features, boxes.to(features.dtype), size, _SCALE)
            return result
        # Its kernels take float32 and float64 only.
        widened: Tensor = roi_pool(features.float(), boxes, size, _SCALE)
        return widened.to(features.dtype)

    return pool


def _compiled(case: Case, device: torch.device) -> Function:
    compiled: Function = torch.compile(_torchvision(case, device), dynamic=False)
    return compiled


def _case(
    boxes: int,
    channels: int,
    height: int,
    width: int,
    pooled: int,
    *,
    level: Level,
    headline: bool = False,
    passes: tuple[Pass, ...] = BOTH,
    measure_memory: bool = False,
) -> Case:
    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        features = torch.randn(1, channels, height, width, generator=generator).relu()
        # Sides from a twentieth to two thirds of the image's, evenly spread over the scale of their logarithms.
        extent = torch.tensor([width, height]) / _SCALE
        sides = extent * torch.exp(torch.empty(boxes, 2).uniform_(math.log(0.05), math.log(0.67), generator=generator))
        corners = (extent - sides) * torch.rand(boxes, 2, generator=generator)
        return features, torch.cat([torch.zeros(boxes, 1), corners, corners + sides], dim=1)

    pixels, outputs = channels * height * width, boxes * channels * pooled * pooled
    area = boxes * channels * height * width * 0.06  # of the boxes: a comparison for each of their pixels
    return Case(
        label=f"{boxes}, {channels}x{height}x{width}, {pooled}x{pooled}",
        inputs=inputs,
        operations={Pass.FORWARD: area, Pass.RECORDED: area, Pass.TRAINING: 2 * area},
        elements={
            Pass.FORWARD: pixels + outputs,
            Pass.RECORDED: pixels + outputs,
            Pass.TRAINING: 3 * pixels + 2 * outputs,
        },
        options={"pooled": pooled},
        level=level,
        headline=headline,
        passes=passes,
        measure_memory=measure_memory,
        keep_dtype=(1,),
        longest_call=30.0,
    )


OPERATOR = Operator(
    name="roi_pool",
    inputs="boxes, channels x height x width, pooled",
    cases=(
        _case(300, 256, 200, 336, 7, level=Level.QUICK, headline=True, measure_memory=True),
        _case(60, 256, 200, 336, 56, level=Level.DEFAULT, headline=True, measure_memory=True),
        _case(300, 256, 200, 336, 56, level=Level.FULL),
        _case(300, 256, 50, 84, 14, level=Level.DEFAULT),
        _case(2, 8, 9, 11, 2, level=Level.QUICK, passes=(Pass.FORWARD, Pass.RECORDED, Pass.TRAINING)),
    ),
    peers=(Peer(OURS, _ours), Peer("torchvision", _torchvision), Peer("compiled", _compiled)),
    reference=_reference,
    differentiable=(0,),
    baseline="torchvision",
    limit="copy",
)
