"""Criss-cross attention: its sizes, and what one would use instead of `gingham.ops.criss_cross_attention`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gingham.bench.definition import OURS, Case, Function, Level, Operator, Pass, Peer

BOTH = (Pass.FORWARD, Pass.TRAINING)


def einsum_form(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The padded form that PyTorch code bases use.

    A pixel has H + W scores; its own is masked out of the column block, so that it counts once.
    """
    height = query.shape[2]
    diagonal = torch.zeros(height, height, dtype=query.dtype, device=query.device).fill_diagonal_(-math.inf)
    column = torch.einsum("bchw,bciw->bhwi", query, key) + diagonal[None, :, None, :]
    row = torch.einsum("bchw,bchj->bhwj", query, key)
    attention = torch.cat([column, row], dim=-1).softmax(dim=-1)
    column, row = attention[..., :height], attention[..., height:]
    return torch.einsum("bciw,bhwi->bchw", value, column) + torch.einsum("bchj,bhwj->bchw", value, row)


def _reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from gingham.reference import criss_cross_attention

    result: Tensor = criss_cross_attention(query, key, value)
    return result


def _ours(case: Case, device: torch.device) -> Function:
    from gingham.ops import criss_cross_attention

    function: Function = criss_cross_attention
    return function


def _eager(case: Case, device: torch.device) -> Function:
    return einsum_form


def _compiled(case: Case, device: torch.device) -> Function:
    compiled: Function = torch.compile(einsum_form, dynamic=False)
    return compiled


def _as_tokens(features: Tensor) -> Tensor:
    return features.flatten(2).transpose(1, 2)[:, None]  # [B,1,N,C]


def _as_map(tokens: Tensor, height: int) -> Tensor:
    channels_first = tokens[:, 0].transpose(1, 2)  # [B,C,N]
    return channels_first.reshape(*channels_first.shape[:2], height, -1)


def _masked_attention(case: Case, device: torch.device) -> Function:
    height, width = case.options["size"]
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    mask = (rows[:, None] == rows) | (columns[:, None] == columns)  # [N,N]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = _as_tokens(query), _as_tokens(key), _as_tokens(value)
        return _as_map(F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0), height)

    return attend


def _full_attention(case: Case, device: torch.device) -> Function:
    height, _ = case.options["size"]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = _as_tokens(query), _as_tokens(key), _as_tokens(value)
        return _as_map(F.scaled_dot_product_attention(query, key, value, scale=1.0), height)

    return attend


def _flex_attention(case: Case, device: torch.device) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    height, width = case.options["size"]
    positions = height * width

    def reaches(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        on_cross: Tensor = (query // width == key // width) | (query % width == key % width)
        return on_cross

    mask = create_block_mask(reaches, None, None, positions, positions, device=str(device))
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = _as_tokens(query), _as_tokens(key), _as_tokens(value)
        return _as_map(compiled(query, key, value, block_mask=mask, scale=1.0), height)

    return attend


def _sizes(case: Case) -> tuple[int, int, int]:
    return case.options["batch"], math.prod(case.options["size"]), sum(case.options["channels"])


def _full_operations(case: Case, direction: Pass) -> float:
    batch, positions, channels = _sizes(case)
    # Measured, the full map runs at about half the rate of a matrix product.
    return (3.0 if direction is Pass.TRAINING else 1.0) * 2 * 2 * batch * positions**2 * channels


def _full_memory(case: Case, direction: Pass) -> float:
    batch, positions, _ = _sizes(case)
    maps = 6 if direction is Pass.TRAINING else 3  # scores, probabilities, mask; their gradients
    return 4.0 * maps * batch * positions**2


def _case(
    batch: int,
    key_channels: int,
    value_channels: int,
    height: int,
    width: int,
    *,
    level: Level,
    headline: bool = False,
    passes: tuple[Pass, ...] = BOTH,
    measure_memory: bool = False,
) -> Case:
    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        query = torch.randn(batch, key_channels, height, width, generator=generator)
        key = torch.randn(batch, key_channels, height, width, generator=generator)
        value = torch.randn(batch, value_channels, height, width, generator=generator)
        # Scores of unit variance, as trained networks have them; with larger ones a softmax is close to one-hot.
        return query / math.sqrt(key_channels), key, value

    positions, cross = batch * height * width, height + width - 1
    forward = 2 * positions * cross * (key_channels + value_channels)
    # Backward: the scores again, dQ, dK; and the gradient of the probabilities, dV.
    backward = 2 * positions * cross * (3 * key_channels + 2 * value_channels)
    maps = positions * (2 * key_channels + 2 * value_channels)  # query, key, value, output
    gradients = positions * (4 * key_channels + 4 * value_channels)  # those read again, grad_output read, three written
    return Case(
        label=f"{batch}x{height}x{width}, {key_channels}/{value_channels}",
        inputs=inputs,
        operations={Pass.FORWARD: forward, Pass.RECORDED: forward, Pass.TRAINING: forward + backward},
        elements={Pass.FORWARD: maps, Pass.RECORDED: maps, Pass.TRAINING: maps + gradients},
        options={"batch": batch, "size": (height, width), "channels": (key_channels, value_channels)},
        level=level,
        headline=headline,
        passes=passes,
        measure_memory=measure_memory,
    )


OPERATOR = Operator(
    name="criss_cross_attention",
    inputs="batch x height x width, key/value channels",
    cases=(
        _case(1, 64, 512, 97, 97, level=Level.QUICK, headline=True, measure_memory=True),
        _case(8, 64, 512, 97, 97, level=Level.DEFAULT, measure_memory=True),
        _case(1, 64, 512, 129, 257, level=Level.DEFAULT),
        _case(8, 64, 512, 129, 257, level=Level.FULL),
        _case(1, 64, 512, 31, 33, level=Level.DEFAULT),
        _case(8, 64, 512, 31, 33, level=Level.FULL),
        _case(1, 64, 512, 16, 16, level=Level.FULL),
        _case(8, 64, 512, 16, 16, level=Level.FULL),
        _case(1, 8, 8, 2, 3, level=Level.QUICK, passes=(Pass.FORWARD, Pass.RECORDED, Pass.TRAINING)),
    ),
    peers=(
        Peer(OURS, _ours),
        Peer("eager", _eager),
        Peer("compiled", _compiled),
        Peer("SDPA, masked", _masked_attention, operations=_full_operations, memory=_full_memory),
        Peer("FlexAttention", _flex_attention, operations=_full_operations),
        Peer("non-local", _full_attention, same_result=False, operations=_full_operations, memory=_full_memory),
    ),
    reference=lambda case: _reference,
    differentiable=(0, 1, 2),
    baseline="eager",
)
