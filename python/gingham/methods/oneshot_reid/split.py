"""Which images of the target are labelled: k of every person, as a list that can be kept in a file.

Paper: Fu et al., One Shot Domain Adaptation for Person Re-Identification, https://arxiv.org/abs/1811.10144v1; the rules
are those of the authors' later code ("first") and of EUG, https://github.com/Yu-Wu/Exploit-Unknown-Gradually, which it
is built on ("random").
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain, pairwise, zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gingham.errors import DataError

Rule = Literal["random", "first"]


@dataclass(frozen=True)
class OneShotSplit:
    """The labelled images of a data set.

    Args:
        dataset: what the data set is called.
        shots: k, images of each person, fewer where a person has fewer.
        seed: of rule "random".
        rule: how images were chosen, see `one_shot_split`.
        labelled: their names, sorted.
    """

    dataset: str
    shots: int
    seed: int
    rule: Rule
    labelled: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Of the names, one a line."""
        return hashlib.sha256("".join(f"{name}\n" for name in self.labelled).encode()).hexdigest()


def one_shot_split(
    persons: NDArray[np.int64],
    cameras: NDArray[np.int64],
    names: Sequence[str],
    *,
    dataset: str = "",
    shots: int = 1,
    seed: int = 0,
    rule: Rule = "random",
) -> OneShotSplit:
    """Choose k images of every person, cameras in turn, beginning with the lowest that has one.

    Args:
        persons: [N], of the training images.
        cameras: [N].
        names: N different names.
        dataset: what the split calls the data set.
        shots: k, 1 or more. A person with fewer images gives all of them.
        seed: of rule "random"; what a person gets follows from (seed, its number) alone.
        rule: "first": the first image of each camera in the order of the names, then the second of each, ... "random":
            the same with the images of each camera in a random order.

    Returns:
        The split.

    Raises:
        ValueError: lengths that differ, or a number or a rule outside its range.
        DataError: a name twice.

    Source: the authors' later code, whose loop never ends where a person has too few images; EUG draws one image only.

    Example:
        >>> persons, cameras = np.array([0, 0, 0, 1]), np.array([2, 0, 0, 1])
        >>> one_shot_split(persons, cameras, ["a", "b", "c", "d"], shots=2, rule="first").labelled
        ('a', 'b', 'd')
    """
    if shots < 1:
        raise ValueError(f"shots must be 1 or more, got {shots}")
    if rule not in ("random", "first"):
        raise ValueError(f"rule must be 'random' or 'first', got {rule!r}")
    if not len(persons) == len(cameras) == len(names):
        raise ValueError(
            f"persons, cameras and names must be as many, got {len(persons)}, {len(cameras)}, {len(names)}"
        )
    order = sorted(range(len(names)), key=lambda index: names[index])
    if twice := next((names[one] for one, other in pairwise(order) if names[one] == names[other]), None):
        raise DataError(f"names must be different, there are two images {twice!r}")
    sightings: dict[int, dict[int, list[int]]] = {}
    for index in order:
        by_camera = sightings.setdefault(int(persons[index]), {})
        by_camera.setdefault(int(cameras[index]), []).append(index)
    chosen: list[str] = []
    for person, by_camera in sightings.items():
        generator = np.random.default_rng([abs(seed), seed < 0, person])
        images = [by_camera[camera] for camera in sorted(by_camera)]
        if rule == "random":
            images = [[camera[i] for i in generator.permutation(len(camera))] for camera in images]
        in_turn = [index for index in chain.from_iterable(zip_longest(*images)) if index is not None]
        chosen += [names[index] for index in in_turn[:shots]]
    return OneShotSplit(dataset, shots, seed, rule, tuple(sorted(chosen)))


def write_split(path: str | Path, split: OneShotSplit) -> None:
    """Write a split as JSON, with the hash of its names.

    Args:
        path: the file.
        split: what is written.
    """
    content = asdict(split) | {"sha256": split.sha256}
    Path(path).write_text(json.dumps(content, indent=1) + "\n")


def read_split(path: str | Path) -> OneShotSplit:
    """Read a split that `write_split` wrote, or that somebody wrote in its form.

    Args:
        path: JSON with ``dataset``, ``shots``, ``seed``, ``rule``, ``labelled`` and ``sha256``.

    Returns:
        The split.

    Raises:
        DataError: no such file, something else in it, or names that are not those of the hash.
    """
    try:
        content: Any = json.loads(Path(path).read_text())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{path}: is no JSON ({error})") from error
    fields = {"dataset": str, "shots": int, "seed": int, "rule": str, "labelled": list, "sha256": str}
    for name, kind in fields.items():
        if not isinstance(content, dict) or not isinstance(content.get(name), kind):
            raise DataError(f"{path}: no split, it has no {kind.__name__} {name!r}")
    if content["rule"] not in ("random", "first") or not all(isinstance(name, str) for name in content["labelled"]):
        raise DataError(f"{path}: no split, its rule or its names are something else")
    if len(set(content["labelled"])) < len(content["labelled"]):
        twice = next(name for name in content["labelled"] if content["labelled"].count(name) > 1)
        raise DataError(f"{path}: {twice} is labelled twice")
    given = content.pop("sha256")
    split = OneShotSplit(
        **{name: content[name] for name in fields if name != "sha256"} | {"labelled": tuple(content["labelled"])}
    )
    if split.sha256 != given:
        raise DataError(f"{path}: its names were changed, their sha256 is {split.sha256}, not {given}")
    return split
