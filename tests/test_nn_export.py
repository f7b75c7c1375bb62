"""Exported attention needs neither the native library nor custom ONNX operators."""

from pathlib import Path

import pytest
import torch
from torch import nn

from gingham.nn import RecurrentCrissCrossAttention, RecurrentCrissCrossAttention3d
from gingham.nn.export import plain_decompositions

CASES = pytest.mark.parametrize(
    ("kind", "size"), [(RecurrentCrissCrossAttention, (5, 7)), (RecurrentCrissCrossAttention3d, (3, 5, 7))]
)


def attention_of(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    attention = kind(16)
    nn.init.constant_(attention.gamma, 0.7)
    return attention.eval().requires_grad_(False)


def plain_program(attention: nn.Module, size: tuple[int, ...]) -> torch.export.ExportedProgram:
    free = {axis: torch.export.Dim(f"axis{axis}", min=2, max=512) for axis in range(2, 2 + len(size))}
    free[0] = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(attention, (torch.randn(2, 16, *size),), dynamic_shapes=(free,))
    return program.run_decompositions(plain_decompositions())


@CASES
def test_decomposed_program_is_plain_pytorch_with_free_sizes(kind: type[nn.Module], size: tuple[int, ...]) -> None:
    attention = attention_of(kind)
    program = plain_program(attention, size)
    assert not [node for node in program.graph.nodes if "gingham" in str(node.target)]
    features = torch.randn(3, 16, *(extent + 2 for extent in size))
    torch.testing.assert_close(program.module()(features), attention(features), rtol=1e-5, atol=1e-5)


@CASES
def test_onnx_needs_no_custom_operator(kind: type[nn.Module], size: tuple[int, ...], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    attention = attention_of(kind)
    program = torch.onnx.export(plain_program(attention, size), (), dynamo=True, verbose=False)
    assert {node.domain for node in program.model.graph} == {""}
    program.save(tmp_path / "attention.onnx")
    session = reference.ReferenceEvaluator(str(tmp_path / "attention.onnx"))
    features = torch.randn(3, 16, *(extent + 2 for extent in size))
    (result,) = session.run(None, {session.input_names[0]: features.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), attention(features), rtol=1e-5, atol=1e-5)
