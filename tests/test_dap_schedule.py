"""Drop-and-Pick without a network: visits, budgets, which samples are dropped, and in which batches they come."""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("lightning", reason="batches are those of the data modules: pip install gingham[train]")
from gingham.errors import CheckpointError
from gingham.methods.dap.active_set import ActiveSet
from gingham.methods.dap.schedule import Schedule
from gingham.methods.resumable_data import EpochBatches, SelectedBatches

LOSSES = torch.tensor([0.9, 0.1, 0.5, 0.3, 0.7, 0.2, 0.8, 0.4])


def trace(chosen: ActiveSet, losses: Tensor, epochs: int) -> Iterator[list[int]]:
    """The samples of one epoch after the other, each visited with these losses."""
    for epoch in range(epochs):
        indices = chosen.indices(epoch)
        chosen.record(indices, losses[indices])
        yield indices.tolist()


# --- how many ---------------------------------------------------------------------------------------------------------


def test_the_trace_of_the_specification() -> None:
    schedule = Schedule(8, 8, warmup=0, cycle=4)
    sets = list(trace(ActiveSet(schedule, 0.25), LOSSES, 8))
    first = [list(range(8)), [0, 2, 3, 4, 6, 7], [0, 2, 4, 6, 7], [0, 2, 4, 6]]
    assert sets == first * 2
    assert schedule.sizes(0.25) == [8, 6, 5, 4] * 2
    assert schedule.ratio(0.25) == 23 / 32


def test_a_fraction_of_the_original_set_drops_as_many_each_time() -> None:
    schedule = Schedule(8, 4, warmup=0, cycle=4, basis="original")
    assert [len(one) for one in trace(ActiveSet(schedule, 0.25), LOSSES, 4)] == [8, 6, 4, 2] == schedule.sizes(0.25)


def test_drops_are_as_far_apart_as_the_interval_says_and_last_epochs_have_all() -> None:
    schedule = Schedule(100, 12, warmup=1, cycle=5, interval=2, final=2)
    assert schedule.sizes(0.5) == [100, 100, 100, 50, 50, 25, 100, 100, 50, 50, 100, 100]


def test_a_cycle_that_outlasts_the_training_never_picks() -> None:
    assert Schedule(100, 6, warmup=2, cycle=99).sizes(0.5) == [100, 100, 100, 50, 25, 13]


@pytest.mark.parametrize(("fraction", "sizes"), [(0.25, [3, 3, 3]), (0.0, [3, 3, 3]), (1.0, [3, 2, 2])])
def test_numbers_are_rounded_down_and_some_samples_always_stay(fraction: float, sizes: list[int]) -> None:
    assert Schedule(3, 3, warmup=0, cycle=3, min_active=2).sizes(fraction) == sizes


def test_a_share_that_is_a_whole_number_is_one_despite_floating_point() -> None:
    assert 0.29 * 100 < 29
    assert Schedule(100, 2, warmup=0, cycle=2).sizes(0.29) == [100, 71]


@pytest.mark.parametrize(
    ("epochs", "warmup", "cycle", "budget", "survivors", "least", "original"),
    [
        (90, 10, 5, 0.75, 0.1660, 0.484, 0.1406),
        (90, 10, 10, 0.75, 0.0760, 0.491, 0.0625),
        (100, 10, 5, 0.75, 0.1635, 0.490, 0.1389),
        (120, 20, 5, 0.75, 0.1794, 0.453, 0.1500),
        (200, 20, 10, 0.75, 0.0749, 0.496, 0.0617),
        (90, 10, 5, 0.85, 0.0926, 0.678, 0.0844),
        (200, 20, 10, 0.85, 0.0413, 0.684, 0.0370),
    ],
)
def test_fractions_of_the_specification_fit_their_budgets(
    epochs: int, warmup: int, cycle: int, budget: float, survivors: float, least: float, original: float
) -> None:
    length = 1_281_167
    for basis, expected in (("survivors", survivors), ("original", original)):
        schedule = Schedule(length, epochs, warmup, cycle, basis=basis)  # type: ignore[arg-type]
        fraction = schedule.fraction_for(budget)
        assert fraction == pytest.approx(expected, abs=5.1e-5)
        assert 0 <= budget - schedule.ratio(fraction) < 1e-5
    schedule = Schedule(length, epochs, warmup, cycle)
    assert min(schedule.sizes(schedule.fraction_for(budget))) / length == pytest.approx(least, abs=5.1e-4)


