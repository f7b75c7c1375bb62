"""Forward-mode differentiation: no operator has it, and each says so instead of returning a tangent of zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from gingham import ops, reference

MAPS, MASKS = torch.rand(2, 3, 4, 5), torch.ones(2, 1, 4, 5)
CLIPS, SUMS = torch.rand(2, 2, 3, 4, 5), torch.rand(2, 3, 4, 6)
VECTORS, BOXES = torch.rand(2, 2, 3), torch.tensor([[0.0, 0.0, 0.0, 3.0, 3.0]])

# Each operator as a function of one tensor, from the module that holds it.
CALLS: dict[str, tuple[Callable[[Any, Tensor], Any], Tensor]] = {
    "criss_cross_attention query": (lambda m, x: m.criss_cross_attention(x, MAPS, MAPS), MAPS),
    "criss_cross_attention value": (lambda m, x: m.criss_cross_attention(MAPS, MAPS, x), MAPS),
    "masked_average_pool features": (lambda m, x: m.masked_average_pool(x, MASKS), MAPS),
    "masked_average_pool mask": (lambda m, x: m.masked_average_pool(MAPS, x), MASKS),
    "cosine_similarity_map": (lambda m, x: m.cosine_similarity_map(x, VECTORS), MAPS),
    "masked_similarity": (lambda m, x: m.masked_similarity(x, MAPS[:, None], MASKS[:, None]), MAPS),
    "roi_pool": (lambda m, x: m.roi_pool(x, BOXES, 2), MAPS),
    "spatial_temporal_attention": (lambda m, x: m.spatial_temporal_attention(x, 2)[0], CLIPS),
    "spatial_temporal_attention map": (lambda m, x: m.spatial_temporal_attention(x, 2, return_map=True)[3], CLIPS),
    "spatial_temporal_sums": (lambda m, x: m.spatial_temporal_sums(x, 2)[0], MAPS),
    "spatial_temporal_attention_from_sums": (
        lambda m, x: m.spatial_temporal_attention_from_sums(x, SUMS[..., 0], 8)[0],
        SUMS,
    ),
}
EVERY_CALL = pytest.mark.parametrize("name", CALLS)


def refuses(name: str) -> Any:
    operator = name.partition(" ")[0]
    return pytest.raises(NotImplementedError, match=rf"^{operator}: forward-mode .* gingham\.reference\.{operator},")


def test_every_operator_with_gradients_is_here() -> None:
    assert {name.partition(" ")[0] for name in CALLS} == set(ops.__all__) - {"k_reciprocal_rerank"}


@EVERY_CALL
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("grad_enabled", [False, True])
def test_dual_tensors_are_refused(name: str, requires_grad: bool, grad_enabled: bool) -> None:
    call, x = CALLS[name]
    with forward_ad.dual_level(), torch.set_grad_enabled(grad_enabled):
        dual = forward_ad.make_dual(x.clone().requires_grad_(requires_grad), torch.ones_like(x))
        with refuses(name):
            call(ops, dual)


@EVERY_CALL
def test_tensors_without_a_tangent_are_taken_beside_dual_ones(name: str) -> None:
    call, x = CALLS[name]
    expected = call(ops, x)
    with forward_ad.dual_level():
        assert torch.equal(call(ops, x), expected)
        x = x.clone().requires_grad_()
        result = call(ops, x)
        torch.autograd.grad(result, x, torch.ones_like(result))


@EVERY_CALL
def test_dual_gradients_are_refused(name: str) -> None:
    call, x = CALLS[name]
    x = x.clone().requires_grad_()
    result = call(ops, x)
    with forward_ad.dual_level(), refuses(name):
        ones = torch.ones_like(result)
        torch.autograd.grad(result, x, forward_ad.make_dual(ones, ones))


@EVERY_CALL
def test_transforms_are_refused(name: str) -> None:
    call, x = CALLS[name]
    with refuses(name):
        torch.func.jvp(lambda x: call(ops, x), (x,), (torch.ones_like(x),))
    with refuses(name):
        torch.func.jacfwd(lambda x: call(ops, x))(x)
    with refuses(name):
        torch.func.hessian(lambda x: call(ops, x).sum())(x)


@EVERY_CALL
@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_transforms_are_refused(name: str, fullgraph: bool) -> None:
    call, x = CALLS[name]
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: torch.func.jvp(lambda x: call(ops, x), (x,), (torch.ones_like(x),))[1],
        backend="eager",
        fullgraph=fullgraph,
    )
    with pytest.raises(RuntimeError, match="forward-mode"):  # of its own or of the compiler's type
        compiled(x)


@EVERY_CALL
def test_the_reference_that_is_recommended_has_both_modes(name: str) -> None:
    call, x = CALLS[name]
    x, tangent = x.double(), torch.rand_like(x, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        for other in ("MAPS", "MASKS", "VECTORS", "SUMS", "BOXES"):
            patch.setitem(globals(), other, globals()[other].double())
        result, forward = torch.func.jvp(lambda x: call(reference, x), (x,), (tangent,))
        weights = torch.rand_like(result)
        (gradient,) = torch.func.vjp(lambda x: call(reference, x), x)[1](weights)
    torch.testing.assert_close((forward * weights).sum(), (gradient * tangent).sum())
    assert forward.any()
