"""Exported attention needs neither the native library nor custom ONNX operators."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gingham import ops
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


class Model(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


SHAPES: dict[str, list[tuple[int, ...]]] = {  # of which axis 0 is free
    "criss_cross_attention": [(3, 4, 5, 6), (3, 4, 5, 6), (3, 7, 5, 6)],
    "masked_average_pool": [(3, 4, 5, 6), (3, 1, 9, 8)],
    "cosine_similarity_map": [(3, 4, 5, 6), (3, 2, 4)],
    "masked_similarity": [(3, 4, 5, 6), (3, 2, 4, 3, 7), (3, 2, 1, 9, 8)],
    "spatial_temporal_attention": [(3, 2, 4, 9, 5)],
    "spatial_temporal_sums": [(3, 4, 9, 5)],
    "spatial_temporal_attention_from_sums": [(3, 2, 4, 6), (3, 2, 4)],
}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "criss_cross_attention": [{"scale": 0.3}],
    "masked_average_pool": [{}, {"resize": "mask"}],
    "cosine_similarity_map": [{}, {"torch_compat": True, "eps": 0.5}],
    "masked_similarity": [{}, {"resize": "mask", "torch_compat": True, "eps": 0.5}],
    "spatial_temporal_attention": [{}, {"energy": "agrl", "parts": 2, "return_map": True}],
    "spatial_temporal_sums": [{"energy": "l2"}],
    "spatial_temporal_attention_from_sums": [{"positions": 45}],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("name", "options"), [(n, o) for n, several in OPTIONS.items() for o in several], ids=str)
def test_every_operator_that_can_be_decomposed_is(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    dtype = torch.float32 if "from_sums" in name else dtype
    model = Model(lambda *tensors: getattr(ops, name)(*tensors, **options))
    tensors = tuple(torch.rand(shape).to(dtype) for shape in SHAPES[name])
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, tensors, dynamic_shapes=((*({0: batch},) * len(tensors),),))
    assert [node for node in program.graph.nodes if "gingham" in str(node.target)]
    plain = program.run_decompositions(plain_decompositions())
    assert not [node for node in plain.graph.nodes if "gingham" in str(node.target)]
    others = tuple(torch.rand(5, *shape[1:]).to(dtype) for shape in SHAPES[name])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(plain.module()(*others), model(*others), rtol=tolerance, atol=tolerance)


def test_what_cannot_be_decomposed_is_left() -> None:
    boxes = torch.tensor([[0.0, 0.0, 0.0, 3.0, 3.0]])
    query, supports, masks = torch.rand(1, 4, 5, 6), torch.rand(1, 2, 4, 3, 7), torch.rand(1, 2, 1, 9, 8)
    sizes = torch.tensor([[[3, 7, 9, 8], [2, 5, 8, 6]]])
    for function, tensors in (
        (lambda x: ops.roi_pool(x, boxes, 2), (query,)),
        (lambda x: ops.k_reciprocal_rerank(x, x), (torch.rand(9, 4),)),
        (lambda *x: ops.masked_similarity(*x, valid_sizes=sizes), (query, supports, masks)),
    ):
        program = torch.export.export(Model(function), tensors).run_decompositions(plain_decompositions())
        assert [node for node in program.graph.nodes if "gingham" in str(node.target)]
        torch.testing.assert_close(program.module()(*tensors), function(*tensors))


def test_every_operator_is_decomposed_or_known_not_to_be() -> None:
    decomposed = {operator.name().removeprefix("gingham::") for operator in plain_decompositions()}
    assert decomposed | {"roi_pool", "k_reciprocal_rerank"} == set(ops.__all__)