def test_sizes_on_imagenet() -> None:
    schedule = Schedule(1_281_167, 90)
    assert schedule.sizes(0.166)[10:15] == [1_281_167, 1_068_494, 891_124, 743_198, 619_828]
    assert schedule.ratio(0.166) == pytest.approx(0.74995, abs=5e-6)


@given(
    length=st.integers(20, 400),
    epochs=st.integers(4, 40),
    warmup=st.integers(0, 3),
    cycle=st.integers(2, 8),
    budget=st.floats(0.8, 1.0),
    basis=st.sampled_from(["survivors", "original"]),
)
def test_the_fraction_is_the_smallest_that_stays_within_the_budget(
    length: int, epochs: int, warmup: int, cycle: int, budget: float, basis: Any
) -> None:
    schedule = Schedule(length, epochs, warmup, cycle, basis=basis)
    try:
        fraction = schedule.fraction_for(budget)
    except ValueError:
        assert schedule.ratio(1.0) > budget
        return
    assert schedule.ratio(fraction) <= budget + 1e-9
    drops = sum(schedule.step(epoch) == "drop" for epoch in range(epochs))
    if fraction > 0:  # a hair less costs at most a sample a drop, in each epoch until the next pick
        assert schedule.ratio(fraction * (1 - 1e-9) - 1e-9) > budget - 1e-9
        assert budget - schedule.ratio(fraction) <= drops * cycle / (epochs * length)


def test_a_budget_that_epochs_with_all_samples_exceed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"budget must be at least 0\.7003"):
        Schedule(1000, 10, warmup=6, cycle=5).fraction_for(0.5)


# --- which ------------------------------------------------------------------------------------------------------------


def test_sets_are_nested_in_a_cycle_and_the_largest_losses_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = ActiveSet(Schedule(200, 14, warmup=3, cycle=5), 0.2)
    before: set[int] = set()
    for epoch in range(14):
        losses = (10 * torch.rand(200, generator=generator)).floor()  # with ties
        known = chosen.losses.clone()
        now = set(chosen.indices(epoch).tolist())
        if epoch < 3 or (epoch - 3) % 5 == 0:
            assert len(now) == 200
        else:
            assert now < before
            gone = before - now
            order = sorted(before, key=lambda i: (float(known[i]), i))
            assert gone == set(order[: len(gone)])  # ties: the lower index first
        chosen.record(chosen.indices(epoch), losses[chosen.indices(epoch)])
        before = now


def test_the_hardest_go_first_where_that_is_compared_with() -> None:
    sets = list(trace(ActiveSet(Schedule(8, 4, warmup=0, cycle=4), 0.25, drop="hardest"), LOSSES, 4))
    assert sets == [list(range(8)), [1, 2, 3, 4, 5, 7], [1, 2, 3, 5, 7], [1, 3, 5, 7]]


def test_random_sets_are_as_large_and_drawn_anew_for_every_epoch() -> None:
    schedule = Schedule(100, 12, warmup=1, cycle=4, interval=2)
    sets, again, other = (
        list(trace(ActiveSet(schedule, 0.3, drop="random", seed=seed), torch.rand(100), 12)) for seed in (0, 0, 1)
    )
    assert [len(one) for one in sets] == schedule.sizes(0.3)
    assert sets == again != other
    assert schedule.step(4) == "keep" and sets[3] != sets[4]
    assert all(len(set(one)) == len(one) for one in sets)


