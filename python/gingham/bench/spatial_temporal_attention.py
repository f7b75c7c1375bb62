"""Spatial-temporal attention: its sizes, and what one would use instead of `gingham.ops`' function of the name."""

from __future__ import annotations

import torch
from torch import Tensor

from gingham.bench.definition import OURS, CannotRun, Case, Function, Level, Operator, Pass, Peer


def slice_form(features: Tensor, parts: int) -> Tensor:
    """As one writes it down, band by band, without forming the two maps.

    Energies are summed in float32: with 16 bits frames would tie that do not.
    """
    batch, _, _, height, width = features.shape
    rows = [slice(k * height // parts, (k + 1) * height // parts) for k in range(parts)]
    energy = features.float().square().sum(dim=2)  # [B, T, H, W]
    shares = torch.stack([energy[:, :, band].sum(dim=(2, 3)) for band in rows], dim=2)
    shares = shares / shares.sum(dim=2, keepdim=True)
    scores = shares / shares.sum(dim=1, keepdim=True)  # [B, T, K]
    frames = shares.argmax(dim=1)
    clips = torch.arange(batch, device=features.device)
    sums = [features[..., band, :].sum(dim=(3, 4)) for band in rows]  # of [B, T, C]
    best = torch.stack([x[clips, frames[:, k]] for k, x in enumerate(sums)]).sum(dim=0)
    every = torch.stack([(scores[:, :, k, None].to(x.dtype) * x).sum(dim=1) for k, x in enumerate(sums)]).sum(dim=0)
    return torch.cat([best, every], dim=1) / (height * width)


def band_form(features: Tensor, parts: int) -> Tensor:
    """As one writes it when K divides H: bands are an axis, and a norm takes the squares without storing them."""
    batch, length, channels, height, width = features.shape
    bands = features.reshape(batch, length, channels, parts, height // parts * width)
    sums = bands.sum(dim=4)  # [B, T, C, K]
    shares = torch.linalg.vector_norm(bands, dim=4, dtype=torch.promote_types(features.dtype, torch.float32))
    shares = shares.square().sum(dim=2)
    shares = shares / shares.sum(dim=2, keepdim=True)
    scores = shares / shares.sum(dim=1, keepdim=True)
    frames = shares.argmax(dim=1)[:, None, None].expand(batch, 1, channels, parts)
    best = sums.gather(1, frames)[:, 0].sum(dim=2)
    every = (scores.to(sums.dtype)[:, :, None] * sums).sum(dim=(1, 3))
    return torch.cat([best, every], dim=1) / (height * width)


def _ours(case: Case, device: torch.device) -> Function:
    from gingham.ops import spatial_temporal_attention

    parts = case.options["parts"]
    return lambda features: spatial_temporal_attention(features, parts)[0]


def _reference(case: Case) -> Function:
    from gingham.reference import spatial_temporal_attention

    parts = case.options["parts"]
    return lambda features: spatial_temporal_attention(features, parts)[0]


def _eager(case: Case, device: torch.device) -> Function:
    parts = case.options["parts"]
    return lambda features: slice_form(features, parts)


def _bands(case: Case, device: torch.device) -> Function:
    parts = case.options["parts"]
    if case.options["height"] % parts:
        raise CannotRun(f"{parts} parts do not divide {case.options['height']} rows")
    return lambda features: band_form(features, parts)


def _compiled(case: Case, device: torch.device) -> Function:
    parts = case.options["parts"]
    form = slice_form if case.options["height"] % parts else band_form
    compiled = torch.compile(form, dynamic=False)
    return lambda features: compiled(features, parts)


def _case(
    batch: int,
    frames: int,
    channels: int,
    height: int,
    width: int,
    parts: int,
    *,
    level: Level,
    headline: bool = False,
    passes: tuple[Pass, ...] = (Pass.FORWARD, Pass.TRAINING),
    measure_memory: bool = False,
) -> Case:
    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        # As behind a ReLU.
        return (torch.randn(batch, frames, channels, height, width, generator=generator).clamp_min(0),)

    elements = batch * frames * channels * height * width
    return Case(
        label=f"{batch}x{frames}x{channels}x{height}x{width}, {parts}",
        inputs=inputs,
        operations={Pass.FORWARD: 3 * elements, Pass.RECORDED: 3 * elements, Pass.TRAINING: 5 * elements},
        elements={Pass.FORWARD: elements, Pass.RECORDED: elements, Pass.TRAINING: 3 * elements},
        options={"parts": parts, "height": height},
        level=level,
        headline=headline,
        passes=passes,
        measure_memory=measure_memory,
    )


OPERATOR = Operator(
    name="spatial_temporal_attention",
    inputs="clips x frames x channels x height x width, parts",
    cases=(
        _case(32, 4, 2048, 16, 8, 4, level=Level.QUICK, headline=True, measure_memory=True),
        _case(1, 4, 2048, 16, 8, 4, level=Level.DEFAULT),
        _case(8, 8, 2048, 24, 8, 6, level=Level.DEFAULT),
        _case(8, 4, 2048, 7, 7, 3, level=Level.DEFAULT),
        _case(1, 64, 2048, 16, 8, 4, level=Level.FULL),
        _case(1, 2, 8, 4, 3, 2, level=Level.QUICK, passes=(Pass.FORWARD, Pass.RECORDED, Pass.TRAINING)),
    ),
    peers=(
        Peer(OURS, _ours),
        Peer("eager", _eager),
        Peer("eager, bands as an axis", _bands),
        Peer("compiled", _compiled),
    ),
    reference=_reference,
    differentiable=(0,),
    baseline="eager",
    limit="copy",
)
