"""Masked averages, the similarity of a query with them, and their gradients, written out in float64.

Interpolation is a dense matrix for each axis. Beside each result stand the sum of the absolute values of its terms and
their number, from which follows how far a result with rounded terms may be off.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor


class Quantity(NamedTuple):
    exact: Tensor
    size: Tensor  # the sum of the absolute values of what is added up
    terms: int  # how many they are, one sum after the other

    def bound(self, storage: torch.dtype, sums: torch.dtype) -> Tensor:
        """The largest error of a result of one dtype, whose sums are held in another."""
        relative = (self.terms + 32) * torch.finfo(sums).eps + 4 * torch.finfo(storage).eps
        return relative * self.size + 4 * torch.finfo(storage).smallest_normal


class Pooled(NamedTuple):
    pooled: Quantity  # [N, C]
    grad_features: Quantity  # [N, C, h, w]
    grad_mask: Quantity  # [N, 1, H, W]


class Similarity(NamedTuple):
    similarity: Quantity
    grad_query: Quantity
    grad_support: Quantity
    grad_mask: Quantity


def interpolation(from_size: int, to_size: int) -> Tensor:
    """[to_size, from_size]: bilinear, align_corners=False."""
    matrix = torch.zeros(to_size, from_size, dtype=torch.float64)
    for result in range(to_size):
        place = max(Fraction(2 * result + 1, 2) * from_size / to_size - Fraction(1, 2), Fraction(0))
        index = int(place)
        matrix[result, index] += float(1 - (place - index))
        matrix[result, min(index + 1, from_size - 1)] += float(place - index)
    return matrix


class _Masked:
    """What a mask makes of the features' positions: weights, total, and how to get back to the mask."""

    def __init__(self, features: Tensor, mask: Tensor, resize: str) -> None:
        y = mask.double().squeeze(-3)
        small, large = features.shape[-2:], y.shape[-2:]
        if resize == "features":
            self.rows, self.columns = (interpolation(s, t).T for s, t in zip(small, large, strict=True))
        else:
            self.rows, self.columns = (interpolation(t, s) for s, t in zip(small, large, strict=True))
        # A small weight is the difference of larger numbers: it is as exact as one.
        self.row_sizes, self.column_sizes = ((x > 0).double() for x in (self.rows, self.columns))
        self.weights = self.rows @ y @ self.columns.T
        self.size = self.row_sizes @ y.abs() @ self.column_sizes.T
        total = y.sum(dim=(-2, -1)) if resize == "features" else self.weights.sum(dim=(-2, -1))
        self.empty = total == 0
        self.total = total.masked_fill(self.empty, torch.inf)[..., None, None]  # what divides by it becomes zero
        # How much larger the terms of the total are than itself.
        terms = y if resize == "features" else self.rows @ y.abs() @ self.columns.T
        self.spread = (terms.abs().sum(dim=(-2, -1), keepdim=True) / self.total.abs()).clamp_min(1)
        self.terms = sum(small) + sum(large)
        self.features = features.double()

    def pool(self) -> tuple[Tensor, Tensor]:
        mean = torch.einsum("...hw,...chw->...c", self.weights / self.total, self.features)
        size = torch.einsum("...hw,...chw->...c", self.size / self.total.abs(), self.features.abs())
        return mean, (size + mean.abs()) * self.spread[..., 0]

    def gradients(self, slopes: Tensor, slopes_size: Tensor) -> tuple[Tensor, ...]:
        """Of the features and of the mask, each with the size of its terms; slopes [..., C]."""
        share, share_size = self.weights / self.total, self.size / self.total.abs() * self.spread
        products = torch.einsum("...c,...chw->...hw", slopes, self.features)
        products_size = torch.einsum("...c,...chw->...hw", slopes_size, self.features.abs())
        mean = (share * products).sum(dim=(-2, -1), keepdim=True)
        mean_size = (share_size * products_size).sum(dim=(-2, -1), keepdim=True)
        of_weights = (products - mean) / self.total
        of_weights_size = (products_size + mean_size) / self.total.abs() * self.spread
        return (
            slopes[..., None, None] * share[..., None, :, :],
            slopes_size[..., None, None] * share_size[..., None, :, :],
            (self.rows.T @ of_weights @ self.columns).unsqueeze(-3),
            (self.row_sizes.T @ of_weights_size @ self.column_sizes).unsqueeze(-3),
        )


def pooled_and_gradients(features: Tensor, mask: Tensor, grad: Tensor, resize: str) -> Pooled:
    """From [B, C, h, w], [B, 1, H, W] and [B, C]."""
    masked = _Masked(features, mask, resize)
    mean, size = masked.pool()
    grads = masked.gradients(grad.double(), grad.double().abs())
    terms = masked.terms + features[0, 0].numel()
    return Pooled(
        Quantity(mean, size, terms),
        Quantity(grads[0], grads[1], masked.terms),
        Quantity(grads[2], grads[3], terms + features.size(1)),
    )


def similarity_and_gradients(
    query: Tensor, support: Tensor, mask: Tensor, grad: Tensor, resize: str, eps: float = 1e-8
) -> Similarity:
    """From [B, C, h, w], [B, K, C, h', w'], [B, K, 1, H, W] and [B, 1, h, w]; norms up to eps count for nothing."""
    masked = _Masked(support, mask, resize)
    pooled, pooled_size = masked.pool()
    v, v_size = pooled.mean(dim=1)[..., None], pooled_size.mean(dim=1)[..., None]  # [B, C, 1]
    q, g = query.double().flatten(2), grad.double().flatten(2)  # [B, C, N], [B, 1, N]

    def inverse(x: Tensor) -> Tensor:
        norm = x.square().sum(dim=1, keepdim=True).sqrt()
        return torch.where(norm > eps, 1 / norm, 0)

    of_q, of_v = inverse(q), inverse(v)
    # How much more rounding makes of the prototype's norm than of a plain sum.
    spread = 1 + (v_size * v.abs()).sum(dim=1, keepdim=True) * of_v.square()
    s, s_size = (v * q).sum(1, True) * of_q * of_v, (v_size * q.abs()).sum(1, True) * of_q * of_v * spread
    weights = g * of_q * of_v
    grad_q = v * weights - q * of_q.square() * g * s
    grad_q_size = (v_size * weights.abs() * spread) + q.abs() * of_q.square() * g.abs() * s_size
    grad_v = (weights * q).sum(2, True) - v * of_v.square() * (g * s).sum(2, True)
    grad_v_size = (weights.abs() * q.abs()).sum(2, True) * spread
    grad_v_size = grad_v_size + v_size * of_v.square() * spread * (g.abs() * s_size).sum(2, True)
    shots = support.size(1)
    slopes, slopes_size = (x.squeeze(2)[:, None].expand(-1, shots, -1) / shots for x in (grad_v, grad_v_size))
    grads = masked.gradients(slopes, slopes_size)
    terms = masked.terms + support[0, 0, 0].numel() + 2 * query.size(1)
    more = terms + query[0, 0].numel()
    return Similarity(
        Quantity(s.reshape(grad.shape), s_size.reshape(grad.shape), terms),
        Quantity(grad_q.reshape(query.shape), grad_q_size.reshape(query.shape), terms),
        Quantity(grads[0], grads[1], more),
        Quantity(grads[2], grads[3], more + query.size(1)),
    )