def test_two_cycles_drop_what_their_own_losses_say() -> None:
    chosen = ActiveSet(Schedule(8, 4, warmup=0, cycle=2), 0.25)
    chosen.record(chosen.indices(0), LOSSES)
    first = chosen.indices(1).tolist()
    chosen.record(chosen.indices(2), 1 - LOSSES)
    assert first == [0, 2, 3, 4, 6, 7] and chosen.indices(3).tolist() == [1, 2, 3, 4, 5, 7]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_loss_that_is_not_finite_is_never_dropped(value: float) -> None:
    losses = LOSSES.clone()
    losses[1] = value
    chosen = ActiveSet(Schedule(8, 4, warmup=0, cycle=4), 0.9)
    assert chosen.record(chosen.indices(0), losses) == 1
    assert 1 in chosen.indices(1).tolist() and chosen.sizes[1] == 1
    mended = ActiveSet(Schedule(8, 4, warmup=0, cycle=4, final=1), 0.25, smoothing=0.5)
    mended.record(mended.indices(0), losses)
    mended.record(torch.tensor([1]), torch.tensor([0.4]))  # a second visit in the epoch does not count
    assert mended.losses[1] == torch.inf


def test_samples_that_were_never_visited_are_never_dropped() -> None:
    chosen = ActiveSet(Schedule(8, 4, warmup=0, cycle=4), 0.5)
    chosen.record(torch.tensor([0, 3, 5]), torch.tensor([3.0, 2.0, 1.0]))
    assert chosen.indices(1).tolist() == [1, 2, 4, 6, 7]


def test_losses_are_averaged_where_that_is_asked_for_and_the_first_visit_counts() -> None:
    chosen = ActiveSet(Schedule(3, 4, warmup=4), 0.5, smoothing=0.25)
    chosen.record(torch.tensor([0, 1, 0]), torch.tensor([1.0, 2.0, 9.0]))
    assert chosen.losses.tolist() == [1.0, 2.0, torch.inf] and chosen.visits == 2
    chosen.indices(1)
    chosen.record(torch.tensor([2, 0]), torch.tensor([5.0, 3.0]))
    assert chosen.losses.tolist() == [1.5, 2.0, 5.0] and chosen.visits == 4


def test_losses_are_kept_without_their_gradients_and_strange_samples_are_named() -> None:
    chosen = ActiveSet(Schedule(8, 4, warmup=0, cycle=4), 0.25)
    chosen.record(chosen.indices(0), LOSSES.clone().requires_grad_())
    assert not chosen.losses.requires_grad and chosen.indices(1).tolist() == [0, 2, 3, 4, 6, 7]
    for index in (-1, 8):
        with pytest.raises(ValueError, match=f"indices must be 0 to 7, got {index}"):
            chosen.record(torch.tensor([0, index]), torch.ones(2))
    with pytest.raises(ValueError, match=r"losses must be one for each index, got \[2, 1\] for \[2\]"):
        chosen.record(torch.tensor([0, 1]), torch.ones(2, 1))


def test_the_hardest_are_skipped_first_within_the_same_number() -> None:
    schedule = Schedule(100, 10, warmup=0, cycle=5)
    losses = torch.arange(100.0)
    sets = list(trace(ActiveSet(schedule, 0.1, skip_hardest=0.15), losses, 10))
    assert [len(one) for one in sets] == schedule.sizes(0.1) == [100, 90, 81, 73, 66] * 2
    assert sets[1] == list(range(90))  # ten of fifteen
    assert sets[2] == list(range(4, 85))  # the other five, and four easy ones
    assert sets[3] == list(range(12, 85)) and sets[6] == sets[1]


def test_every_class_keeps_its_share() -> None:
    labels = torch.arange(90) % 3
    losses = labels + torch.rand(90, generator=torch.Generator().manual_seed(0)) / 2  # class 0 is the easiest
    free = ActiveSet(Schedule(90, 3, warmup=0, cycle=3), 0.3)
    held = ActiveSet(Schedule(90, 3, warmup=0, cycle=3), 0.3, class_floor=0.5, labels=labels)
    for chosen, left in ((free, [0, 15, 30]), (held, [15, 15, 15])):
        *_, last = trace(chosen, losses, 3)
        assert torch.bincount(labels[last], minlength=3).tolist() == left
        assert len(last) == chosen.schedule.sizes(0.3)[-1]
    strict = ActiveSet(Schedule(90, 3, warmup=0, cycle=3), 0.3, class_floor=1.0, labels=labels)
    assert [len(one) for one in trace(strict, losses, 3)] == [90, 90, 90]


