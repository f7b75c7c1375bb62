"""Criss-cross attention as full attention over all N = T H W positions whose off-cross logits are -inf, in float64.

The gradients are written out rather than differentiated, so that beside each sum stands the sum of its absolute terms,
the size that its rounding errors are relative to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Quantity(NamedTuple):
    """A tensor of the operator, and the sizes of what is added up in it."""

    exact: Tensor
    size: Tensor  # what a relative error of its terms is relative to
    logit_size: Tensor  # what an error relative to the logits is relative to


class Attention(NamedTuple):
    output: Quantity
    grad_query: Quantity
    grad_key: Quantity
    grad_value: Quantity


def crosses(size: tuple[int, ...]) -> Tensor:
    """[N, N]: True where two positions of a map differ in at most one coordinate."""
    grid = torch.meshgrid(*(torch.arange(extent) for extent in size), indexing="ij")
    differing = sum((axis.reshape(-1, 1) != axis.reshape(1, -1)).long() for axis in grid)
    return torch.as_tensor(differing) <= 1


def dense_weights(query: Tensor, key: Tensor, scale: float = 1.0) -> Tensor:
    """[B, N, N]: what position u (second axis) gives to position p (third)."""
    q, k = query.double().flatten(2), key.double().flatten(2)
    logits = scale * torch.einsum("bcu,bcp->bup", q, k)
    return logits.masked_fill(~crosses(tuple(query.shape[2:])), float("-inf")).softmax(dim=-1)


def dense_attention(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
    """[B, Cv, *S] in float64, differentiable."""
    weights = dense_weights(query, key, scale)
    return torch.einsum("bup,bcp->bcu", weights, value.double().flatten(2)).reshape(value.shape)


def dense_attention_and_gradients(
    query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, scale: float = 1.0
) -> Attention:
    """Output and the three gradients, on the CPU."""
    q, k, v, d_out = (x.detach().cpu().double().flatten(2) for x in (query, key, value, grad_output))
    weights = dense_weights(query.detach().cpu(), key.detach().cpu(), scale)
    d_weights = torch.einsum("bcu,bcp->bup", d_out, v)
    delta = (weights * d_weights).sum(dim=-1, keepdim=True)
    d_logits = scale * weights * (d_weights - delta)

    # The same with every term made positive.
    logit_size = abs(scale) * torch.einsum("bcu,bcp->bup", q.abs(), k.abs())
    largest = (
        (logit_size * crosses(tuple(query.shape[2:]))).amax(dim=-1, keepdim=True) if logit_size.numel() else logit_size
    )
    d_weights_size = torch.einsum("bcu,bcp->bup", d_out.abs(), v.abs())
    delta_size = (weights * d_weights_size).sum(dim=-1, keepdim=True)
    d_logits_size = abs(scale) * weights * (d_weights_size + delta_size)

    def quantity(equation: str, matrix: Tensor, matrix_size: Tensor, operand: Tensor, like: Tensor) -> Quantity:
        exact = torch.einsum(equation, matrix, operand)
        size = torch.einsum(equation, matrix_size, operand.abs())
        by_logits = torch.einsum(equation, matrix_size * largest, operand.abs())
        return Quantity(*(x.reshape(like.shape) for x in (exact, size, by_logits)))

    return Attention(
        output=quantity("bup,bcp->bcu", weights, weights, v, value),
        grad_query=quantity("bup,bcp->bcu", d_logits, d_logits_size, k, query),
        grad_key=quantity("bup,bcu->bcp", d_logits, d_logits_size, q, key),
        grad_value=quantity("bup,bcu->bcp", weights, weights, d_out, value),
    )
