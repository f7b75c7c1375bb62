"""Episodes: folds, items, the samplers of three protocols against their definitions, files, what an episode holds."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gingham.data import VOCSegmentation
from gingham.data.episodes import (
    Draw,
    Episode,
    EpisodeDataset,
    Item,
    Protocol,
    RandomEpisodes,
    collate_episodes,
    find_items,
    images_by_class,
    is_small,
    pascal_fold,
    read_episodes,
    read_items,
    resize_item,
    shuffled_as_python2,
    write_episodes,
)
from gingham.data.labels import LabelSpace, bit_interleaved_palette
from gingham.data.segmentation import SegmentationDataset, SegmentationItem
from gingham.data.transforms import EvaluationTransform
from gingham.errors import DataError

SPACE = LabelSpace(("background", "a", "b", "c"), bit_interleaved_palette(4))


class Given(SegmentationDataset):
    """Labels that are given, and images that show them."""

    def __init__(self, labels: Sequence[Tensor]) -> None:
        super().__init__("given", SPACE)
        self.given = labels

    def __len__(self) -> int:
        return len(self.given)

    def read(self, index: int) -> SegmentationItem:
        label = self.given[index]
        return {"image": (10 * label).to(torch.uint8).expand(3, -1, -1), "label": label, "name": f"image {index}"}


def squares(*classes: Sequence[int], size: tuple[int, int] = (40, 56)) -> Given:
    """One label for each entry: a square of each of its classes side by side, on background."""
    labels = []
    for present in classes:
        label = torch.zeros(size, dtype=torch.int64)
        for place, value in enumerate(present):
            label[4:12, 12 * place : 12 * place + 8] = value
        labels.append(label)
    return Given(labels)


@pytest.fixture
def items() -> list[Item]:
    """Three classes of 7, 4 and 9 images among 12."""
    rng = random.Random(0)
    places = {
        1: sorted(rng.sample(range(12), 7)),
        2: sorted(rng.sample(range(12), 4)),
        3: sorted(rng.sample(range(12), 9)),
    }
    return [Item(image, name) for image in range(12) for name in (1, 2, 3) if image in places[name]]


# ------------------------------------------------------------------------------------------------ folds and items


def test_folds_are_disjoint_and_cover_the_20_classes() -> None:
    folds = [pascal_fold(fold) for fold in range(4)]
    assert [len(fold) for fold in folds] == [5, 5, 5, 5]
    assert sorted(index for fold in folds for index in fold) == list(range(1, 21))
    assert pascal_fold(0) == (1, 2, 3, 4, 5)  # aeroplane, bicycle, bird, boat, bottle
    for fold in (-1, 4):
        with pytest.raises(ValueError, match=f"fold must be 0 to 3, got {fold}"):
            pascal_fold(fold)


def test_items_are_in_the_order_of_images_and_classes_without_borders_and_background() -> None:
    scenes = squares((3, 1), (2,), (255, 2), ())
    assert find_items(scenes, (1, 2, 3)) == [Item(0, 1), Item(0, 3), Item(1, 2), Item(2, 2)]
    assert find_items(scenes, (3,)) == [Item(0, 3)]


def test_training_images_of_a_single_class_hold_no_novel_pixel() -> None:
    scenes = squares((1, 3), (2,), (1, 2), (1, 255), (3,))
    found = find_items(scenes, (1, 2), single_class=True)
    assert found == [Item(1, 2), Item(3, 1)]
    assert not any((scenes.read_label(item.image) == 3).any() for item in found)


def test_small_objects_are_those_that_miss_the_grid_of_the_protocol() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for trial in range(60):
        rows, columns = (int(torch.randint(30, 200, (), generator=generator)) for _ in range(2))
        mask = torch.zeros(rows, columns, dtype=torch.bool)
        side = 10 + 3 * trial
        top, left = trial % 20, trial % 13
        mask[top : top + side, left : left + side] = (
            torch.rand(side, side, generator=generator)[
                : mask[top : top + side, left : left + side].shape[0],
                : mask[top : top + side, left : left + side].shape[1],
            ]
            < 0.8
        )
        # The protocol's: 15 pixels before, at least 15 behind up to a multiple of 32, the middle of each cell.
        padded = np.zeros([int(np.ceil((extent + 30) / 32)) * 32 for extent in mask.shape], bool)
        padded[15 : 15 + rows, 15 : 15 + columns] = mask.numpy()
        assert is_small(mask) == (padded[16::32, 16::32].sum() <= 2)
        seen.add(is_small(mask))
    assert seen == {True, False}


def test_small_objects_are_left_out_where_the_protocol_says_so() -> None:
    scenes = squares((1,), (2,), size=(40, 56))
    assert find_items(scenes, (1, 2), small_objects=False) == []
    assert len(find_items(scenes, (1, 2))) == 2


def test_published_lists_of_items_are_read(tmp_path: Path) -> None:
    scenes = squares((1,), (2,), (3,))
    (tmp_path / "fold0.txt").write_text("image 2__03\nimage 0__01\n\n")
    assert read_items(tmp_path / "fold0.txt", scenes) == [Item(2, 3), Item(0, 1)]
    for line, reason in (
        ("image 0", "fold0.txt:1: expected <image>__<class>"),
        ("image 0__00", "expected <image>__<class>"),
        ("image 0__07", "expected <image>__<class>"),
        ("image 9__01", "no image 'image 9' in the given split"),
    ):
        (tmp_path / "fold0.txt").write_text(line)
        with pytest.raises(DataError, match=reason):
            read_items(tmp_path / "fold0.txt", scenes)


def test_lists_of_paths_name_images_by_their_first_file(tmp_path: Path) -> None:
    for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("2007_01", "2007_02"):
        Image.new("RGB", (6, 4)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
        Image.new("L", (6, 4), 3).save(tmp_path / "SegmentationClassAug" / f"{name}.png")
    lines = [f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png\n" for name in ("2007_02", "2007_01")]
    (tmp_path / "ImageSets/Segmentation/trainaug.txt").write_text("".join(lines))
    found = VOCSegmentation(tmp_path, "trainaug", label_folder="SegmentationClassAug")
    assert [found.name_of(index) for index in range(2)] == ["2007_02", "2007_01"]
    assert found.read_label(0).shape == (4, 6) and (found.read_label(0) == 3).all()


# ------------------------------------------------------------------------------------------------ protocols


def test_the_shuffle_is_that_of_python_2() -> None:
    assert shuffled_as_python2(range(10), random.Random(1385)) == [8, 5, 3, 6, 0, 2, 7, 4, 9, 1]


def test_oslsm_takes_items_in_turn_and_shuffles_the_others_of_their_class(items: list[Item]) -> None:
    def shuffle(sequence: list[Any]) -> None:
        for i in reversed(range(1, len(sequence))):
            j = int(rng.random() * (i + 1))
            sequence[i], sequence[j] = sequence[j], sequence[i]

    rng = random.Random(1385)
    order: list[Item] = []
    place = 0
    for draw in Protocol("oslsm", shots=2, episodes=70).draw(items):
        if place == len(order):
            order, place = list(items), 0
            shuffle(order)
        image, name = order[place]
        place += 1
        cluster = [item.image for item in items if item.class_index == name]
        others = list(range(len(cluster)))
        del others[cluster.index(image)]
        shuffle(others)
        assert draw == Draw(name, tuple(cluster[other] for other in others[:2]), image, 1385)


def test_the_official_one_shot_script_exchanges_the_roles(items: list[Item]) -> None:
    usual = Protocol("oslsm", episodes=50).draw(items)
    swapped = Protocol("oslsm", episodes=50, roles="sgone_1shot").draw(items)
    assert [(one.query, one.support) for one in swapped] == [(one.support[0], (one.query,)) for one in usual]
    assert usual != swapped


def test_panet_draws_as_its_code_does_with_the_global_generator(items: list[Item]) -> None:
    draws = Protocol("panet", shots=2, episodes=20, runs=3).draw(items)
    assert [draw.seed for draw in draws] == [1234] * 20 + [1235] * 20 + [1236] * 20
    images = list(images_by_class(items).items())
    state = random.getstate()
    expected = []
    for run in range(3):
        random.seed(1234 + run)
        random.choices(population=range(1), k=1)
        for _ in range(20):
            (number,) = random.sample(range(3), k=1)
            name, places = images[number]
            expected.append((name, [places[place] for place in random.sample(range(len(places)), k=3)]))
    random.setstate(state)
    assert [(draw.class_index, [*draw.support, draw.query]) for draw in draws] == expected


def test_hsnet_cycles_the_queries_and_draws_as_numpy_s_global_generator(items: list[Item]) -> None:
    draws = Protocol("hsnet", shots=3, episodes=50).draw(items)
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    for number, draw in enumerate(draws):
        image, name = items[number % len(items)]
        support: list[int] = []
        while len(support) < 3:
            (drawn,) = np.random.choice(images_by_class(items)[name], 1, replace=False)  # noqa: NPY002
            if drawn != image:
                support.append(int(drawn))
        assert draw == Draw(name, tuple(support), image, 0)
    np.random.set_state(state)  # noqa: NPY002


@pytest.mark.parametrize("name", ["oslsm", "panet", "hsnet"])
@pytest.mark.parametrize("shots", [1, 3])
def test_episodes_repeat_and_their_images_show_their_class(name: Any, shots: int, items: list[Item]) -> None:
    protocol = Protocol(name, shots=shots)
    draws = protocol.draw(items)
    assert len(draws) == 1000 * len(protocol.seeds)
    assert draws == Protocol(name, shots=shots).draw(items)
    assert draws != Protocol(name, shots=shots, seed=7).draw(items)
    for draw in draws:
        assert draw.query not in draw.support and len(draw.support) == shots
        assert all(Item(image, draw.class_index) in items for image in (*draw.support, draw.query))


def test_classes_with_too_few_images_are_left_out(items: list[Item]) -> None:
    assert {draw.class_index for draw in Protocol(shots=5, episodes=50).draw(items)} == {1, 3}
    with pytest.raises(DataError, match="no class has the 10 images that an episode of 9 shots needs"):
        Protocol(shots=9).draw(items)


def test_a_protocol_says_what_scores_depend_on_and_whether_it_was_changed() -> None:
    assert Protocol().describe() == (
        "oslsm, 1-shot: 1000 episodes, seed 1385, every item in turn, in a shuffled order as query, "
        "small objects left out; scored at original size, pixels 255 counted as background"
    )
    assert Protocol("hsnet").image_size == (400, 400) and Protocol("hsnet").query_border == "ignore"
    changed = Protocol("panet", episodes=20, runs=1, size="original", border="object", small_objects=False)
    assert changed.describe().startswith("panet (changed), 1-shot: 20 episodes, seed 1234, ")
    assert changed.describe().endswith("small objects left out; scored at original size, pixels 255 counted as object")
    assert not Protocol("panet", runs=5, size=(417, 417)).changed


@pytest.mark.parametrize(
    "options",
    [
        {"name": "coco"},
        {"shots": 0},
        {"episodes": 0},
        {"runs": 0},
        {"seed": -1},
        {"border": "none"},
        {"roles": "swapped"},
        {"roles": "sgone_1shot", "shots": 5},
        {"roles": "sgone_1shot", "name": "hsnet"},
        {"size": (0, 4)},
    ],
    ids=str,
)
def test_protocols_that_cannot_be_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} "):
        Protocol(**options)


# ------------------------------------------------------------------------------------------------ files


def test_episodes_are_written_as_lines_and_read_back(tmp_path: Path) -> None:
    episodes = [Episode(1, 6, ("a", "b"), "c", "oslsm", 1385), Episode(None, 2, ("c", "a"), "b", "hsnet", 0)]
    write_episodes(tmp_path / "new" / "pairs.jsonl", episodes)
    lines = [json.loads(line) for line in (tmp_path / "new" / "pairs.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "fold": 1, "class": 6, "support": ["a", "b"], "query": "c", "protocol": "oslsm", "seed": 1385
    }  # fmt: skip
    assert read_episodes(tmp_path / "new" / "pairs.jsonl") == episodes


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no episodes in it"),
        ("{", "pairs.jsonl:1: expected an episode with fold, class"),
        ("[1]", "pairs.jsonl:1: expected an episode"),
        ('{"fold": 0, "class": 1, "query": "c"}', "pairs.jsonl:1: expected an episode"),
        (
            '{"fold": 0, "class": 1, "support": [], "query": "c", "protocol": "x", "seed": 0}',
            "expected supports, got 0",
        ),
        (
            '{"fold": 0, "class": 1, "support": ["a"], "query": "c", "protocol": "x", "seed": 0}\n\n'
            '{"fold": 0, "class": 1, "support": ["a", "b"], "query": "c", "protocol": "x", "seed": 0}',
            "pairs.jsonl:3: expected 1 supports as above, got 2",
        ),
        (
            '{"fold": 0, "class": 1, "support": ["a", "c"], "query": "c", "protocol": "x", "seed": 0}',
            "pairs.jsonl:1: the query 'c' is one of its own supports",
        ),
    ],
)
def test_files_that_hold_no_episodes_are_named(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(text)
    with pytest.raises(DataError, match=reason):
        read_episodes(tmp_path / "pairs.jsonl")


# ------------------------------------------------------------------------------------------------ what an episode holds


def test_an_episode_holds_one_class_and_treats_the_border_as_told() -> None:
    scenes = squares((1, 2, 255), (2, 1, 255))
    for border, object_pixels, ignored in (("ignore", 64, 64), ("background", 64, 0), ("object", 128, 0)):
        (item,) = EpisodeDataset(scenes, [Draw(1, (1,), 0, 0)], border=border)  # type: ignore[arg-type]
        assert (item["label"] == 1).sum() == object_pixels and (item["label"] == 255).sum() == ignored
        assert item["label"][4:12, :8].eq(1).all()
        mask = item["support_mask"][0]
        assert mask.dtype == torch.bool and mask.shape == (1, 40, 56) and mask.sum() == object_pixels
        assert mask[0, 4:12, 12:20].all() and not mask[0, 4:12, :8].any()
        assert item["class_index"] == 1 and item["name"] == "image 0"
        torch.testing.assert_close(item["support"][0], scenes.read(1)["image"])


def test_runs_are_numbered_in_the_order_of_their_seeds() -> None:
    scenes = squares((1,), (1,))
    draws = [Draw(1, (1,), 0, seed) for seed in (5, 6, 6)]
    assert [item["run"] for item in EpisodeDataset(scenes, draws, seeds=(5, 6))] == [0, 1, 1]


def test_supports_keep_their_sizes_unless_they_shall_have_that_of_the_first() -> None:
    labels = [torch.zeros(size, dtype=torch.int64) for size in ((30, 40), (24, 60), (50, 20))]
    for label in labels:
        label[: label.shape[0] // 2] = 1
    scenes = Given(labels)
    draws = [Draw(1, (1, 2), 0, 0)]
    (own,) = EpisodeDataset(scenes, draws)
    assert [x.shape for x in own["support"]] == [(3, 24, 60), (3, 50, 20)]
    assert [x.shape for x in own["support_mask"]] == [(1, 24, 60), (1, 50, 20)]
    (first,) = EpisodeDataset(scenes, draws, first_support_size=True)
    assert [x.shape for x in first["support"]] == [(3, 24, 60)] * 2
    assert first["image"].shape == (3, 30, 40)
    assert first["support_mask"][1][0, :12].all() and not first["support_mask"][1][0, 12:].any()


def test_pictures_and_labels_are_brought_to_the_protocol_s_size() -> None:
    scenes = squares((1,), (1,))
    episodes = EpisodeDataset(scenes, [Draw(1, (1,), 0, 0)], size=(20, 84), transform=EvaluationTransform())
    (item,) = episodes
    assert item["image"].shape == (3, 20, 84) and item["image"].dtype == torch.float32
    assert episodes.read(0)["image"].shape == (3, 20, 84) and episodes.read(0)["views"]["support"][1].shape == (20, 84)
    assert item["label"].shape == (20, 84) and set(item["label"].unique().tolist()) == {0, 1}
    assert item["support_mask"][0].shape == (1, 20, 84)
    assert item["label"][2:6, :12].all() and not item["label"][7:].any()


@pytest.mark.parametrize("name", ["panet", "hsnet"])
def test_labels_are_resized_as_the_code_of_the_protocol_does(name: Any) -> None:
    label = torch.arange(5).repeat(5, 1)
    small = torch.nn.functional.interpolate(label[None, None].float(), size=(3, 3), mode="nearest")[0, 0].long()
    pillow = Image.fromarray(label.to(torch.uint8).numpy()).resize((3, 3), Image.Resampling.NEAREST)
    expected = {"hsnet": small, "panet": torch.from_numpy(np.array(pillow)).long()}
    assert not torch.equal(expected["hsnet"], expected["panet"])
    protocol = Protocol(name, size=(3, 3))
    item: Any = {"image": torch.zeros(3, 5, 5, dtype=torch.uint8), "label": label, "name": "a"}
    assert torch.equal(resize_item(item, protocol.image_size, protocol.label_resize)["label"], expected[name])
    scenes = squares((1, 1), (1, 1), size=(41, 57))
    given: Any = {"size": (20, 28), "label_resize": protocol.label_resize}
    episode = EpisodeDataset(scenes, [Draw(1, (1,), 0, 0)], **given)[0]
    wanted = [resize_item(scenes.read(i), (20, 28), protocol.label_resize)["label"] == 1 for i in (0, 1)]
    assert torch.equal(episode["label"] == 1, wanted[0]) and torch.equal(episode["support_mask"][0][0], wanted[1])


def test_pictures_show_the_support_beside_the_query() -> None:
    scenes = squares((1, 2), (2, 1))
    shown = EpisodeDataset(scenes, [Draw(1, (1,), 0, 0)]).read(0)
    torch.testing.assert_close(shown["image"], scenes.read(0)["image"])
    image, mask = shown["views"]["support"]
    torch.testing.assert_close(image, scenes.read(1)["image"])
    assert mask[4:12, 12:20].eq(1).all() and mask.sum() == 64


def test_training_episodes_draw_classes_evenly_and_images_without_repetition() -> None:
    scenes = squares(*[(1,)] * 9, *[(2,)] * 3, (3,))
    episodes = RandomEpisodes(scenes, find_items(scenes, (1, 2, 3)), shots=2, length=200)
    torch.manual_seed(0)
    drawn = [episodes[index] for index in range(200)]
    counts = Counter(item["class_index"] for item in drawn)
    assert set(counts) == {1, 2} and 70 < counts[1] < 130  # class 3 has too few images
    for item in drawn[:50]:
        assert (item["label"] == 1).sum() == 64
        assert [mask.sum() for mask in item["support_mask"]] == [64, 64]
    torch.manual_seed(0)
    assert [item["name"] for item in drawn] == [episodes[index]["name"] for index in range(200)]
    with pytest.raises(IndexError, match="index 200 out of range for 200 episodes"):
        episodes[200]
    with pytest.raises(DataError, match="no class has the 10 images"):
        RandomEpisodes(scenes, find_items(scenes, (1, 2)), shots=9, length=1)


def test_a_batch_has_a_list_of_shots() -> None:
    scenes = squares((1,), (1, 2), (2, 1), (2,))
    episodes = EpisodeDataset(scenes, [Draw(1, (0, 1), 2, 0), Draw(2, (1, 3), 2, 0)])
    batch = collate_episodes(list(episodes))
    assert batch["image"].shape == (2, 3, 40, 56) and batch["label"].shape == (2, 40, 56)
    assert [x.shape for x in batch["support"]] == [(2, 3, 40, 56)] * 2
    assert [x.shape for x in batch["support_mask"]] == [(2, 1, 40, 56)] * 2
    assert batch["class_index"].tolist() == [1, 2] and batch["name"] == ["image 2"] * 2


def test_batches_of_several_sizes_are_refused() -> None:
    scenes = Given([torch.ones(8, 9, dtype=torch.int64)] * 2 + [torch.ones(10, 9, dtype=torch.int64)])
    episodes = EpisodeDataset(scenes, [Draw(1, (0,), 1, 0), Draw(1, (2,), 1, 0)])
    with pytest.raises(DataError, match=r"differ in size \(9x10 and 9x8\): resize them"):
        collate_episodes(list(episodes))
    assert collate_episodes([episodes[1]])["support"][0].shape == (1, 3, 10, 9)
