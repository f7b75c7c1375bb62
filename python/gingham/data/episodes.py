"""Few-shot segmentation: items (an image and a class in it), episodes, and the protocols that say which are drawn.

An episode asks for one class in a query image, given K support images with that class's mask. The protocols are those
that published numbers rest on. They draw the same episodes from the same items whenever and wherever they are asked; a
list of episodes can be saved, and read by whoever wants to compare exactly.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from gingham.data.labels import IGNORE_INDEX, Colour, LabelSpace
from gingham.data.segmentation import SegmentationDataset, SegmentationItem, Transform
from gingham.errors import DataError

#: What an episode tells apart.
EPISODE_LABELS = LabelSpace(names=("background", "object"), palette=((0, 0, 0), (213, 30, 30)))

#: Which pixel is the nearest when labels are resized: by torch's "nearest", or by its "nearest-exact" and Pillow.
LabelResize = Literal["nearest", "nearest-exact"]

#: What pixels 255 count as, the border of objects in VOC.
Border = Literal["ignore", "background", "object"]


def pascal_fold(fold: int) -> tuple[int, ...]:
    """The novel classes of a fold of PASCAL-5i, as values of VOC's label files; the other 15 are for training.

    Args:
        fold: 0 to 3.

    Raises:
        ValueError: another fold.

    Source: Shaban et al., One-Shot Learning for Semantic Segmentation, https://arxiv.org/abs/1709.03410.

    Example:
        >>> pascal_fold(1)  # bus, car, cat, chair, cow
        (6, 7, 8, 9, 10)
    """
    if fold not in range(4):
        raise ValueError(f"fold must be 0 to 3, got {fold}")
    return tuple(range(5 * fold + 1, 5 * fold + 6))


# ------------------------------------------------------------------------------------------------------ items


class Item(NamedTuple):
    """The class of that index is in the image at that place of its data set."""

    image: int
    class_index: int


def find_items(
    dataset: SegmentationDataset,
    classes: Collection[int],
    *,
    single_class: bool = False,
    small_objects: bool = True,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> list[Item]:
    """Which of some classes are in which images: in the order of the images, and of the class indices within one.

    Args:
        dataset: whose labels are read.
        classes: class indices to look for, without that of the background.
        single_class: leave out images with more than one class that is not background, whichever it is.
        small_objects: whether objects of a few hundred pixels count, see `is_small`.
        progress: wraps the indices, for example in a progress bar.

    Example:
        >>> from gingham.data import CueScenes
        >>> find_items(CueScenes("val", 1), classes=(1, 2))
        [Item(image=0, class_index=1), Item(image=0, class_index=2)]
    """
    found = []
    for index in progress(range(len(dataset))):
        label = dataset.read_label(index)
        present = label.flatten().bincount(minlength=IGNORE_INDEX + 1)[1:IGNORE_INDEX].nonzero().flatten() + 1
        if single_class and len(present) != 1:
            continue
        for class_index in present.tolist():
            if class_index in classes and (small_objects or not is_small(label == class_index)):
                found.append(Item(index, class_index))
    return found


def is_small(mask: Tensor) -> bool:
    """Whether the OSLSM protocol leaves an object [H, W] out: of its pixels, two or fewer are on a grid of stride 32.

    The grid is that of the protocol's code: the mask is padded by 15 pixels and resized by 1/32 to the nearest pixel.

    Source: the code of OSLSM, https://github.com/lzzcd001/OSLSM.

    Example:
        >>> mask = torch.zeros(100, 100, dtype=torch.bool)
        >>> mask[:65, :65] = True
        >>> is_small(mask[:, :40]), is_small(mask)
        (False, False)
        >>> is_small(mask[:60, :20])
        True
    """
    return int(mask[1::32, 1::32].sum()) <= 2


def read_items(path: str | Path, dataset: SegmentationDataset) -> list[Item]:
    """Read a list of items, ``<image>__<class>`` a line with the value of the class in the label files.

    Such lists are published with HSNet: 346, 451, 725 and 346 lines for the four folds of PASCAL-5i.

    Args:
        path: the list.
        dataset: of the images.

    Raises:
        DataError: no such file, or a line that is no item of the data set.
    """
    places = {dataset.name_of(index): index for index in range(len(dataset))}
    items = []
    for number, line in _lines(path, "a list of items, <image>__<class> a line"):
        name, separator, value = line.rpartition("__")
        if not separator or not value.isdigit() or int(value) not in dataset.labels.values[1:]:
            raise DataError(f"{path}:{number}: expected <image>__<class>, such as 2007_000033__01, got {line!r}")
        if name not in places:
            raise DataError(f"{path}:{number}: no image {name!r} in the {dataset.split} split")
        items.append(Item(places[name], dataset.labels.values.index(int(value))))
    return items


def _lines(path: str | Path, expected: str) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"{path}: no such file, expected {expected}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file, expected {expected}") from None
    return ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip())


# ------------------------------------------------------------------------------------------------------ protocols


class Draw(NamedTuple):
    """An episode by the places of its images in the data set."""

    class_index: int
    support: tuple[int, ...]
    query: int
    seed: int


class _Defaults(NamedTuple):
    episodes: int
    runs: int
    seed: int
    size: tuple[int, int] | Literal["original"]
    border: Border
    small_objects: bool
    label_resize: LabelResize
    rule: str


_PROTOCOLS = {
    "oslsm": _Defaults(
        1000, 1, 1385, "original", "background", False, "nearest-exact", "every item in turn, in a shuffled order"
    ),
    "panet": _Defaults(
        1000, 5, 1234, (417, 417), "ignore", True, "nearest-exact", "a random class, then random images of it"
    ),
    "hsnet": _Defaults(
        1000, 1, 0, (400, 400), "ignore", True, "nearest", "every item in turn as query, random supports"
    ),
}


@dataclass(frozen=True)
class Protocol:
    """How episodes of evaluation are drawn and scored; what is None is as the protocol of that name has it.

    | | oslsm | panet | hsnet |
    | --- | --- | --- | --- |
    | episodes | 1000 | 1000 in each of 5 runs | 1000 |
    | seed | 1385 | 1234 + run | 0 |
    | size | original | 417x417 | 400x400 |
    | labels resized by | - | Pillow's "nearest" | torch's "nearest" |
    | pixels 255 of the query | background | ignored | ignored |
    | small objects | left out | kept | kept |

    "oslsm" takes every item in turn, shuffled by Python 2's rule, and random others of its class. "panet" draws a
    class, then K + 1 of its images. "hsnet" takes every item in turn as query, and draws supports that may repeat.

    Args:
        name: which protocol.
        shots: K, 1 or more.
        episodes: of a run.
        runs: with seeds one apart; scores are means over them.
        seed: of the first run.
        size: rows and columns that images and labels are resized to, or "original".
        border: what pixels 255 count as in the query; in supports, only "object" makes them part of the mask.
        small_objects: whether items that `is_small` says are small count.
        roles: "oslsm" only: "oslsm", the item in turn is the query; "sgone_1shot", as in SG-One's official script with
            one shot, it is the support.

    Raises:
        ValueError: an argument outside its range.

    Source: the code of OSLSM, PANet (https://github.com/kaixin96/PANet) and HSNet
    (https://github.com/juhongm999/hsnet); sizes and counts of images follow from their lists, which are not shipped.

    Example:
        >>> print(Protocol("panet", shots=5).describe())
        panet, 5-shot: 5 runs of 1000 episodes, seeds 1234-1238, a random class, then random images of it, small \
objects kept; scored at 417x417, pixels 255 ignored
    """

    name: Literal["oslsm", "panet", "hsnet"] = "oslsm"
    shots: int = 1
    episodes: int | None = None
    runs: int | None = None
    seed: int | None = None
    size: tuple[int, int] | Literal["original"] | None = None
    border: Border | None = None
    small_objects: bool | None = None
    roles: Literal["oslsm", "sgone_1shot"] = "oslsm"

    def __post_init__(self) -> None:
        for name, value, valid in (
            ("name", self.name, tuple(_PROTOCOLS)),
            ("border", self.border, (None, *get_args(Border))),
            ("roles", self.roles, ("oslsm", "sgone_1shot")),
        ):
            if value not in valid:
                raise ValueError(f"{name} must be one of {', '.join(map(str, valid))}, got {value!r}")
        if self.roles == "sgone_1shot" and (self.name != "oslsm" or self.shots != 1):
            raise ValueError(f"roles 'sgone_1shot' are of oslsm with 1 shot, got {self.name} with {self.shots}")
        for name, number in (("shots", self.shots), ("episodes", self.episodes), ("runs", self.runs)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be 1 or more, got {number}")
        if self.seed is not None and not 0 <= self.seed < 2**32 - (self.runs or 5):
            raise ValueError(f"seed must be from 0 to below 2**32, got {self.seed}")
        if isinstance(self.size, tuple | list) and (len(self.size) != 2 or min(self.size) < 1):
            raise ValueError(f"size must be rows and columns, 1 or more, or 'original', got {self.size}")

    def _value(self, name: str) -> Any:
        given = getattr(self, name)
        return getattr(_PROTOCOLS[self.name], name) if given is None else given

    @property
    def seeds(self) -> range:
        """The seed of each run."""
        return range(self._value("seed"), self._value("seed") + self._value("runs"))

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Rows and columns that images are resized to; None: they keep their size."""
        size = self._value("size")
        return None if size == "original" else (int(size[0]), int(size[1]))

    @property
    def query_border(self) -> Border:
        """What pixels 255 of a query count as."""
        border: Border = self._value("border")
        return border

    @property
    def label_resize(self) -> LabelResize:
        """How labels are resized: as the code of the protocol does."""
        return _PROTOCOLS[self.name].label_resize

    @property
    def keeps_small_objects(self) -> bool:
        """Whether small objects are items."""
        return bool(self._value("small_objects"))

    def draw(self, items: Sequence[Item]) -> list[Draw]:
        """The episodes of all runs. Classes with no more than `shots` images are left out.

        Args:
            items: in the order of the protocol: that of the list of images, or of a published list of items.

        Raises:
            DataError: no class has more than `shots` images.
        """
        images = images_by_class(items)
        enough = {name for name, places in images.items() if len(places) > self.shots}
        items = [item for item in items if item.class_index in enough]
        if not items:
            raise DataError(f"no class has the {self.shots + 1} images that an episode of {self.shots} shots needs")
        images = images_by_class(items)
        sampler = {"oslsm": _draw_oslsm, "panet": _draw_panet, "hsnet": _draw_hsnet}[self.name]
        draws = [
            Draw(class_index, support, query, seed)
            for seed in self.seeds
            for class_index, support, query in sampler(items, images, self.shots, self._value("episodes"), seed)
        ]
        if self.roles == "sgone_1shot":
            draws = [Draw(one.class_index, (one.query,), one.support[0], one.seed) for one in draws]
        return draws

    def describe(self, *, items: str | None = None, changed: bool = False) -> str:
        """Everything that a score depends on, in a line.

        Args:
            items: the list that the items are from, where they were not looked for in labels.
            changed: whether something else, such as the list of images, is not as the protocol has it.
        """
        seeds, episodes = self.seeds, self._value("episodes")
        runs = f"{len(seeds)} runs of {episodes} episodes" if len(seeds) > 1 else f"{episodes} episodes"
        which = f"seeds {seeds[0]}-{seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"
        rule = _PROTOCOLS[self.name].rule
        if self.name == "oslsm":
            rule += " as support" if self.roles == "sgone_1shot" else " as query"
        found = f"items of {items}" if items else f"small objects {'kept' if self.keeps_small_objects else 'left out'}"
        name = f"{self.name} (changed)" if changed or self.changed else self.name
        return f"{name}, {self.shots}-shot: {runs}, {which}, {rule}, {found}; {self.describe_scoring()}"

    def describe_scoring(self) -> str:
        """How episodes are scored, whichever they are."""
        size = self.image_size
        border = "ignored" if self.query_border == "ignore" else f"counted as {self.query_border}"
        return f"scored at {f'{size[0]}x{size[1]}' if size else 'original size'}, pixels 255 {border}"

    @property
    def changed(self) -> bool:
        """Whether anything is not as the protocol of that name has it."""
        defaults = _PROTOCOLS[self.name]
        names = ("episodes", "runs", "seed", "border", "small_objects")
        same = all(self._value(name) == getattr(defaults, name) for name in names)
        return not same or self.image_size != (None if defaults.size == "original" else defaults.size)


def images_by_class(items: Iterable[Item]) -> dict[int, list[int]]:
    """The places of the images of each class, in the order of the items; classes in increasing order.

    Example:
        >>> images_by_class([Item(0, 2), Item(0, 5), Item(1, 2)])
        {2: [0, 1], 5: [0]}
    """
    found: dict[int, list[int]] = {}
    for item in items:
        found.setdefault(item.class_index, []).append(item.image)
    return dict(sorted(found.items()))


Parts = tuple[int, tuple[int, ...], int]  # class index, supports and query of an episode


def _draw_oslsm(
    items: Sequence[Item], images: Mapping[int, Sequence[int]], shots: int, episodes: int, seed: int
) -> Iterator[Parts]:
    rng = random.Random(seed)
    order: list[Item] = []
    for _ in range(episodes):
        if not order:
            order = shuffled_as_python2(items, rng)[::-1]
        query, class_index = order.pop()
        others = [image for image in images[class_index] if image != query]
        yield class_index, tuple(shuffled_as_python2(others, rng)[:shots]), query


def _draw_panet(
    items: Sequence[Item], images: Mapping[int, Sequence[int]], shots: int, episodes: int, seed: int
) -> Iterator[Parts]:
    rng = random.Random(seed)
    rng.choices(range(1), k=1)  # which of the episode's classes the query is of: only one here, but it is drawn
    classes = list(images)
    for _ in range(episodes):
        class_index = classes[rng.sample(range(len(classes)), k=1)[0]]
        *support, query = (
            images[class_index][place] for place in rng.sample(range(len(images[class_index])), k=shots + 1)
        )
        yield class_index, tuple(support), query


def _draw_hsnet(
    items: Sequence[Item], images: Mapping[int, Sequence[int]], shots: int, episodes: int, seed: int
) -> Iterator[Parts]:
    rng = np.random.RandomState(seed)
    for number in range(episodes):
        query, class_index = items[number % len(items)]
        support: list[int] = []
        while len(support) < shots:
            drawn = images[class_index][int(rng.choice(len(images[class_index]), 1, replace=False)[0])]
            if drawn != query:
                support.append(drawn)
        yield class_index, tuple(support), query


def shuffled_as_python2(items: Sequence[Any], rng: random.Random) -> list[Any]:
    """A shuffled copy, in the order that Python 2's ``random.shuffle`` gives; Python 3's is another.

    Example:
        >>> shuffled_as_python2(range(10), random.Random(1385))
        [8, 5, 3, 6, 0, 2, 7, 4, 9, 1]
    """
    result = list(items)
    for last in range(len(result) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        result[last], result[other] = result[other], result[last]
    return result


# ------------------------------------------------------------------------------------------------------ files


@dataclass(frozen=True)
class Episode:
    """An episode by the names of its images, as it is saved.

    `class_index` is the index of the class in its data set; `fold` is None where there are no folds.
    """

    fold: int | None
    class_index: int
    support: tuple[str, ...]
    query: str
    protocol: str
    seed: int


def write_episodes(path: str | Path, episodes: Iterable[Episode]) -> None:
    """Write episodes as JSON lines with fold, class, support, query, protocol and seed. Missing folders are made.

    Example:
        >>> write_episodes("pairs.jsonl", [Episode(0, 1, ("2007_000033",), "2007_000061", "oslsm", 1385)])
        >>> print(open("pairs.jsonl").read().strip())
        {"fold": 0, "class": 1, "support": ["2007_000033"], "query": "2007_000061", "protocol": "oslsm", "seed": 1385}
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for episode in episodes:
        fields = asdict(episode)
        lines.append(json.dumps({"class" if name == "class_index" else name: fields[name] for name in fields}))
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_episodes(path: str | Path) -> list[Episode]:
    """Read what `write_episodes` wrote.

    Raises:
        DataError: no such file, no episodes, a line that is none, a query that is among its supports, or numbers of
            supports that differ.

    Example:
        >>> episode = Episode(None, 3, ("a", "b"), "c", "hsnet", 0)
        >>> write_episodes("pairs.jsonl", [episode])
        >>> read_episodes("pairs.jsonl") == [episode]
        True
    """
    expected = "fold, class, support, query, protocol and seed"
    episodes: list[Episode] = []
    for number, line in _lines(path, "episodes as JSON lines"):
        try:
            fields = json.loads(line)
            episode = Episode(
                fold=None if fields["fold"] is None else int(fields["fold"]),
                class_index=int(fields["class"]),
                support=tuple(map(str, fields["support"])),
                query=str(fields["query"]),
                protocol=str(fields["protocol"]),
                seed=int(fields["seed"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}: expected an episode with {expected}, got {line[:80]!r}") from error
        if not episode.support or (episodes and len(episode.support) != len(episodes[0].support)):
            wanted = f"{len(episodes[0].support)} supports as above" if episodes else "supports"
            raise DataError(f"{path}:{number}: expected {wanted}, got {len(episode.support)}")
        if episode.query in episode.support:
            raise DataError(f"{path}:{number}: the query {episode.query!r} is one of its own supports")
        episodes.append(episode)
    if not episodes:
        raise DataError(f"{path}: no episodes in it")
    return episodes


# ------------------------------------------------------------------------------------------------------ data sets


class EpisodeItem(TypedDict):
    """One episode. Labels are 0 background, 1 object, 255 ignored.

    `image` is the query, uint8 RGB [3, H, W] (float32 after a normalising transform), `label` int64 [H, W]; `support`
    and `support_mask` are the K supports, [3, h, w] likewise and bool [1, h, w], each of a size of its own; `name` is
    the query's, `run` the number of the seed.
    """

    image: Tensor
    label: Tensor
    support: list[Tensor]
    support_mask: list[Tensor]
    class_index: int
    run: int
    name: str


def object_label(label: Tensor, class_index: int, border: Border) -> Tensor:
    """A class against all else: 1 and 0, and 255 where pixels are ignored.

    Args:
        label: class indices of any shape, 255 at the border of objects.
        class_index: of the object.
        border: what becomes of pixels 255: "ignore" keeps them, "background" makes them 0, "object" 1.

    Example:
        >>> label = torch.tensor([0, 3, 5, 255])
        >>> [object_label(label, 3, border).tolist() for border in ("ignore", "background", "object")]
        [[0, 1, 0, 255], [0, 1, 0, 0], [0, 1, 0, 1]]
    """
    value = {"ignore": IGNORE_INDEX, "background": 0, "object": 1}[border]
    return (label == class_index).long().masked_fill(label == IGNORE_INDEX, value)


class EpisodeDataset(Dataset[EpisodeItem]):
    """Fixed episodes of a data set.

    Args:
        dataset: where images and labels come from; its own transform is not applied.
        draws: the episodes.
        border: of the query, see `object_label`; pixels 255 are part of a support's mask with "object" only.
        transform: applied to the query and to each support.
        seeds: of the runs, in their order.
        size: rows and columns that pictures and labels are resized to before, or None. Images are resized bilinearly
            (antialiased), labels to the nearest pixel.
        label_resize: which pixel that is.
        first_support_size: resize the other supports of an episode to the size of the first, as SG-One's official
            scripts with five shots do.

    Example:
        >>> from gingham.data import CueScenes
        >>> scenes = CueScenes("val", 4)
        >>> episodes = EpisodeDataset(scenes, Protocol(episodes=3, small_objects=True).draw(find_items(scenes, (1, 2))))
        >>> len(episodes), episodes[0]["image"].shape, episodes[0]["support_mask"][0].shape
        (3, torch.Size([3, 64, 64]), torch.Size([1, 64, 64]))
    """

    ignore_index = IGNORE_INDEX

    def __init__(
        self,
        dataset: SegmentationDataset,
        draws: Sequence[Draw],
        *,
        border: Border = "ignore",
        transform: Transform | None = None,
        seeds: Sequence[int] = (),
        size: tuple[int, int] | None = None,
        label_resize: LabelResize = "nearest-exact",
        first_support_size: bool = False,
    ) -> None:
        self.dataset, self.draws, self.border, self.transform = dataset, list(draws), border, transform
        self.size, self.label_resize, self.first_support_size = size, label_resize, first_support_size
        self._runs = {seed: run for run, seed in enumerate(seeds)}

    @property
    def class_names(self) -> tuple[str, ...]:
        return EPISODE_LABELS.names

    @property
    def palette(self) -> tuple[Colour, ...]:
        return EPISODE_LABELS.palette

    def __len__(self) -> int:
        return len(self.draws)

    def read(self, index: int) -> dict[str, Any]:
        """The query before its transform, and what the first support shows, for pictures."""
        class_index, support, query, _ = self.draws[index]
        asked, shown = (
            resize_item(self.dataset.read(image), self.size, self.label_resize) for image in (query, support[0])
        )
        mask = object_label(shown["label"], class_index, "ignore")
        return {"image": asked["image"], "views": {"support": (shown["image"], mask)}}

    def __getitem__(self, index: int) -> EpisodeItem:
        class_index, support, query, seed = self.draws[index]
        item = assemble(
            self.dataset,
            class_index,
            support,
            query,
            border=self.border,
            transform=self.transform,
            size=self.size,
            label_resize=self.label_resize,
            first_support_size=self.first_support_size,
        )
        return {**item, "run": self._runs.get(seed, 0)}


class RandomEpisodes(Dataset[EpisodeItem]):
    """Episodes for training, drawn anew at each visit: a class, then K + 1 of its images, all equally likely.

    Random numbers are torch's. Classes with too few images are left out.

    Args:
        dataset: where images and labels come from; its own transform is not applied.
        items: which classes are in which images.
        shots: K, 1 or more.
        length: episodes of an epoch.
        border: of query and supports, see `object_label`.
        transform: applied to the query and to each support.

    Raises:
        DataError: no class has more than K images.

    Source: SG-One's official code, whose third image, of another class, is not used there either.

    Example:
        >>> from gingham.data import CueScenes
        >>> scenes = CueScenes("val", 4)
        >>> RandomEpisodes(scenes, find_items(scenes, (1, 2)), shots=1, length=8)[0]["class_index"] in (1, 2)
        True
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        items: Sequence[Item],
        *,
        shots: int,
        length: int,
        border: Border = "ignore",
        transform: Transform | None = None,
    ) -> None:
        self.dataset, self.shots, self.length = dataset, shots, length
        self.border, self.transform = border, transform
        self.images = {name: images for name, images in images_by_class(items).items() if len(images) > shots}
        if not self.images:
            raise DataError(f"no class has the {shots + 1} images that an episode of {shots} shots needs")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> EpisodeItem:
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} out of range for {self.length} episodes")
        class_index = list(self.images)[int(torch.randint(len(self.images), ()))]
        images = self.images[class_index]
        query, *support = (images[place] for place in torch.randperm(len(images))[: self.shots + 1].tolist())
        return assemble(self.dataset, class_index, support, query, border=self.border, transform=self.transform)


def assemble(
    dataset: SegmentationDataset,
    class_index: int,
    support: Sequence[int],
    query: int,
    *,
    border: Border,
    transform: Transform | None,
    size: tuple[int, int] | None = None,
    label_resize: LabelResize = "nearest-exact",
    first_support_size: bool = False,
) -> EpisodeItem:
    """Read an episode, see `EpisodeDataset` for the arguments."""

    def binary(index: int, of_border: Border) -> SegmentationItem:
        item = resize_item(dataset.read(index), size, label_resize)
        return {**item, "label": object_label(item["label"], class_index, of_border)}

    def transformed(item: SegmentationItem) -> SegmentationItem:
        return item if transform is None else transform(item)

    supports = [binary(index, border) for index in support]
    if first_support_size:
        rows, columns = supports[0]["label"].shape
        supports = [resize_item(item, (rows, columns), label_resize) for item in supports]
    asked = transformed(binary(query, border))
    supports = [transformed(item) for item in supports]
    return {
        "image": asked["image"],
        "label": asked["label"],
        "support": [item["image"] for item in supports],
        "support_mask": [(item["label"] == 1)[None] for item in supports],
        "class_index": class_index,
        "run": 0,
        "name": asked["name"],
    }


def resize_item(
    item: SegmentationItem, size: tuple[int, int] | None, label_resize: LabelResize = "nearest-exact"
) -> SegmentationItem:
    """Bring an item that was not normalised to a size: the image bilinearly, its label to the nearest pixel.

    Args:
        item: as a data set's `read` gives it.
        size: rows and columns; None: those it has.
        label_resize: which pixel of the label is the nearest.
    """
    if size is None or item["label"].shape == size:
        return item
    image = F.interpolate(item["image"][None].float(), size=size, mode="bilinear", antialias=True)[0]
    label = F.interpolate(item["label"][None, None].float(), size=size, mode=label_resize)[0, 0]
    return {**item, "image": image.round().to(torch.uint8), "label": label.long()}


def collate_episodes(items: Sequence[EpisodeItem]) -> dict[str, Any]:
    """A batch of episodes: "image" [B, 3, H, W], "label" [B, H, W], "class_index" and "run" [B], a list "name", and the
    lists "support" of K [B, 3, h, w] and "support_mask" of K [B, 1, h, w].

    Raises:
        DataError: queries, or supports of the same number, differ in size.
    """
    shots = len(items[0]["support"])
    columns = [[item["image"] for item in items], *([item["support"][shot] for item in items] for shot in range(shots))]
    for images in columns:
        if len({image.shape for image in images}) > 1:
            sizes = " and ".join(sorted({f"{image.shape[2]}x{image.shape[1]}" for image in images})[:2])
            raise DataError(
                f"episodes of one batch differ in size ({sizes}): resize them (data.train_size, data.protocol.size), "
                "or take batches of 1"
            )
    return {
        "image": torch.stack(columns[0]),
        "label": torch.stack([item["label"] for item in items]),
        "support": [torch.stack(images) for images in columns[1:]],
        "support_mask": [torch.stack([item["support_mask"][shot] for item in items]) for shot in range(shots)],
        "class_index": torch.tensor([item["class_index"] for item in items]),
        "run": torch.tensor([item["run"] for item in items]),
        "name": [item["name"] for item in items],
    }
