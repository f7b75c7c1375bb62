"""Point annotation: a few labelled pixels in each image instead of a mask.

Protocol: Qian et al., Weakly Supervised Scene Parsing with Point-Based Distance Metric Learning,
https://arxiv.org/abs/1811.02233, and Bearman et al., What's the Point, https://arxiv.org/abs/1506.02106. The points of
an image are rows (class, y, x): a class index, a row and a column, counted from 0 at the upper left pixel. Public point
files are read by `gingham.data.point_formats`.
"""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch.utils.data import default_collate

from gingham.data.labels import IGNORE_INDEX
from gingham.data.segmentation import SegmentationDataset, SegmentationItem
from gingham.errors import DataError

_HEADER = re.compile(r"# points v1 order=c,y,x base=0 classes=(\d+)")


class PointItem(SegmentationItem):
    """A picture with its label and its points, float32 [N, 3]: class, y, x."""

    points: torch.Tensor


#: What gives the points [N, 3] of an item: a `PointSet` that was read or drawn, or a `PointGenerator`.
PointSource = Callable[[SegmentationItem], torch.Tensor]


@dataclass(frozen=True)
class PointSet:
    """The points of many images, by name.

    Args:
        num_classes: K.
        points: of each image, integers [N, 3]: class, y, x.
        source: the file, for error texts.
        lines: the line of that file in which an image stands, for error texts.

    Raises:
        ValueError: points that are not [N, 3].
        DataError: a class outside 0 to K - 1, or a coordinate below 0.

    Example:
        >>> points = PointSet(2, {"cat": np.array([[1, 5, 9]])})
        >>> points({"image": torch.zeros(3, 8, 12), "label": torch.zeros(8, 12), "name": "cat"})
        tensor([[1., 5., 9.]])
    """

    num_classes: int
    points: Mapping[str, NDArray[np.int64]]
    source: str = "points"
    lines: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, rows in self.points.items():
            if rows.ndim != 2 or rows.shape[1] != 3:
                raise ValueError(f"points must be [N, 3] for each image, got {list(rows.shape)} for {name}")
            if len(wrong := rows[(rows[:, 0] < 0) | (rows[:, 0] >= self.num_classes)]):
                raise DataError(
                    f"{self._place(name)}: class {wrong[0, 0]} of {name} is none of 0 to {self.num_classes - 1}"
                )
            if len(wrong := rows[(rows[:, 1:] < 0).any(1)]):
                raise DataError(f"{self._place(name)}: point y={wrong[0, 1]}, x={wrong[0, 2]} of {name} lies below 0")

    def __call__(self, item: SegmentationItem) -> torch.Tensor:
        """The points of an item, float32 [N, 3].

        Raises:
            DataError: the image has no entry, or a point lies outside it.
        """
        name = item["name"]
        if name not in self.points:
            raise DataError(f"{self.source}: no points for image {name}; an image without any has a line of its own")
        height, width = item["image"].shape[-2:]
        self.check_bounds({name: (height, width)})
        return torch.from_numpy(self.points[name].astype(np.float32))

    def check_bounds(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Look whether every point lies within its image; one written as x,y rather than y,x soon does not.

        Args:
            sizes: (H, W) of the images to look at.

        Raises:
            DataError: a point lies outside.
        """
        for name, (height, width) in sizes.items():
            rows = self.points[name]
            outside = rows[(rows[:, 1] >= height) | (rows[:, 2] >= width)]
            if len(outside):
                raise DataError(
                    f"{self._place(name)}: point y={outside[0, 1]}, x={outside[0, 2]} lies outside image {name}, which "
                    f"has {height} rows and {width} columns; the order is class,y,x"
                )

    def _place(self, name: str) -> str:
        return f"{self.source}, line {self.lines[name]}" if name in self.lines else self.source


def read_points(path: str | Path) -> PointSet:
    """Read a point file that `write_points` wrote.

    UTF-8 text. The first line is ``# points v1 order=c,y,x base=0 classes=K``; each line after it is the name of an
    image and its points ``c,y,x``, integers, separated by blanks. A warning tells of lines that are empty and of images
    without points.

    Args:
        path: the file.

    Returns:
        The points. Whether they lie within their images shows when they are asked for, or by `PointSet.check_bounds`.

    Raises:
        DataError: no such file, another first line, a line that is not as above, an image named twice, a class outside
            0 to K - 1, or a coordinate below 0; the text names file and line.

    Example:
        >>> path = Path("points.txt")
        >>> write_points(path, PointSet(2, {"cat": np.array([[1, 5, 9], [0, 0, 3]])}))
        >>> print(path.read_text(), end="")
        # points v1 order=c,y,x base=0 classes=2
        cat 1,5,9 0,0,3
        >>> read_points(path).points["cat"].tolist()
        [[1, 5, 9], [0, 0, 3]]
    """
    lines = read_lines(path)
    header = _HEADER.fullmatch(lines[0].strip()) if lines else None
    if header is None:
        raise DataError(
            f"{path}, line 1: expected '# points v1 order=c,y,x base=0 classes=K'; other formats are read by "
            f"gingham.data.point_formats"
        )
    return parse_lines(path, lines, int(header[1]), first_line=2)


def write_points(path: str | Path, points: PointSet) -> None:
    """Write points in the format that `read_points` reads, byte for byte the same for the same points.

    Args:
        path: the file; its folder must exist.
        points: what to write, in its order.

    Raises:
        ValueError: an image's name contains a blank.
    """
    if blank := next((name for name in points.points if len(name.split()) != 1), None):
        raise ValueError(f"points must be of images whose names contain no blanks, got {blank!r}")
    lines = [f"# points v1 order=c,y,x base=0 classes={points.num_classes}"]
    for name, rows in points.points.items():
        lines.append(" ".join([name, *(f"{c},{y},{x}" for c, y, x in rows)]))
    Path(path).write_bytes("".join(f"{line}\n" for line in lines).encode())


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file.

    Raises:
        DataError: no such file, or not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text file in UTF-8") from error


def parse_lines(
    path: str | Path,
    lines: Sequence[str],
    num_classes: int,
    *,
    first_line: int = 1,
    first_class: int = 0,
    fields: Sequence[str] = ("c", "y", "x"),
) -> PointSet:
    """The points of lines ``NAME c,y,x c,y,x ...``, as several formats have them.

    Args:
        path: of the file, for error texts.
        lines: all lines of the file.
        num_classes: K.
        first_line: the line with which points begin, counted from 1.
        first_class: the number in the file that stands for class 0.
        fields: what the numbers of a point are, "c", "y" and "x" among them.

    Raises:
        DataError: as `read_points`.
    """
    columns = [fields.index(name) for name in ("c", "y", "x")]
    points: dict[str, NDArray[np.int64]] = {}
    places: dict[str, int] = {}
    empty: list[int] = []
    for number, line in enumerate(lines[first_line - 1 :], first_line):
        name, *words = line.split() or [""]
        if not words:
            empty.append(number)
        if not name:
            continue
        if name in points:
            raise DataError(f"{path}, line {number}: image {name} stands in line {places[name]} already")
        try:
            rows = np.array([_numbers(word, len(fields)) for word in words], np.int64).reshape(-1, len(fields))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}, expected {','.join(fields)} in whole numbers") from None
        points[name] = rows[:, columns] - np.array([first_class, 0, 0])
        places[name] = number
    if empty:
        more = f" and {len(empty) - 1} more lines" if len(empty) > 1 else ""
        warnings.warn(f"{path}: no points in line {empty[0]}{more}", stacklevel=3)
    return PointSet(num_classes, points, str(path), places)


def _numbers(word: str, count: int) -> list[int]:
    parts = word.split(",")
    if len(parts) != count or not all(re.fullmatch(r"-?\d{1,18}", part) for part in parts):
        raise ValueError(f"point {word!r}")
    return [int(part) for part in parts]


@dataclass(frozen=True)
class PointGenerator:
    """Draws points from masks, for whoever has masks and wants to know what points would give.

    The points of an image follow from the seed, the image's name and its mask alone. Pixels are drawn evenly, without
    repetition.

    Args:
        rule: points "per_class" that is in the image, or "per_region": for each connected part of a class (pixels that
            share an edge).
        count: points of each class or region; fewer where it has fewer pixels.
        margin: pixels to stay away from other classes; a region that is thinner throughout is drawn from as it is.
        least_pixels: "per_region" only: smaller regions have no points.
        seed: 0 or above.

    Raises:
        ValueError: a number outside its range, or an unknown rule.

    Source: that the published points were drawn in either way is not confirmed; a public file for PASCAL-Context has
        one evenly drawn pixel per class.

    Example:
        >>> from gingham.data import CueScenes
        >>> item = CueScenes("val", 1)[0]
        >>> points = PointGenerator("per_class")(item)
        >>> sorted(points[:, 0].int().tolist()) == item["label"].unique().tolist()
        True
    """

    rule: Literal["per_class", "per_region"] = "per_class"
    count: int = 1
    margin: int = 0
    least_pixels: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rule not in ("per_class", "per_region"):
            raise ValueError(f"rule must be 'per_class' or 'per_region', got {self.rule!r}")
        for name, value, least in (
            ("count", self.count, 1),
            ("margin", self.margin, 0),
            ("least_pixels", self.least_pixels, 1),
            ("seed", self.seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")

    def __call__(self, item: SegmentationItem) -> torch.Tensor:
        """Points of an item that has not been transformed, float32 [N, 3]."""
        rng = np.random.default_rng([self.seed, zlib.crc32(item["name"].encode())])
        label = item["label"].numpy()
        rows = [
            [class_index, y, x]
            for class_index in np.unique(label[label != IGNORE_INDEX])
            for region in self._regions(label == class_index)
            for y, x in draw_pixels(rng, region, self.count, self.margin)
        ]
        return torch.tensor(rows, dtype=torch.float32).reshape(-1, 3)

    def _regions(self, mask: NDArray[np.bool_]) -> Iterable[NDArray[np.bool_]]:
        if self.rule == "per_class":
            return [mask]
        numbered, _ = ndimage.label(mask)
        sizes = np.bincount(numbered.ravel())
        return [numbered == number for number in range(1, len(sizes)) if sizes[number] >= self.least_pixels]


def draw_pixels(
    rng: np.random.Generator, mask: NDArray[np.bool_], count: int = 1, margin: int = 0
) -> NDArray[np.int64]:
    """Draw pixels of a mask evenly and without repetition, rows (y, x).

    Args:
        rng: draws.
        mask: [H, W].
        count: how many; fewer where the mask has fewer.
        margin: pixels to stay away from what is not in the mask, if any pixel is that far away.
    """
    inner = mask
    if margin:
        # Beyond the picture's edge a class goes on, as far as anyone can tell.
        inner = ndimage.binary_erosion(mask, np.ones((2 * margin + 1,) * 2), border_value=1)
    pixels = np.argwhere(inner if inner.any() else mask)
    return pixels[rng.choice(len(pixels), min(count, len(pixels)), replace=False)]


def draw_points(dataset: SegmentationDataset, generator: PointGenerator) -> PointSet:
    """The points that a generator draws from every mask of a data set, to be written by `write_points`.

    Args:
        dataset: read without its transform.
        generator: draws.

    Example:
        >>> from gingham.data import CueScenes
        >>> points = draw_points(CueScenes("val", 2), PointGenerator("per_class", margin=1))
        >>> list(points.points)
        ['wardrobe_val_000000', 'wardrobe_val_000001']
    """
    items = (dataset.read(index) for index in range(len(dataset)))
    drawn = {item["name"]: generator(item).numpy().astype(np.int64) for item in items}
    return PointSet(dataset.num_classes, drawn, source=f"points drawn from {dataset.split}")


class WithPoints(SegmentationDataset):
    """A data set whose items have points too; the transforms of `gingham.data.transforms` carry them along.

    Args:
        dataset: gives images and labels; its transform is applied after the points are added.
        source: gives the points of an item as it is stored.

    Raises:
        DataError: the points are of another number of classes.

    Example:
        >>> from gingham.data import CueScenes
        >>> scenes = WithPoints(CueScenes("val", 1), PointGenerator())
        >>> scenes[0]["points"].dtype
        torch.float32
    """

    def __init__(self, dataset: SegmentationDataset, source: PointSource) -> None:
        super().__init__(dataset.split, dataset.labels, dataset.transform)
        if isinstance(source, PointSet) and source.num_classes != dataset.num_classes:
            raise DataError(
                f"{source.source}: points of {source.num_classes} classes, the data set has {dataset.num_classes}"
            )
        self.dataset = dataset
        self.source = source

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> PointItem:
        item = self.dataset.read(index)
        return {**item, "points": self.source(item)}


class PointAgreement(NamedTuple):
    """How many points lie on labelled pixels, and how many of these on their own class."""

    labelled: int
    agreeing: int


def point_agreement(dataset: WithPoints, indices: Iterable[int] | None = None) -> PointAgreement:
    """Count how often the class of a point is that of the mask under it; few mean that one of them is in another order.

    Args:
        dataset: read without its transform.
        indices: which items, all by default.

    Example:
        >>> from gingham.data import CueScenes
        >>> point_agreement(WithPoints(CueScenes("val", 1), PointGenerator(count=5)))
        PointAgreement(labelled=25, agreeing=25)
    """
    labelled = agreeing = 0
    for index in range(len(dataset)) if indices is None else indices:
        item = dataset.read(index)
        classes, y, x = item["points"].long().unbind(1)
        under = item["label"][y, x]
        labelled += int((under != IGNORE_INDEX).sum())
        agreeing += int((under == classes).sum())
    return PointAgreement(labelled, agreeing)


def nearest_pixels(positions: torch.Tensor) -> torch.Tensor:
    """The pixels, int64, on which positions lie; of two as near, the later one, wherever a picture is cut."""
    return (positions + 0.5).floor().long()


def collate_points(items: Sequence[Any]) -> dict[str, Any]:
    """A batch of items with points; images with fewer are filled up with points of class 255.

    Points are pixels now: of whole numbers, which a training in low precision leaves as they are.

    Args:
        items: as `WithPoints` gives them, of one size.

    Returns:
        What torch's default collation gives, and "points" int64 [B, N, 3] with the largest N of the batch.

    Example:
        >>> one, two = {"points": torch.tensor([[3.0, 1.4, 2.5]])}, {"points": torch.zeros(0, 3)}
        >>> collate_points([one, two])["points"].tolist()
        [[[3, 1, 3]], [[255, 0, 0]]]
    """
    most = max(len(item["points"]) for item in items)
    points = torch.tensor([IGNORE_INDEX, 0, 0]).repeat(len(items), most, 1)
    for row, item in zip(points, items, strict=True):
        row[: len(item["points"])] = nearest_pixels(item["points"])
    others = [{name: value for name, value in item.items() if name != "points"} for item in items]
    return {**default_collate(others), "points": points}