def test_duplicates_of_easy_points_are_dropped_first() -> None:
    torch.manual_seed(0)
    points = torch.randn(160, 2)
    labels = (points[:, 0] > 0).long()
    easy = points[:, 0].abs().argsort(descending=True)[:8]
    points, labels = torch.cat([points, points[easy].repeat(5, 1)]), torch.cat([labels, labels[easy].repeat(5)])
    weights = torch.zeros(2, 2, requires_grad=True)
    chosen = ActiveSet(Schedule(200, 3, warmup=1, cycle=2), 0.24)
    for epoch in range(2):
        for batch in chosen.indices(epoch).split(20):
            losses = torch.nn.functional.cross_entropy(points[batch] @ weights, labels[batch], reduction="none")
            losses.mean().backward()
            chosen.record(batch, losses.detach())
            with torch.no_grad():
                weights -= weights.grad  # type: ignore[operator]
                weights.grad = None
    dropped = set(range(200)) - set(chosen.indices(2).tolist())
    assert len(dropped) == 48
    assert len(dropped & {*range(160, 200), *easy.tolist()}) > 40  # of 48, where chance has about 12


def test_mislabelled_samples_gather_in_a_cycle_and_are_held_off() -> None:
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(1000, generator=generator) < 0.2
    losses = torch.rand(1000, generator=generator) + 2 * wrong
    shares = {}
    floor: dict[str, Any] = {"class_floor": 0.7, "labels": torch.arange(1000) % 10}
    for name, options in (("plain", {}), ("skipping", {"skip_hardest": 0.2}), ("floor", floor)):
        sets = list(trace(ActiveSet(Schedule(1000, 5, warmup=0, cycle=5), 0.166, **options), losses, 5))  # type: ignore[arg-type]
        shares[name] = [wrong[one].float().mean().item() for one in sets]
    assert shares["plain"] == sorted(shares["plain"]) and shares["plain"][-1] > 1.9 * shares["plain"][0]
    assert shares["skipping"][-1] < 0.05
    assert shares["floor"][-1] < 0.8 * shares["plain"][-1]


@pytest.mark.parametrize(
    "options",
    [
        {"drop": "some"},
        {"smoothing": 0.0},
        {"skip_hardest": 1.5},
        {"class_floor": -0.1},
        {"skip_hardest": 0.1, "drop": "random"},
        {"drop": "random", "smoothing": 0.5},
        {"class_floor": 0.5},
    ],
    ids=str,
)
def test_options_outside_their_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{list(options)[-1] if 'skip_hardest' not in options else 'skip_hardest'}"):
        ActiveSet(Schedule(8, 4), 0.5, **options)


@pytest.mark.parametrize(
    "options",
    [{"length": 0}, {"epochs": 0}, {"warmup": -1}, {"cycle": 0}, {"interval": 0}, {"final": -1}, {"min_active": 0}],
    ids=str,
)
def test_numbers_of_a_schedule_outside_their_range_are_named(options: dict[str, int]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name} must be "):
        Schedule(**{"length": 8, "epochs": 4, **options})


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"drop": "random"}, {"smoothing": 0.5, "skip_hardest": 0.2}], ids=str)
def test_a_state_goes_on_as_if_nothing_had_happened(options: dict[str, Any]) -> None:
    def fresh() -> ActiveSet:
        return ActiveSet(Schedule(203, 12, warmup=1, cycle=5), 0.2, **options)

    losses = torch.rand(12, 203, generator=torch.Generator().manual_seed(0))
    whole = fresh()
    expected = []
    for epoch in range(12):
        expected.append(whole.indices(epoch))
        whole.record(expected[-1], losses[epoch, expected[-1]])
    for broken in (3, 7):
        first = fresh()
        for epoch in range(broken):
            first.record(first.indices(epoch), losses[epoch, first.indices(epoch)])
        visited = first.indices(broken)
        first.record(visited[:50], losses[broken, visited[:50]])
        second = fresh()
        second.load_state_dict(first.state_dict())
        second.record(visited[40:], losses[broken, visited[40:]])  # ten that were recorded already
        for epoch in range(broken + 1, 12):
            assert torch.equal(second.indices(epoch), expected[epoch])
            second.record(expected[epoch], losses[epoch, expected[epoch]])
        assert torch.equal(second.losses, whole.losses) and second.visits == whole.visits == sum(whole.sizes)


