"""Exporting models without the native library: to ONNX and to other runtimes that know PyTorch's own operators."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gingham import ops, reference


def plain_decompositions() -> dict[Any, Callable[..., Any]]:
    """Decompositions that replace every operator of the package by its definition in plain PyTorch.

    For `torch.export.ExportedProgram.run_decompositions`, of a program that was exported for inference. The result
    holds PyTorch's own operators only, so ``torch.onnx.export`` needs no custom ones. It stores the attention weights
    that the native operator never does.

    Example:
        >>> from gingham.nn import RecurrentCrissCrossAttention
        >>> attention = RecurrentCrissCrossAttention(16).eval().requires_grad_(False)
        >>> program = torch.export.export(attention, (torch.randn(1, 16, 5, 7),))
        >>> plain = program.run_decompositions(plain_decompositions())
        >>> any("gingham" in str(node.target) for node in plain.graph.nodes)
        False
    """
    assert ops  # importing it registers the operators
    return {torch.ops.gingham.criss_cross_attention.default: _criss_cross_attention}


def _criss_cross_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, allow_tf32: bool = False
) -> tuple[Tensor, Tensor]:
    output = reference.criss_cross_attention(query, key, value, scale=scale)
    log_sum_exp = value.new_zeros(value.shape[0], *value.shape[2:])  # only backward reads it, which is not exported
    return output, log_sum_exp
