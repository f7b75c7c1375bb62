"""torch.ops.gingham.k_reciprocal_rerank, the function on top of it and the one on arrays, against sets in float64."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gingham import info, reference
from gingham.array import k_reciprocal_rerank as array_rerank
from gingham.bench.k_reciprocal_rerank import numpy_form
from gingham.ops import k_reciprocal_rerank
from oracles.conditions import kernels_of, run_python, threads
from oracles.k_reciprocal import rerank

Features = tuple[Tensor, Tensor]

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
operator = torch.ops.gingham.k_reciprocal_rerank.default


def bound_of(dtype: torch.dtype, features: int) -> float:
    """Roundings of a sum over the features, which add up like a random walk, and of the few sums behind it."""
    return 4 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps * (8 + math.sqrt(features))


def assert_is(got: Tensor, expected: Tensor, dtype: torch.dtype, features: int, undecided: float = 0.0) -> None:
    """Compares elementwise but for a share of the elements, where near ties may be decided by rounding."""
    assert got.shape == expected.shape
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    error = (got.cpu().double() - expected.cpu().double()).abs()
    assert not bool(error.isnan().any())
    wrong = error > bound_of(dtype, features)
    assert int(wrong.sum()) <= undecided * wrong.numel(), f"{int(wrong.sum())} wrong, by up to {float(error.max())}"


def oracle(query: Tensor, gallery: Tensor, k1: int = 20, k2: int = 6, lambda_value: float = 0.3) -> Tensor:
    return torch.from_numpy(rerank(query.cpu().double().numpy(), gallery.cpu().double().numpy(), k1, k2, lambda_value))


def clustered(
    queries: int, gallery: int, features: int, *, dtype: torch.dtype = torch.float32, seed: int = 0, people: int = 0
) -> Features:
    """Noisy copies of a few directions, of length 1."""
    generator = torch.Generator().manual_seed(seed)
    count = queries + gallery
    centres = torch.randn(people or max(1, count // 12), features, generator=generator)
    drawn = centres[torch.randint(len(centres), (count,), generator=generator)]
    drawn = drawn + torch.randn(count, features, generator=generator)
    drawn = (drawn / drawn.norm(dim=1, keepdim=True)).to(dtype)
    return drawn[:queries].clone(), drawn[queries:].clone()


def whole_numbers(queries: int, gallery: int, features: int, seed: int) -> Features:
    """Features for which every distance is exact in every dtype, with many ties: small whole numbers of mean zero."""
    generator = torch.Generator().manual_seed(seed)
    count = queries + gallery
    half = torch.randint(-3, 4, (count // 2, features), generator=generator)
    drawn = torch.cat([half, -half])[torch.randperm(count, generator=generator)].float()
    return drawn[:queries].clone(), drawn[queries:].clone()


def toy() -> Features:
    random = np.random.RandomState(0)
    people = np.repeat(np.arange(8), 6)
    drawn = random.randn(8, 16)[people] + 0.8 * random.randn(48, 16)
    drawn = torch.from_numpy(drawn / np.linalg.norm(drawn, axis=1, keepdims=True))
    is_query = torch.arange(48) % 6 == 0
    return drawn[is_query], drawn[~is_query]


def mean_average_precision(distances: Tensor, query_people: Tensor, gallery_people: Tensor) -> float:
    precisions = []
    for row, person in zip(distances, query_people, strict=True):
        found = (gallery_people[row.argsort(stable=True)] == person).double()
        at = found.cumsum(0) / torch.arange(1, len(found) + 1)
        precisions.append(float((at * found).sum() / found.sum()))
    return sum(precisions) / len(precisions)


# ------------------------------------------------------------------------------------------------ golden values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [k_reciprocal_rerank, reference.k_reciprocal_rerank])
def test_gives_the_golden_values(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    query, gallery = (x.to(dtype) for x in toy())
    final = function(query, gallery, k1=6, k2=3, lambda_value=0.3)
    golden = torch.tensor([0.069588, 0.137022, 0.112769, 0.102237, 0.098913, 0.930816], dtype=dtype)
    torch.testing.assert_close(final[0, :6], golden, rtol=0, atol=1e-6)
    assert float(final.mean()) == pytest.approx(0.809717, abs=1e-6)
    people = torch.arange(8)
    before = torch.cdist(query, gallery)
    assert mean_average_precision(before, people, people.repeat_interleave(5)) == pytest.approx(0.954583, abs=1e-6)
    assert mean_average_precision(final, people, people.repeat_interleave(5)) == pytest.approx(0.975649, abs=1e-6)
    assert bool((final.argmin(dim=1) // 5 == people).all())


def test_gives_the_golden_weights_of_pseudo_labels() -> None:
    labelled, unlabelled = toy()
    distances = k_reciprocal_rerank(unlabelled, labelled)
    golden = [0.043708, 0.835146, 0.795446, 0.760281, 0.790590, 0.683511, 0.494308, 0.472850]
    torch.testing.assert_close(distances[0], torch.tensor(golden, dtype=torch.float64), rtol=0, atol=1e-6)
    nearest, label = distances.min(dim=1)
    weights = 1 - nearest / distances.amax(dim=0)[label]
    first = torch.tensor([0.949198, 0.925967, 0.913019, 0.913480, 0.961641], dtype=torch.float64)
    torch.testing.assert_close(weights[:5], first, rtol=0, atol=1e-6)
    for got, expected in ((weights.min(), 0.473511), (weights.max(), 0.980611), (weights.mean(), 0.852078)):
        assert float(got) == pytest.approx(expected, abs=1e-6)
    assert float((label == torch.arange(8).repeat_interleave(5)).double().mean()) == 0.925


# ------------------------------------------------------------------------------------------------ the oracle


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def sliced(x: Tensor) -> Tensor:
    room = x.new_full((x.size(0) + 3, x.size(1) + 5), math.nan)
    return room[1 : 1 + x.size(0), 2 : 2 + x.size(1)].copy_(x)


def features_apart(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


def every_other_feature(x: Tensor) -> Tensor:
    return x.new_full((x.size(0), 2 * x.size(1) + 1), math.nan)[:, 1::2].copy_(x)


def one_row(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


LAYOUTS = [contiguous, sliced, features_apart, every_other_feature, one_row]


@settings(max_examples=150)
@given(st.data())
def test_agrees_with_the_oracle_whatever_the_arguments(data: st.DataObject) -> None:
    count = 2 * data.draw(st.integers(1, 40), label="pairs")
    queries = data.draw(st.integers(1, count - 1), label="queries")
    features = data.draw(st.integers(1, 40), label="features")
    dtype = data.draw(st.sampled_from(DTYPES))
    options = {
        "k1": data.draw(st.integers(1, 30), label="k1"),
        "k2": data.draw(st.integers(1, 12), label="k2"),
        "lambda_value": data.draw(st.sampled_from([0.0, 0.3, 1.0, 0.77]), label="lambda_value"),
    }
    exact = whole_numbers(queries, count - queries, features, data.draw(st.integers(0, 10**6), label="seed"))
    layouts = [data.draw(st.sampled_from(LAYOUTS[:-1])) for _ in exact]
    query, gallery = (layout(x.to(dtype)) for layout, x in zip(layouts, exact, strict=True))
    expected = oracle(*exact, **options)
    with threads(data.draw(st.integers(1, 3), label="threads")):
        assert_is(k_reciprocal_rerank(query, gallery, **options), expected, dtype, features)


@settings(max_examples=40)
@given(st.data())
def test_the_definition_agrees_with_the_oracle(data: st.DataObject) -> None:
    count = 2 * data.draw(st.integers(1, 20), label="pairs")
    queries = data.draw(st.integers(1, count - 1), label="queries")
    query, gallery = whole_numbers(queries, count - queries, 5, data.draw(st.integers(0, 10**6), label="seed"))
    options = {"k1": data.draw(st.integers(1, 30), label="k1"), "k2": data.draw(st.integers(1, 12), label="k2")}
    assert_is(
        reference.k_reciprocal_rerank(query.double(), gallery.double(), **options),
        oracle(query, gallery, **options),
        torch.float64,
        5,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("queries", "gallery", "features", "k1", "k2"),
    [
        (100, 1450, 130, 20, 6),  # several strips, the border of queries and gallery within one
        (700, 500, 33, 20, 6),  # more queries than a strip holds
        (1100, 40, 16, 7, 3),  # ... than a task takes at a time
        (40, 900, 300, 3, 1),  # more features than a panel
        (12, 320, 9000, 20, 6),  # narrow strips
        (30, 600, 48, 90, 40),  # k2 beyond what one register or one list would hold
        (30, 600, 48, 2, 25),  # more averaged than compared
        (3, 500, 5, 499, 6),  # all are neighbours
    ],
)
def test_agrees_with_the_definition_on_many_items(
    queries: int, gallery: int, features: int, k1: int, k2: int, dtype: torch.dtype
) -> None:
    query, gallery_features = clustered(queries, gallery, features, dtype=dtype)
    with threads(2):
        got = k_reciprocal_rerank(query, gallery_features, k1, k2)
    expected = reference.k_reciprocal_rerank(query.double(), gallery_features.double(), k1, k2)
    # Among thousands of distances some are equal in 16 bits, or nearly so.
    undecided = {torch.float64: 0.0, torch.float32: 0.002, torch.float16: 0.01, torch.bfloat16: 0.05}[dtype]
    assert_is(got, expected, dtype, features, undecided)


def test_the_numpy_form_of_the_benchmark_agrees_with_the_oracle() -> None:
    query, gallery = (x.numpy() for x in clustered(10, 90, 20, dtype=torch.float64))
    got = numpy_form(query, gallery, 7, 4, 0.3)
    np.testing.assert_allclose(got, rerank(query, gallery, 7, 4, 0.3), rtol=0, atol=1e-13)


# ------------------------------------------------------------------------------------------------ properties


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_jaccard_distances_are_symmetric_between_nothing_and_one(dtype: torch.dtype) -> None:
    query, gallery = clustered(20, 300, 32, dtype=dtype)
    jaccard = k_reciprocal_rerank(query, gallery, lambda_value=0.0)
    assert float(jaccard.min()) >= 0
    assert float(jaccard.max()) <= 1
    assert float(jaccard.max()) == 1  # strangers share nobody
    # The same items, once with one of a pair as the query, once with the other.
    first = k_reciprocal_rerank(query, gallery, lambda_value=0.0)[:, :20]
    second = k_reciprocal_rerank(gallery[:20], torch.cat([query, gallery[20:]]), lambda_value=0.0)[:, :20].t()
    assert float((first - second).abs().max()) <= bound_of(dtype, 32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_exact_duplicate_has_distance_zero(dtype: torch.dtype) -> None:
    people = torch.randn(30, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    queries, copies = people[:10], people.repeat_interleave(4, 0)
    # 5 copies of the first ten people, 4 of the others; 4 or 3 neighbours besides oneself are exactly one's own copies.
    jaccard = k_reciprocal_rerank(queries, copies, k1=4, k2=1, lambda_value=0.0)
    own = jaccard.view(10, 30, 4)[torch.arange(10), torch.arange(10)]
    assert float(own.max()) <= bound_of(dtype, 70)
    final = k_reciprocal_rerank(queries, copies, k1=4, k2=1, lambda_value=1.0).view(10, 30, 4)
    assert bool((final[torch.arange(10), torch.arange(10)] == 0).all())
    assert float(final.flatten(1).topk(116).values.min()) > 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lambda_one_is_the_original_distance_in_units_of_the_largest(dtype: torch.dtype) -> None:
    query, gallery = clustered(15, 200, 24, dtype=dtype)
    final = k_reciprocal_rerank(query, gallery, lambda_value=1.0)
    everyone = torch.cat([query, gallery]).double()
    squared = torch.cdist(query.double(), everyone, compute_mode="donot_use_mm_for_euclid_dist").square()
    assert_is(final, squared[:, 15:] / squared.amax(dim=1, keepdim=True), dtype, 24)
    assert torch.equal(final.argsort(dim=1), squared[:, 15:].argsort(dim=1))


def test_lambda_mixes_both_distances() -> None:
    query, gallery = clustered(15, 200, 24, dtype=torch.float64)
    jaccard, original = (k_reciprocal_rerank(query, gallery, lambda_value=share) for share in (0.0, 1.0))
    for share in (0.3, 0.85):
        mixed = k_reciprocal_rerank(query, gallery, lambda_value=share)
        torch.testing.assert_close(mixed, (1 - share) * jaccard + share * original, rtol=0, atol=1e-15)


def test_a_permuted_gallery_permutes_the_columns() -> None:
    query, gallery = clustered(15, 300, 24, dtype=torch.float64)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    got, expected = k_reciprocal_rerank(query, gallery[order]), k_reciprocal_rerank(query, gallery)[:, order]
    assert_is(got, expected, torch.float64, 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [2.0**-60, 2.0**60, 3.7])
def test_the_scale_of_the_features_does_not_matter(factor: float, dtype: torch.dtype) -> None:
    query, gallery = clustered(15, 200, 24, dtype=dtype)
    expected, got = k_reciprocal_rerank(query, gallery), k_reciprocal_rerank(query * factor, gallery * factor)
    if factor == 3.7:
        assert_is(got, expected, dtype, 24)
    else:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("magnitude", [2.0**-149, 2.0**-126, 2.0**126, 2.0**127])
def test_features_at_the_ends_of_the_range(magnitude: float) -> None:
    signs = whole_numbers(6, 30, 8, 0)
    query, gallery = (x.sign() for x in signs)
    assert_is(k_reciprocal_rerank(query * magnitude, gallery * magnitude), oracle(query, gallery), torch.float32, 8)


def test_a_common_offset_does_not_cost_digits() -> None:
    query, gallery = clustered(20, 300, 64, people=20)
    offset = 100 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    query, gallery = query + offset, gallery + offset  # rounded here, to 2^-18 or so
    expected = reference.k_reciprocal_rerank(query.double(), gallery.double(), lambda_value=1.0)
    # Without a centre |a|^2 is 640,000 and its rounding alone, 2^-4, a tenth of the largest distance.
    assert_is(k_reciprocal_rerank(query, gallery, lambda_value=1.0), expected, torch.float32, 64)


def test_ties_go_to_the_smaller_index_and_an_item_comes_first_in_its_own_order() -> None:
    # Item 0, the query, is at 0; the gallery at 1, 1, 1, 9, 9. With k1 = 2 the query's neighbours are items 1 and 2.
    query, gallery = torch.tensor([[0.0]]), torch.tensor([[1.0], [1.0], [1.0], [9.0], [9.0]])
    expected = oracle(query, gallery, 2, 1, 0.0)
    got = k_reciprocal_rerank(query, gallery, 2, 1, 0.0)
    assert_is(got, expected, torch.float32, 1)
    # The third copy at 1 has the first two as its neighbours, is neither's, and so is alone; of the two at 9 each has
    # the other.
    assert got[0].tolist() == [1.0] * 5
    pair = k_reciprocal_rerank(torch.tensor([[9.0]]), torch.tensor([[1.0], [1.0], [9.0], [5.0]]), 1, 1, 0.0)
    assert float(pair[0, 2]) <= 1e-6
    assert pair[0, [0, 1, 3]].tolist() == [1.0] * 3


def test_everyone_alike() -> None:
    ones = torch.ones(4, 7), torch.ones(60, 7)
    for lambda_value in (0.0, 0.3, 1.0):
        got = k_reciprocal_rerank(*ones, lambda_value=lambda_value)
        assert_is(got, oracle(*ones, lambda_value=lambda_value), torch.float32, 7)


def test_small_galleries_are_one_neighbourhood() -> None:
    query, gallery = clustered(2, 3, 4)
    assert torch.equal(k_reciprocal_rerank(query, gallery, 20, 6), k_reciprocal_rerank(query, gallery, 4, 5))
    assert_is(k_reciprocal_rerank(query, gallery, 10**15, 10**15), oracle(query, gallery), torch.float32, 4)
    assert_is(k_reciprocal_rerank(query[:1], gallery[:1]), oracle(query[:1], gallery[:1]), torch.float32, 4)


@pytest.mark.parametrize(("queries", "gallery"), [(0, 5), (5, 0), (0, 0)])
def test_nobody(queries: int, gallery: int) -> None:
    for dtype, result in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        got = k_reciprocal_rerank(torch.ones(queries, 3, dtype=dtype), torch.ones(gallery, 3, dtype=dtype))
        assert got.shape == (queries, gallery)
        assert got.dtype == result


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_changes_neither_result_nor_arguments(layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    query, gallery = clustered(30, 170, 19, dtype=dtype)
    views = layout(query), layout(gallery)
    before = [x.clone() for x in views]
    got = k_reciprocal_rerank(*views)
    assert torch.equal(got, k_reciprocal_rerank(*before))
    assert all(torch.equal(x, y) for x, y in zip(views, before, strict=True))
    assert got.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    query, gallery = clustered(1100, 900, 70, dtype=dtype)
    with threads(1):
        expected = k_reciprocal_rerank(query, gallery)
    for count in (2, 3, 5, 16):
        with threads(count):
            assert torch.equal(k_reciprocal_rerank(query, gallery), expected), count


def test_16_bit_features_are_computed_in_float32() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        query, gallery = clustered(20, 200, 24, dtype=dtype)
        assert torch.equal(k_reciprocal_rerank(query, gallery), k_reciprocal_rerank(query.float(), gallery.float()))


INSTRUCTION_SETS = info()["instruction sets available"].split(", ")


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set_agrees(name: str, tmp_path: Path) -> None:
    cases = []
    for dtype in kernels_of(name, DTYPES):
        query, gallery = clustered(90, 700, 300, dtype=torch.float64)
        cases.append((query.to(dtype), gallery.to(dtype)))
    torch.save(cases, tmp_path / "cases.pt")
    script = (
        "import sys, torch; from gingham import info; from gingham.ops import k_reciprocal_rerank as rerank\n"
        "assert info()['instruction set'] == sys.argv[2]\n"
        "cases = torch.load(sys.argv[1] + '/cases.pt')\n"
        "torch.save([rerank(*case) for case in cases], sys.argv[1] + '/results.pt')\n"
    )
    finished = run_python(script, str(tmp_path), name, GINGHAM_CPU=name)
    assert finished.returncode == 0, finished.stderr
    for (query, gallery), got in zip(cases, torch.load(tmp_path / "results.pt"), strict=True):
        expected = reference.k_reciprocal_rerank(query.double(), gallery.double())
        assert_is(got, expected, query.dtype, 300, 0.0 if query.dtype == torch.float64 else 0.02)


def test_no_matrix_of_all_items_is_made() -> None:
    script = (
        "import re, torch; from pathlib import Path; from gingham.ops import k_reciprocal_rerank as rerank\n"
        "def status(name):\n"
        "    return int(re.search(name + r':\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) * 1024\n"
        "torch.set_num_threads(2)\n"
        "query, gallery = torch.randn(50, 32), torch.randn(9950, 32)\n"
        "rerank(query[:, :8], gallery[:100, :8])\n"
        "Path('/proc/self/clear_refs').write_text('5')\n"
        "before = status('VmRSS'); result = rerank(query, gallery); print(status('VmHWM') - before)\n"
    )
    finished = run_python(script)
    if "clear_refs" in finished.stderr:
        pytest.skip("needs Linux's /proc")
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) < 10_000 * 10_000 * 4 // 10  # of one float32 matrix


# ------------------------------------------------------------------------------------------------ PyTorch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [contiguous, features_apart])
def test_opcheck(layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    query, gallery = (layout(x) for x in clustered(6, 20, 5, dtype=dtype))
    torch.library.opcheck(operator, (query, gallery, 5, 2, 0.3))
    torch.library.opcheck(operator, (query.requires_grad_(), gallery, 5, 2, 0.3))
    torch.library.opcheck(torch.ops.gingham._k_reciprocal_rerank.default, (query.detach(), gallery, 5, 2, 0.3))


@pytest.mark.parametrize("which", [0, 1])
def test_the_result_requires_no_gradient(which: int) -> None:
    features = clustered(6, 20, 5)
    features[which].requires_grad_()
    for function in (
        k_reciprocal_rerank,
        operator,
        torch.compile(k_reciprocal_rerank, fullgraph=True, backend="eager"),
    ):
        result = function(*features)
        assert not result.requires_grad
        (features[which].sum() + result.sum()).backward()
        assert bool((features[which].grad == 1).all())
        features[which].grad = None


def test_func_transforms_see_a_constant() -> None:
    query, gallery = clustered(6, 20, 5, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        return (k_reciprocal_rerank(x, gallery, 5, 2) * x.sum()).sum()

    expected = k_reciprocal_rerank(query, gallery, 5, 2).sum().expand_as(query)
    torch.testing.assert_close(torch.func.grad(function)(query), expected)
    assert float(torch.func.jacrev(lambda x: k_reciprocal_rerank(x, gallery, 5, 2))(query).abs().max()) == 0


def test_vmap() -> None:
    query = torch.stack([clustered(6, 20, 5, seed=seed)[0] for seed in range(3)], dim=1)
    gallery = torch.stack([clustered(6, 20, 5, seed=seed)[1] for seed in range(3)])
    got = torch.vmap(lambda q, g: k_reciprocal_rerank(q, g, 5, 2), in_dims=(1, 0))(query, gallery)
    assert torch.equal(got, torch.stack([k_reciprocal_rerank(query[:, i], gallery[i], 5, 2) for i in range(3)]))
    got = torch.vmap(lambda q: k_reciprocal_rerank(q, gallery[0], 5, 2), in_dims=1, out_dims=2)(query)
    assert torch.equal(got, torch.stack([k_reciprocal_rerank(query[:, i], gallery[0], 5, 2) for i in range(3)], dim=2))


def test_compile_is_one_graph_with_dynamic_shapes() -> None:
    compiled = torch.compile(
        lambda q, g: 2 * k_reciprocal_rerank(q, g, k1=7), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for queries, gallery in ((6, 20), (9, 31)):
        features = clustered(queries, gallery, 5)
        assert torch.equal(compiled(*features), 2 * k_reciprocal_rerank(*features, k1=7))


def test_export_with_dynamic_numbers_of_items() -> None:
    class Rerank(torch.nn.Module):
        def forward(self, query: Tensor, gallery: Tensor) -> Tensor:
            return k_reciprocal_rerank(query, gallery, k1=7)

    items = {0: torch.export.Dim("queries")}, {0: torch.export.Dim("gallery")}
    program = torch.export.export(Rerank(), clustered(6, 20, 5), dynamic_shapes=items)
    features = clustered(9, 31, 5)
    assert torch.equal(program.module()(*features), k_reciprocal_rerank(*features, k1=7))


def test_autocast_changes_nothing() -> None:
    features = clustered(6, 20, 5)
    with torch.autocast("cpu", torch.bfloat16):
        got = k_reciprocal_rerank(*features)
    assert torch.equal(got, k_reciprocal_rerank(*features))


def test_meta_tensors_have_the_shape_and_no_data() -> None:
    for dtype in DTYPES:
        result = k_reciprocal_rerank(*(x.to("meta", dtype) for x in clustered(6, 20, 5)))
        assert (result.device.type, result.shape) == ("meta", (6, 20))
        assert result.dtype == k_reciprocal_rerank(*(x.to(dtype) for x in clustered(6, 20, 5))).dtype


def test_options_may_be_any_whole_and_real_numbers() -> None:
    features = clustered(6, 20, 5, dtype=torch.float64)
    got = k_reciprocal_rerank(*features, np.int64(5), np.int32(2), 1)  # type: ignore[arg-type]
    assert torch.equal(got, k_reciprocal_rerank(*features, 5, 2, 1.0))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query_features": [[1.0]]}, TypeError, "query_features must be a tensor, got list"),
        ({"query_features": torch.ones(3, 4).int()}, TypeError, "query_features must be float32, float64, float16 or"),
        ({"query_features": torch.ones(4)}, ValueError, r"query_features must be \[Nq, D\] with D >= 1, got float32"),
        ({"gallery_features": torch.ones(2, 9, 4)}, ValueError, r"gallery_features must be \[Ng, D\] with D >= 1"),
        ({"gallery_features": torch.ones(9, 3)}, ValueError, r"gallery_features must be \[Ng, 4\] to match query_feat"),
        ({"gallery_features": torch.ones(9, 4).double()}, TypeError, "gallery_features must have the dtype of query_f"),
        (
            {"gallery_features": torch.ones(9, 4, device="meta")},
            ValueError,
            "gallery_features must be on the device of query_features",
        ),
        ({"gallery_features": torch.ones(9, 4).to_sparse()}, TypeError, "gallery_features must be a dense tensor"),
        ({"k1": 0}, ValueError, "k1 must be at least 1 and fit 64 bits, got 0"),
        ({"k1": 2**63}, ValueError, "k1 must be at least 1 and fit 64 bits, got 9223372036854775808"),
        ({"k1": 2.5}, TypeError, "k1 must be a whole number, got float"),
        ({"k1": True}, TypeError, "k1 must be a whole number, got bool"),
        ({"k2": -1}, ValueError, "k2 must be at least 1 and fit 64 bits, got -1"),
        ({"k2": "6"}, TypeError, "k2 must be a whole number, got str"),
        ({"lambda_value": 1.5}, ValueError, r"lambda_value must be in \[0, 1\], got 1.5"),
        ({"lambda_value": -0.1}, ValueError, r"lambda_value must be in \[0, 1\], got -0.1"),
        ({"lambda_value": math.nan}, ValueError, r"lambda_value must be in \[0, 1\], got nan"),
        ({"lambda_value": None}, TypeError, "lambda_value must be a number, got NoneType"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"query_features": torch.ones(3, 4), "gallery_features": torch.ones(9, 4)} | changes
    with pytest.raises(error, match=f"^k_reciprocal_rerank: {message}"):
        k_reciprocal_rerank(**arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["query_features", "gallery_features"])
def test_what_is_not_finite_is_refused_by_name(name: str, value: float, dtype: torch.dtype) -> None:
    features = dict(zip(("query_features", "gallery_features"), clustered(3, 70, 21, dtype=dtype), strict=True))
    features[name][-1, -1] = value
    with pytest.raises(ValueError, match=f"^k_reciprocal_rerank: {name} must be finite, got NaN or infinity"):
        k_reciprocal_rerank(**features)
    with pytest.raises(RuntimeError, match=f"^gingham: k_reciprocal_rerank: {name} must be finite, got NaN or infin"):
        operator(*features.values())
    features[name][-1, -1] = 0
    assert bool(k_reciprocal_rerank(**features).isfinite().all())


def test_the_operator_itself_checks_its_arguments() -> None:
    ones = torch.ones(3, 4)
    for arguments, message in (
        ((torch.ones(3), ones), "query_features must be"),
        ((ones, torch.ones(9, 3)), "same number of features"),
        ((ones, ones.double()), "one dtype"),
        ((ones, ones, 0), "k1 must be at least 1"),
        ((ones, ones, 1, 0), "k2 must be at least 1"),
        ((ones, ones, 1, 1, 2.0), "lambda_value must be in"),
    ):
        with pytest.raises(RuntimeError, match=f"^gingham: k_reciprocal_rerank: .*{message}"):
            operator(*arguments)


# ------------------------------------------------------------------------------------------------ arrays


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_arrays_give_what_tensors_give_bit_for_bit(dtype: Any) -> None:
    query, gallery = (x.double().numpy().astype(dtype) for x in clustered(30, 170, 19))
    got = array_rerank(query, gallery, 7, 3, 0.4, threads=2)
    wide = np.float64 if dtype == np.float64 else np.float32
    tensors = (torch.from_numpy(x.astype(wide)) for x in (query, gallery))
    assert got.dtype == wide
    np.testing.assert_array_equal(got, k_reciprocal_rerank(*tensors, 7, 3, 0.4).numpy())


def test_arrays_in_any_memory_order() -> None:
    query, gallery = (x.numpy() for x in clustered(30, 170, 19))
    expected = array_rerank(query, gallery)
    for view in (
        np.asfortranarray,
        lambda x: np.ascontiguousarray(x[::-1])[::-1],
        lambda x: np.repeat(x, 2, 1)[:, ::2],
    ):
        np.testing.assert_array_equal(array_rerank(view(query), view(gallery)), expected)
    packed = np.zeros(
        len(gallery), dtype=np.dtype({"names": ["x"], "formats": ["19f4"], "offsets": [1], "itemsize": 78})
    )
    packed["x"] = gallery  # rows that begin between elements
    np.testing.assert_array_equal(array_rerank(query, packed["x"]), expected)


def test_out_takes_the_result() -> None:
    query, gallery = (x.numpy() for x in clustered(30, 170, 19))
    expected = array_rerank(query, gallery)
    for out in (np.full((30, 170), np.nan, np.float32), np.full((170, 30), np.nan, np.float32).T):
        assert array_rerank(query, gallery, out=out) is out
        np.testing.assert_array_equal(out, expected)


def test_arrays_of_nobody() -> None:
    assert array_rerank(np.ones((0, 3)), np.ones((4, 3))).shape == (0, 4)
    assert array_rerank(np.ones((4, 3), np.float16), np.ones((0, 3), np.float16)).dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query_features": [[1.0]]}, TypeError, "query_features must be a NumPy or CuPy array, got list"),
        ({"query_features": np.ones((3, 4), int)}, TypeError, "query_features must be float32, float64, float16 or"),
        ({"query_features": np.ma.masked_array(np.ones((3, 4)))}, TypeError, "query_features must be an array without"),
        ({"gallery_features": np.ones((9, 4), np.float32)}, TypeError, "gallery_features must have the dtype of query"),
        ({"gallery_features": np.ones((9, 3))}, ValueError, r"gallery_features must be \[Ng, 4\] to match"),
        ({"gallery_features": np.ones(4)}, ValueError, r"gallery_features must be \[Ng, D\] with D >= 1, got shape"),
        ({"query_features": np.full((3, 4), np.nan)}, ValueError, "query_features must be finite, got NaN or infinity"),
        ({"gallery_features": np.full((9, 4), np.inf)}, ValueError, "gallery_features must be finite, got NaN or inf"),
        ({"k1": 0}, ValueError, "k1 must be at least 1 and fit 64 bits, got 0"),
        ({"k2": True}, TypeError, "k2 must be a whole number, got bool"),
        ({"lambda_value": 2}, ValueError, r"lambda_value must be in \[0, 1\], got 2"),
        ({"lambda_value": "x"}, TypeError, "lambda_value must be a number, got str"),
        ({"threads": 0}, ValueError, "threads must be a positive whole number, got 0"),
        ({"out": np.ones((9, 3))}, ValueError, r"out must have the shape \(3, 9\), got \(9, 3\)"),
        ({"out": np.ones((3, 9), np.float32)}, TypeError, "out must be float64"),
    ],
)
def test_wrong_arrays(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"query_features": np.ones((3, 4)), "gallery_features": np.ones((9, 4))} | changes
    with pytest.raises(error, match=f"^k_reciprocal_rerank: {message}"):
        array_rerank(**arguments)


def test_arrays_of_cupy_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevice:
        pass

    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(ndarray=OnDevice))  # type: ignore[misc]
    with pytest.raises(TypeError, match=r"^k_reciprocal_rerank: query_features must be a NumPy array, got one of CuPy"):
        array_rerank(OnDevice(), OnDevice())


# ------------------------------------------------------------------------------------------------ CUDA


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_tensors_are_computed_on_the_cpu(dtype: torch.dtype) -> None:
    features = clustered(30, 170, 19, dtype=dtype)
    on_device = [x.cuda() for x in features]
    expected = k_reciprocal_rerank(*features)
    for function in (
        k_reciprocal_rerank,
        operator,
        torch.compile(k_reciprocal_rerank, backend="aot_eager", fullgraph=True),
    ):
        got = function(*on_device)
        assert got.is_cuda
        assert torch.equal(got.cpu(), expected)
    torch.library.opcheck(operator, (*on_device, 5, 2, 0.3))


@pytest.mark.cuda
def test_cuda_what_is_not_finite_is_refused_by_name() -> None:
    query, gallery = (x.cuda() for x in clustered(3, 70, 21))
    gallery[5, 5] = math.nan
    with pytest.raises(ValueError, match=r"^k_reciprocal_rerank: gallery_features must be finite"):
        k_reciprocal_rerank(query, gallery)