def test_a_state_of_another_data_set_or_of_other_options_is_refused() -> None:
    state = ActiveSet(Schedule(8, 4), 0.5, labels=torch.arange(8)).state_dict()
    with pytest.raises(CheckpointError, match=r"another data set \(8 samples, not 9\)"):
        ActiveSet(Schedule(9, 4), 0.5, labels=torch.arange(9)).load_state_dict(state)
    with pytest.raises(CheckpointError, match="another data set"):
        ActiveSet(Schedule(8, 4), 0.5, labels=torch.arange(8).flip(0)).load_state_dict(state)
    with pytest.raises(CheckpointError, match="epochs 4, not 5"):
        ActiveSet(Schedule(8, 5), 0.5, labels=torch.arange(8)).load_state_dict(state)


# --- batches ----------------------------------------------------------------------------------------------------------


def run(world: int, epochs: int, *, drop_last: bool = False, batch: int = 4, length: int = 50) -> list[list[list[int]]]:
    """The items that each process of a training gets in each epoch; the losses follow from the items."""
    chosen = ActiveSet(Schedule(length, epochs, warmup=1, cycle=3, min_active=batch * world), 0.3)
    losses = torch.rand(length, generator=torch.Generator().manual_seed(1))
    trained = 0
    samplers = [
        SelectedBatches(chosen, length, batch, 5, rank, world, lambda: trained, drop_last=drop_last)
        for rank in range(world)
    ]
    result = []
    for epoch in range(epochs):
        lengths = {len(sampler) for sampler in samplers}
        shares = [list(sampler) for sampler in samplers]
        assert {len(share) for share in shares} == lengths == {samplers[0].batches_of(chosen.count(epoch))}
        assert all(position[0] == epoch for share in shares for one in share for position in one)
        result.append([[index for one in share for _, index in one] for share in shares])
        for share in result[-1]:
            chosen.record(torch.tensor(share), losses[share])
        trained += lengths.pop()
    assert drop_last or chosen.visits == sum(chosen.schedule.sizes(0.3))
    return result


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_the_active_samples_and_lose_none(world: int) -> None:
    alone = run(1, 7)
    for epoch, shares in enumerate(run(world, 7)):
        visited = [index for share in shares for index in share]
        assert set(visited) == set(alone[epoch][0])
        assert len(visited) - len(set(visited)) <= world - 1
        assert len({len(share) for share in shares}) == 1


def test_what_fills_no_batch_is_left_out_and_comes_again_where_that_is_asked_for() -> None:
    epochs = run(2, 7, drop_last=True)
    seen = [{index for share in shares for index in share} for shares in epochs]
    assert [len(one) for one in seen] == [48, 48, 32, 24, 48, 32, 24]  # of 50, 50, 35, 25: the last not always chosen
    assert set(range(50)) == seen[0] | seen[1] | seen[4]


def test_where_all_are_active_batches_are_the_ordinary_ones() -> None:
    chosen = ActiveSet(Schedule(50, 3, warmup=1, cycle=2), 0.0)
    for epoch in range(3):
        for drop_last in (True, False):
            options: Any = (50, 8, 3, 1, 2, partial(int, 3 * epoch))  # three batches an epoch were trained
            ordinary = EpochBatches(*options, drop_last=drop_last)
            selected = SelectedBatches(chosen, *options, drop_last=drop_last)
            if not drop_last:
                assert ordinary.batches(epoch) == selected.batches(epoch)
            else:
                assert list(ordinary) == list(selected) and len(ordinary) == len(selected)


def test_dropping_from_the_size_of_imagenet_takes_less_than_a_second() -> None:
    chosen = ActiveSet(Schedule(1_281_167, 2, warmup=0, cycle=2), 0.166)
    losses = torch.rand(1_281_167, generator=torch.Generator().manual_seed(0))
    chosen.record(chosen.indices(0), losses)
    begin = time.process_time()
    indices = chosen.indices(1)
    assert time.process_time() - begin < 1
    assert len(indices) == 1_068_494 and losses[indices].min() > 0.165
    assert chosen.losses.nbytes < 5.2e6
