"""The criss-cross attention modules, 2-D and 3-D, single and recurrent."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from gingham.nn import (
    CrissCrossAttention,
    CrissCrossAttention3d,
    RecurrentCrissCrossAttention,
    RecurrentCrissCrossAttention3d,
)


def crosses(size: tuple[int, ...]) -> Tensor:
    """[N, N], True where two positions of a map differ in at most one coordinate."""
    positions = torch.tensor(list(itertools.product(*(range(extent) for extent in size))))
    return (positions[:, None] != positions[None]).sum(dim=-1) <= 1


def dense(attention: nn.Module, features: Tensor) -> Tensor:
    """One loop written as a full non-local block whose scores off the cross are -inf."""
    query, key, value = (
        convolution(features).flatten(2)
        for convolution in (attention.query_conv, attention.key_conv, attention.value_conv)
    )
    scores = torch.einsum("bcu,bcp->bup", query, key)
    scores = scores.masked_fill(~crosses(tuple(features.shape[2:])), float("-inf"))
    context = torch.einsum("bup,bcp->bcu", scores.softmax(dim=-1), value)
    return attention.gamma * context.reshape(features.shape) + features


def switched_on(attention: nn.Module, gamma: float = 0.7) -> nn.Module:
    """The module with a factor other than 0: at 0 every error in the attention is invisible."""
    for name, parameter in attention.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(parameter, gamma)
    return attention


def uniform(loops: int) -> RecurrentCrissCrossAttention:
    """All positions of a cross weigh the same, and values are the features."""
    attention = switched_on(RecurrentCrissCrossAttention(8, loops=loops), 1.0)
    for convolution in (attention.query_conv, attention.key_conv, attention.value_conv):
        nn.init.zeros_(convolution.weight)
        nn.init.zeros_(convolution.bias)
    nn.init.dirac_(attention.value_conv.weight)
    return attention


@pytest.mark.parametrize(
    ("loops", "expected"),
    [
        (1, [[1.5, 2.75, 4.0], [6.0, 7.25, 8.5]]),
        (2, [[5.0625, 6.625, 8.1875], [11.8125, 13.375, 14.9375]]),
    ],
)
def test_uniform_attention_gives_the_golden_values(loops: int, expected: list[list[float]]) -> None:
    features = torch.tensor([[0.0, 1, 2], [3, 4, 5]]).expand(1, 8, 2, 3)
    result = uniform(loops)(features)
    torch.testing.assert_close(result, torch.tensor(expected).expand_as(features))


@pytest.mark.parametrize("size", [(5, 6), (1, 7), (7, 1), (1, 1), (2, 2), (9, 3)])
def test_module_equals_masked_full_attention(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    attention = switched_on(CrissCrossAttention(16)).double()
    features = torch.randn(2, 16, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 16, *size, dtype=torch.float64)
    parameters = [features, *attention.parameters()]
    result, expected = attention(features), dense(attention, features)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad((result * weight).sum(), parameters)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), parameters)
    torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(3, 4, 5), (2, 5, 3), (1, 4, 3), (4, 1, 3), (4, 3, 1), (1, 1, 1)])
def test_3d_module_equals_masked_full_attention(size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    attention = switched_on(CrissCrossAttention3d(16)).double()
    features = torch.randn(2, 16, *size, dtype=torch.float64)
    torch.testing.assert_close(attention(features), dense(attention, features), rtol=0, atol=1e-12)
    frames, rows, columns = size
    assert crosses(size).sum(dim=1).unique().tolist() == [frames + rows + columns - 2]


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_3d_module_with_an_axis_of_size_one_equals_the_2d_module(axis: int) -> None:
    torch.manual_seed(0)
    flat = switched_on(CrissCrossAttention(16)).double()
    deep = switched_on(CrissCrossAttention3d(16)).double()
    deep.load_state_dict(
        {name: value.reshape(deep.state_dict()[name].shape) for name, value in flat.state_dict().items()}
    )
    features = torch.randn(2, 16, 4, 5, dtype=torch.float64)
    result = deep(features.unsqueeze(axis)).squeeze(axis)
    torch.testing.assert_close(result, flat(features), rtol=0, atol=1e-12)


def test_single_pixel_adds_its_own_value() -> None:
    torch.manual_seed(0)
    attention = switched_on(CrissCrossAttention(16), 0.7)
    features = torch.randn(3, 16, 1, 1)
    torch.testing.assert_close(attention(features), 0.7 * attention.value_conv(features) + features)


def test_untrained_module_is_the_identity_and_only_gamma_learns() -> None:
    torch.manual_seed(0)
    attention = RecurrentCrissCrossAttention(16)
    features = torch.randn(2, 16, 5, 7, requires_grad=True)
    result = attention(features)
    assert torch.equal(result, features)
    weight = torch.randn_like(result)
    (result * weight).sum().backward()
    assert torch.equal(features.grad, weight)
    for name, parameter in attention.named_parameters():
        assert bool(parameter.grad.any()) == (name == "gamma"), name


@pytest.mark.parametrize(
    "change",
    [
        lambda maps: maps.transpose(2, 3),
        lambda maps: maps.flip(2),
        lambda maps: maps.flip(3),
        lambda maps: maps[:, :, [3, 0, 4, 1, 2]],
        lambda maps: maps[:, :, :, [5, 2, 0, 6, 1, 3, 4]],
    ],
    ids=["transpose", "flip rows", "flip columns", "permute rows", "permute columns"],
)
def test_no_position_is_special(change) -> None:
    torch.manual_seed(0)
    attention = switched_on(RecurrentCrissCrossAttention(16))
    features = torch.randn(2, 16, 5, 7)
    torch.testing.assert_close(attention(change(features)), change(attention(features)), rtol=1e-6, atol=1e-6)


def test_constant_features_get_a_constant_value() -> None:
    torch.manual_seed(0)
    attention = switched_on(CrissCrossAttention(16), 0.7)
    features = torch.randn(1, 16, 1, 1).expand(1, 16, 5, 7)
    torch.testing.assert_close(attention(features), 0.7 * attention.value_conv(features) + features)


@pytest.mark.parametrize(("loops", "reached"), [(0, 1), (1, 10), (2, 30)])
def test_two_loops_reach_every_pixel(loops: int, reached: int) -> None:
    assert _reached(RecurrentCrissCrossAttention(8, loops=loops), (5, 6)) == {reached}


@pytest.mark.parametrize(("loops", "reached"), [(1, 13), (2, 60), (3, 120)])
def test_three_loops_reach_every_position_of_a_clip(loops: int, reached: int) -> None:
    assert _reached(RecurrentCrissCrossAttention3d(8, loops=loops), (4, 5, 6)) == {reached}


def _reached(attention: nn.Module, size: tuple[int, ...]) -> set[int]:
    """How many inputs the first and the last output depend on."""
    torch.manual_seed(0)
    switched_on(attention, 1.0).double()
    counts = set()
    for position in (0, -1):
        features = torch.randn(1, 8, *size, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(attention(features).flatten(2)[..., position].sum(), features)
        counts.add(int((gradient.abs().sum(dim=1) > 0).sum()))
    return counts


@pytest.mark.parametrize("size", [(3, 4), (4, 3)])
def test_gradients_to_second_order(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    attention = switched_on(CrissCrossAttention(8), 0.3).double()
    features = torch.randn(1, 8, *size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attention, features)
    assert torch.autograd.gradgradcheck(attention, features)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_memory_format_changes_nothing(layout: str) -> None:
    torch.manual_seed(0)
    attention = switched_on(RecurrentCrissCrossAttention(16))
    plain = torch.randn(2, 16, 5, 7)
    if layout == "channels_last":
        laid_out = plain.clone(memory_format=torch.channels_last)
    elif layout == "sliced":
        laid_out = torch.randn(2, 32, 10, 14)[:, ::2, ::2, ::2].copy_(plain)
    else:
        plain = plain[:1].expand(2, -1, -1, -1).contiguous()
        laid_out = plain[:1].expand(2, -1, -1, -1)
    weight = torch.randn_like(plain)
    results = []
    for features in (plain, laid_out):
        features = features.detach().requires_grad_()
        attention.zero_grad()
        result = attention(features)
        (result * weight).sum().backward()
        results.append([result, features.grad, *(parameter.grad.clone() for parameter in attention.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_module_trains_with_large_scores(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    attention = switched_on(CrissCrossAttention(512)).to(dtype)
    nn.init.constant_(attention.query_conv.bias, 60.0)  # 64 channels of 60 * 60 overflow float16
    nn.init.constant_(attention.key_conv.bias, 60.0)
    features = torch.randn(1, 512, 5, 7, dtype=dtype, requires_grad=True)
    result = attention(features)
    result.float().sum().backward()
    assert result.dtype == dtype
    assert result.isfinite().all()
    assert features.grad.isfinite().all()


def test_autocast_trains_and_keeps_the_low_precision() -> None:
    torch.manual_seed(0)
    attention = switched_on(RecurrentCrissCrossAttention(16))
    features = torch.randn(2, 16, 5, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = attention(features.bfloat16())
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), attention(features), rtol=0.05, atol=0.05)
    result.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in attention.parameters())


def test_shared_loops_have_the_weights_of_one() -> None:
    def count(attention: nn.Module) -> int:
        return sum(parameter.numel() for parameter in attention.parameters())

    assert count(RecurrentCrissCrossAttention(512, loops=1)) == 328_321
    assert count(RecurrentCrissCrossAttention(512, loops=2)) == 328_321
    assert count(RecurrentCrissCrossAttention(512, loops=2, shared=False)) == 2 * 328_321
    assert count(RecurrentCrissCrossAttention(512, loops=0)) == 0


def test_separate_loops_use_each_their_own_weights() -> None:
    torch.manual_seed(0)
    attention = switched_on(RecurrentCrissCrossAttention(16, loops=2, shared=False)).double()
    features = torch.randn(1, 16, 4, 5, dtype=torch.float64)
    expected = dense(attention.further[0], dense(attention, features))
    torch.testing.assert_close(attention(features), expected, rtol=0, atol=1e-12)


def test_shared_loops_apply_the_attention_to_its_own_result() -> None:
    torch.manual_seed(0)
    attention = switched_on(RecurrentCrissCrossAttention(16, loops=2)).double()
    features = torch.randn(1, 16, 4, 5, dtype=torch.float64)
    expected = dense(attention, dense(attention, features))
    torch.testing.assert_close(attention(features), expected, rtol=0, atol=1e-12)


def test_default_is_two_loops_and_three_in_3d() -> None:
    assert RecurrentCrissCrossAttention(8).loops == 2
    assert RecurrentCrissCrossAttention3d(8).loops == 3


def test_state_dict_has_the_official_names_and_takes_both_shapes_of_gamma() -> None:
    attention = switched_on(RecurrentCrissCrossAttention(16), 0.25)
    state = attention.state_dict()
    convolutions = [f"{name}_conv.{part}" for name in ("query", "key", "value") for part in ("weight", "bias")]
    assert sorted(state) == sorted(["gamma", *convolutions])
    assert state["gamma"].shape == (1,)
    state["gamma"] = torch.tensor(0.5)
    for fresh in (RecurrentCrissCrossAttention(16), CrissCrossAttention(16)):
        fresh.load_state_dict(state)
        assert fresh.gamma.tolist() == [0.5]
        assert torch.equal(fresh.value_conv.weight, attention.value_conv.weight)
    assert state["gamma"].shape == ()  # the caller's dictionary stays as it was


def test_sample_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    attention = switched_on(RecurrentCrissCrossAttention(16))
    features = torch.randn(3, 16, 5, 7)
    alone = torch.cat([attention(features[index : index + 1]) for index in range(3)])
    torch.testing.assert_close(attention(features), alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: CrissCrossAttention(7), "channels must be at least reduction=8, .* got 7"),
        (lambda: CrissCrossAttention3d(3, reduction=4), "channels must be at least reduction=4, .* got 3"),
        (lambda: RecurrentCrissCrossAttention(16, loops=-1), "loops must not be negative, got -1"),
        (lambda: RecurrentCrissCrossAttention(16, reduction=0), "reduction must be at least 1, got 0"),
    ],
)
def test_constructor_rejects(build, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build()


def test_features_of_another_shape_are_named() -> None:
    with pytest.raises(ValueError, match=r"features must be \[B, C, H, W\] with C=16, got shape \[2, 8, 5, 7\]"):
        CrissCrossAttention(16)(torch.zeros(2, 8, 5, 7))
    with pytest.raises(ValueError, match=r"features must be \[B, C, T, H, W\] with C=16, got shape \[2, 16, 5, 7\]"):
        CrissCrossAttention3d(16)(torch.zeros(2, 16, 5, 7))


@pytest.mark.parametrize(("loops", "gigaflops"), [(1, 8.29), (2, 16.58), (3, 24.88)])
def test_operation_count_is_the_papers(loops: int, gigaflops: float) -> None:
    assert RecurrentCrissCrossAttention(512, loops=loops).flops(97, 97) == pytest.approx(gigaflops * 1e9, rel=1e-3)


def test_memory_for_backward_does_not_hold_an_attention_map() -> None:
    attention = RecurrentCrissCrossAttention(8)
    features = torch.randn(1, 8, 24, 40, requires_grad=True)
    saved: list[int] = []

    def remember(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        attention(features)
    assert max(saved) <= features.numel()


def test_compiles_without_graph_break() -> None:
    torch.manual_seed(0)
    attention = switched_on(RecurrentCrissCrossAttention(16))
    features = torch.randn(2, 16, 5, 7)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features), attention(features))


def test_exports_with_free_batch_rows_and_columns() -> None:
    torch.manual_seed(0)
    attention = switched_on(RecurrentCrissCrossAttention(16))
    batch, rows, columns = (torch.export.Dim(name, min=1, max=64) for name in ("batch", "rows", "columns"))
    program = torch.export.export(
        attention, (torch.randn(2, 16, 5, 7),), dynamic_shapes=({0: batch, 2: rows, 3: columns},)
    )
    features = torch.randn(3, 16, 9, 4)
    torch.testing.assert_close(program.module()(features), attention(features))
