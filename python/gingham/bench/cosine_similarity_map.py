"""Cosines of pixels with prototypes: their sizes, and what one would use instead of `gingham.ops`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gingham.bench.definition import OURS, Case, Function, Level, Operator, Pass, Peer

EVERY = (Pass.FORWARD, Pass.RECORDED, Pass.TRAINING)


def einsum_form(features: Tensor, prototypes: Tensor) -> Tensor:
    """A product of directions: normalised copies of both are stored."""
    return torch.einsum("bchw,bpc->bphw", F.normalize(features, dim=1), F.normalize(prototypes, dim=2))


def broadcast_form(features: Tensor, prototypes: Tensor) -> Tensor:
    """PyTorch's own function, which goes through [B, P, C, H, W]."""
    return F.cosine_similarity(features[:, None], prototypes[..., None, None], dim=2)


def _reference(features: Tensor, prototypes: Tensor) -> Tensor:
    from gingham.reference import cosine_similarity_map

    return cosine_similarity_map(features, prototypes)


def _ours(case: Case, device: torch.device) -> Function:
    from gingham.ops import cosine_similarity_map

    return cosine_similarity_map


def _eager(case: Case, device: torch.device) -> Function:
    return einsum_form


def _compiled(case: Case, device: torch.device) -> Function:
    compiled: Function = torch.compile(einsum_form, dynamic=False)
    return compiled


def _broadcast(case: Case, device: torch.device) -> Function:
    return broadcast_form


def _broadcast_compiled(case: Case, device: torch.device) -> Function:
    compiled: Function = torch.compile(broadcast_form, dynamic=False)
    return compiled


def _broadcast_memory(case: Case, direction: Pass) -> float:
    maps = 6 if direction is Pass.TRAINING else 3  # of every channel of every pixel for every prototype
    return 4.0 * maps * float(case.options["products"])


def _case(
    batch: int,
    channels: int,
    height: int,
    width: int,
    prototypes: int,
    *,
    level: Level,
    headline: bool = False,
    passes: tuple[Pass, ...] = (Pass.FORWARD, Pass.TRAINING),
    measure_memory: bool = False,
) -> Case:
    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        features = torch.randn(batch, channels, height, width, generator=generator)
        return features, torch.randn(batch, prototypes, channels, generator=generator)

    pixels = batch * height * width
    products = pixels * channels * prototypes
    forward = 2 * products + 2 * pixels * channels  # the norms
    backward = 4 * products + 2 * pixels * channels
    maps = pixels * (channels + prototypes)
    gradients = pixels * (2 * channels + 2 * prototypes)  # features read again, their gradient written
    return Case(
        label=f"{batch}x{channels}x{height}x{width}, {prototypes}",
        inputs=inputs,
        operations={Pass.FORWARD: forward, Pass.RECORDED: forward, Pass.TRAINING: forward + backward},
        elements={Pass.FORWARD: maps, Pass.RECORDED: maps, Pass.TRAINING: maps + gradients},
        options={"products": products},
        level=level,
        headline=headline,
        passes=passes,
        measure_memory=measure_memory,
    )


OPERATOR = Operator(
    name="cosine_similarity_map",
    inputs="batch x channels x height x width, prototypes",
    cases=(
        _case(1, 512, 47, 63, 1, level=Level.QUICK, headline=True, measure_memory=True),
        _case(1, 512, 47, 63, 5, level=Level.DEFAULT),
        _case(1, 512, 47, 63, 21, level=Level.DEFAULT, headline=True),
        _case(1, 512, 47, 63, 128, level=Level.DEFAULT),
        _case(1, 512, 47, 63, 512, level=Level.FULL),
        _case(8, 256, 60, 60, 2, level=Level.DEFAULT),
        _case(8, 256, 129, 129, 21, level=Level.FULL),
        _case(1, 8, 2, 3, 1, level=Level.QUICK, passes=EVERY),
    ),
    peers=(
        Peer(OURS, _ours),
        Peer("normalize, einsum", _eager),
        Peer("einsum, compiled", _compiled),
        Peer("F.cosine_similarity", _broadcast, memory=_broadcast_memory),
        Peer("F.cosine, compiled", _broadcast_compiled, memory=_broadcast_memory),
    ),
    reference=lambda case: _reference,
    differentiable=(0, 1),
    baseline="normalize, einsum",
    limit="copy",
)
