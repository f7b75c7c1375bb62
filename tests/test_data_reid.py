"""Sightings of persons: items, clips of tracklets, and batches of persons that any run can be continued in."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gingham.data.clips import all_frames, dense_clips, evaluation_clips, even_clip, random_clip
from gingham.data.identity_sampler import IdentityBatches
from gingham.data.reid import ChosenClips, IndexedPersons, PersonDataset, QueryAndGallery, RandomClips, TrackletDataset

# ------------------------------------------------------------------------------------------------ data sets


class Plain(PersonDataset):
    """Pictures that show their place."""

    def read(self, index: int) -> Tensor:
        return torch.full((3, 4, 2), index, dtype=torch.uint8)


class Numbered(TrackletDataset):
    """Tracklets whose frames show their numbers."""

    def frames_of(self, index: int, frame_numbers: Sequence[int] | NDArray[np.int64]) -> Tensor:
        numbers = torch.as_tensor(np.asarray(frame_numbers), dtype=torch.uint8)
        assert (numbers < self.lengths[index]).all()
        return numbers.reshape(-1, 1, 1, 1).expand(-1, 3, 4, 2).clone()


def numbered(split: str = "train", lengths: Sequence[int] = (5, 2, 9), **options: Any) -> Numbered:
    names = [f"t{i}" for i in range(len(lengths))]
    return Numbered(split, [7 + i for i in range(len(lengths))], [0] * len(lengths), names, lengths, **options)


def test_persons_of_training_are_numbered_anew_by_their_order() -> None:
    ids, names = [12, 3, 12, 7], ["a", "b", "c", "d"]
    train, query = Plain("train", ids, [0, 1, 2, 0], names), Plain("query", ids, [0, 1, 2, 0], names)
    assert train.persons.tolist() == [2, 0, 2, 1] and train.person_ids.tolist() == ids and train.num_persons == 3
    assert query.persons.tolist() == ids and query.num_persons == 3
    item = train[-1]
    assert (item["person"], item["camera"], item["name"]) == (1, 0, "d") and (item["image"] == 3).all()
    assert Plain("gallery", [0, -1, 4], [0, 0, 0], "abc").num_persons == 1


def test_a_transform_changes_pixels_and_reading_does_not_ask_for_it() -> None:
    halved = Plain("train", [1, 2], [0, 0], "ab", lambda pixels: pixels / 2)
    assert (halved[1]["image"] == 0.5).all() and (halved.read(1) == 1).all()
    assert (numbered(transform=lambda pixels: pixels + 100)[0]["frames"][:, 0, 0, 0] == torch.arange(100, 105)).all()


def test_sightings_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^split must be one of train, val_query"):
        Plain("test", [1], [0], "a")
    with pytest.raises(ValueError, match=r"^person_ids, cameras and names must be of one length, got 2, 1 and 2"):
        Plain("train", [1, 2], [0], "ab")
    with pytest.raises(ValueError, match=r"^lengths must be"):
        numbered(lengths=(3, 0))
    with pytest.raises(IndexError):
        numbered()[3]


def test_training_items_know_their_places() -> None:
    images = IndexedPersons(Plain("train", [5, 4], [0, 0], "ab"))
    assert len(images) == 2 and [item["index"] for item in (images[0], images[1])] == [0, 1]
    clips = RandomClips(numbered(), frames=4)
    assert "occluded" not in clips[0]
    assert len(clips) == 3 and clips[2]["index"] == 2 and clips[2]["person"] == 2
    torch.manual_seed(0)
    drawn = {tuple(clips[2]["frames"][:, 0, 0, 0].tolist()) for _ in range(20)}
    assert len(drawn) > 5 and all(len(set(clip)) == 4 and sorted(clip) == list(clip) for clip in drawn)


def test_frames_of_a_clip_are_changed_alike() -> None:
    seen: list[torch.Size] = []

    def watch(pixels: Tensor) -> Tensor:
        seen.append(pixels.shape)
        return pixels.float()

    assert RandomClips(numbered(transform=watch), 4)[0]["frames"].dtype == torch.float32
    assert seen == [(4, 3, 4, 2)]


def test_evaluation_clips_hold_the_frames_that_were_asked_for() -> None:
    dataset = numbered("query", (6, 2))
    found = ChosenClips(dataset, 4, "dense")[0]["clips"]
    assert found.shape == (2, 4, 3, 4, 2) and found[:, :, 0, 0, 0].tolist() == [[0, 1, 2, 3], [4, 5, 4, 5]]
    assert ChosenClips(dataset, 4, "evenly")[1]["clips"][:, :, 0, 0, 0].tolist() == [[0, 1, 0, 1]]
    assert ChosenClips(dataset, 4, "all")[0]["clips"].shape[:2] == (1, 6)


def test_queries_come_before_the_gallery() -> None:
    joined = QueryAndGallery(Plain("query", [4], [0], "a"), Plain("gallery", [4, 0], [1, 1], "bc"))
    assert len(joined) == 3
    assert [(x["name"], x["query"]) for x in (joined[i] for i in range(3))] == [("a", True), ("b", False), ("c", False)]


# ------------------------------------------------------------------------------------------------ clips


def test_random_clips_have_different_frames_in_their_order() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [random_clip(9, 4, generator) for _ in range(300)]
    assert all(len(clip) == 4 and (np.diff(clip) > 0).all() for clip in drawn)
    counts = Counter(np.concatenate(drawn).tolist())
    assert set(counts) == set(range(9)) and min(counts.values()) > 90  # the last frames as often as the others
    short = [random_clip(3, 4, generator) for _ in range(50)]
    assert all(len(clip) == 4 and (np.diff(clip) >= 0).all() and clip.max() < 3 for clip in short)
    assert len({tuple(clip) for clip in short}) > 5
    assert random_clip(4, 4, generator).tolist() == [0, 1, 2, 3]


def test_dense_clips_cover_all_frames_and_are_filled_up_with_their_own() -> None:
    assert [len(dense_clips(length, 4)) for length in (1, 3, 4, 5, 8, 9)] == [1, 1, 1, 2, 2, 3]
    assert dense_clips(4, 4).tolist() == [[0, 1, 2, 3]]
    assert dense_clips(7, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 4]]
    assert dense_clips(1, 3).tolist() == [[0, 0, 0]]
    for length in range(1, 12):
        assert sorted(set(dense_clips(length, 5).ravel().tolist())) == list(range(length))


def test_even_clips_and_all_frames() -> None:
    assert even_clip(8, 4).tolist() == [0, 2, 4, 6] and even_clip(7, 4).tolist() == [0, 1, 2, 3]
    assert even_clip(3, 4).tolist() == [0, 1, 2, 0] and all_frames(5).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("make", [random_clip, even_clip, dense_clips])
def test_clips_of_nothing_are_refused(make: Any) -> None:
    for arguments in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match=r"^length and frames must be 1 or more"):
            make(*arguments)
    with pytest.raises(ValueError, match=r"^sampling must be"):
        evaluation_clips(4, 4, "some")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ batches


def persons_of(counts: Sequence[int], seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


def check_batches(batches: IdentityBatches, persons: NDArray[np.int64], count: int, each: int) -> list[list[int]]:
    """Every batch has `count` different persons with `each` items, K by K."""
    drawn = [[index for _, index, _ in batch] for batch in batches]
    assert len(drawn) == len(batches) > 0
    for batch in drawn:
        groups = persons[np.array(batch)].reshape(count, each)
        assert (groups == groups[:, :1]).all() and len(set(groups[:, 0].tolist())) == count
    return drawn


def test_every_person_is_visited_once_with_different_items() -> None:
    persons = persons_of([7, 4, 9, 5, 4, 6, 8])
    drawn = check_batches(IdentityBatches(persons, 3, 4, seed=1), persons, 3, 4)
    assert len(drawn) == 2  # of seven persons
    flat = [index for batch in drawn for index in batch]
    assert len(set(flat)) == len(flat) == 24
    seen = set()
    for epoch in range(30):
        later = IdentityBatches(persons, 3, 4, 1, trained=lambda: 2 * epoch)  # noqa: B023 - asked at once
        seen |= {index for batch in later for _, index, _ in batch}
    assert seen == set(range(len(persons)))  # nobody is left out for good


def test_persons_with_too_few_items_are_drawn_with_replacement_and_copies_are_numbered() -> None:
    persons = np.array([0, 1, 1, 2, 2, 2, 2])
    batches = IdentityBatches(persons, 3, 4, seed=0)
    check_batches(batches, persons, 3, 4)
    positions = [place for batch in batches for place in batch]
    assert len(set(positions)) == 12  # the same item comes with another copy
    alone = sorted(copy for _, index, copy in positions if index == 0)
    assert alone == [0, 1, 2, 3]
    assert all(copy == 0 for _, index, copy in positions if index >= 3)


def test_an_epoch_of_items_visits_nearly_every_run_once() -> None:
    persons = persons_of([8, 12, 4, 9, 16, 2, 4, 20])
    batches = IdentityBatches(persons, 3, 4, seed=3, epoch="items")
    drawn = check_batches(batches, persons, 3, 4)
    # 2 + 3 + 1 + 2 + 4 + 1 + 1 + 5 = 19 runs, three in a batch
    assert len(drawn) == 6
    counts = Counter(index for batch in drawn for index in batch)
    assert all(n == 1 for index, n in counts.items() if persons[index] != 5)
    assert len(counts) >= 18 * 4 - 2
    one_visit = IdentityBatches(persons, 3, 4, seed=3)
    assert len(one_visit) == 2


def test_a_person_with_most_of_the_items_is_not_twice_in_a_batch() -> None:
    persons = persons_of([40, 4, 4, 4, 4])
    batches = IdentityBatches(persons, 2, 4, seed=0, epoch="items")
    drawn = check_batches(batches, persons, 2, 4)
    assert len(drawn) == 4  # each has the first person and one of the others


def test_items_without_a_person_are_left_out() -> None:
    persons = np.array([-1, 0, 0, -1, 1, 1, 2, -1])
    drawn = check_batches(IdentityBatches(persons, 3, 2, seed=0), persons, 3, 2)
    assert (persons[np.array(drawn)] >= 0).all()
    assert len(IdentityBatches([-1, -1], 1, 1, seed=0)) == 0 and len(IdentityBatches([], 1, 1, seed=0)) == 0
    assert list(IdentityBatches([0, 0, 1], 3, 1, seed=0)) == []


@pytest.mark.parametrize("epoch", ["persons", "items"])
def test_batches_follow_from_seed_and_epoch_and_go_on_anywhere(epoch: Any) -> None:
    persons = persons_of([8, 5, 4, 9, 3, 12])

    def run(done: int = 0, seed: int = 5) -> list[Any]:
        return list(IdentityBatches(persons, 2, 4, seed, epoch=epoch, trained=lambda: done))

    length = len(run())
    epochs = [batch for number in range(3) for batch in run(number * length)]
    assert epochs[:length] == run() and run(seed=6) != run()
    assert [p[1] for p in epochs[0]] != [p[1] for p in epochs[length]]
    assert {p[0] for p in epochs[length]} == {1}
    for done in range(2 * length):
        assert run(done) == epochs[done : done + length]


@pytest.mark.parametrize("epoch", ["persons", "items"])
def test_each_process_takes_its_share_of_the_persons(epoch: Any) -> None:
    persons = persons_of([8, 5, 4, 9, 3, 12, 4, 4, 4])
    shares = [list(IdentityBatches(persons, 2, 4, 3, epoch=epoch, rank=r, world_size=2)) for r in range(2)]
    whole = list(IdentityBatches(persons, 4, 4, 3, epoch=epoch))
    assert [one + other for one, other in zip(*shares, strict=True)] == whole and len(whole) > 1


def test_batches_that_cannot_be_are_named() -> None:
    for options, reason in (
        ({"persons_per_batch": 0}, "persons_per_batch must be 1 or more, got 0"),
        ({"items_per_person": 0}, "items_per_person must be 1 or more, got 0"),
        ({"epoch": "all"}, "epoch must be 'persons' or 'items', got 'all'"),
    ):
        given: dict[str, Any] = {"persons_per_batch": 1, "items_per_person": 1} | options
        with pytest.raises(ValueError, match=reason):
            IdentityBatches([0, 1], seed=0, **given)
