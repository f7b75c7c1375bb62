"""The cosines of pixels with prototypes and their gradients, written out in float64.

Beside each result stand the sum of the absolute values of its terms and their number, from which follows how far a
result with rounded terms may be off.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Quantity(NamedTuple):
    exact: Tensor
    size: Tensor  # the sum of the absolute values of what is added up
    terms: int  # how many they are, one sum after the other

    def bound(self, dtype: torch.dtype) -> Tensor:
        """The largest error of a result in that dtype whose sums are held in float32, or float64 for float64."""
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        relative = (self.terms + 8) * torch.finfo(sums).eps + 2 * torch.finfo(dtype).eps
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        return relative * self.size + 2 * smallest


class Cosines(NamedTuple):
    output: Quantity
    grad_features: Quantity
    grad_prototypes: Quantity


def _inverses(norms: Tensor, eps: float, torch_compat: bool) -> tuple[Tensor, Tensor]:
    """What a vector is multiplied by to become a direction, and what its part along itself is in the gradient."""
    if torch_compat:
        inverse = 1 / norms.clamp_min(eps)
        return inverse, torch.where(norms > 0, inverse / norms, 0)
    above = norms > eps
    return torch.where(above, 1 / norms, 0), torch.where(above, 1 / norms.square(), 0)


def cosines_and_gradients(
    features: Tensor, prototypes: Tensor, grad_output: Tensor, *, eps: float = 1e-8, torch_compat: bool = False
) -> Cosines:
    """From [B, C, H, W], [B, P, C] and [B, P, H, W]."""
    size = features.shape
    q, v, g = features.double().flatten(2), prototypes.double(), grad_output.double().flatten(2)
    channels, pixels, count = q.shape[1], q.shape[2], v.shape[1]
    of_q, along_q = _inverses(q.square().sum(dim=1, keepdim=True).sqrt(), eps, torch_compat)  # [B, 1, N]
    of_v, along_v = _inverses(v.square().sum(dim=2, keepdim=True).sqrt(), eps, torch_compat)  # [B, P, 1]
    output, output_size = (v @ q) * of_v * of_q, (v.abs() @ q.abs()) * of_v * of_q
    weights = g * of_q * of_v  # [B, P, N]
    grad_q = v.mT @ weights - q * along_q * (g * output).sum(dim=1, keepdim=True)
    grad_q_size = v.abs().mT @ weights.abs() + q.abs() * along_q * (g.abs() * output_size).sum(dim=1, keepdim=True)
    grad_v = weights @ q.mT - v * along_v * (g * output).sum(dim=2, keepdim=True)
    grad_v_size = weights.abs() @ q.abs().mT + v.abs() * along_v * (g.abs() * output_size).sum(dim=2, keepdim=True)
    return Cosines(
        Quantity(output.reshape(size[0], count, *size[2:]), output_size.reshape(size[0], count, *size[2:]), channels),
        Quantity(grad_q.reshape(size), grad_q_size.reshape(size), channels + count),
        Quantity(grad_v, grad_v_size, channels + pixels),
    )
