"""Public files of point annotations, each read into a `PointSet`; `write_points` turns that into this package's format.

The files of PASCAL-Context, ADE20K and of VOC's instances are those of https://github.com/js-fan/PntWSSS, the clicks on
VOC those of Bearman et al., What's the Point, https://arxiv.org/abs/1506.02106.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gingham.data.points import PointSet, parse_lines, read_lines
from gingham.errors import DataError


def read_pascal_context_points(path: str | Path) -> PointSet:
    """``PascalContext_1point_0ignore_uniform.txt``: lines ``NAME c,y,x ...``, classes 1 to 59 in the official order.

    Args:
        path: the file.

    Returns:
        Points of the 59 classes of `gingham.data.pascal_context.PASCAL_CONTEXT_LABELS`.

    Raises:
        DataError: as `gingham.data.points.read_points`.

    Example:
        >>> path = Path("context.txt")
        >>> _ = path.write_text("2008_000912 13,297,166 32,419,205\\n")
        >>> read_pascal_context_points(path).points["2008_000912"].tolist()
        [[12, 297, 166], [31, 419, 205]]
    """
    return parse_lines(path, read_lines(path), 59, first_class=1)


def read_ade20k_points(path: str | Path) -> PointSet:
    """``ADE20k_points.txt``: lines ``NAME c,y,x ...`` with classes 0 to 149.

    Args:
        path: the file.

    Returns:
        Points of the 150 classes of `gingham.data.ade20k.ADE20K_LABELS`.

    Raises:
        DataError: as `gingham.data.points.read_points`.
    """
    return parse_lines(path, read_lines(path), 150)


def read_voc_instance_points(path: str | Path) -> PointSet:
    """``instance_points_1.txt`` of VOC 2012: lines ``NAME class,instance,y,x ...``, the background being instance 0.

    Args:
        path: the file.

    Returns:
        Points of the 21 classes of `gingham.data.voc.VOC_LABELS`; the numbers of the instances are left out.

    Raises:
        DataError: as `gingham.data.points.read_points`.

    Example:
        >>> path = Path("instances.txt")
        >>> _ = path.write_text("2011_003057 0,0,427,79 14,1,419,308\\n")
        >>> read_voc_instance_points(path).points["2011_003057"].tolist()
        [[0, 427, 79], [14, 419, 308]]
    """
    return parse_lines(path, read_lines(path), 21, fields=("c", "instance", "y", "x"))


def read_bearman_points(path: str | Path, *, ranks: Iterable[int] | None = None) -> PointSet:
    """The clicks of What's the Point on VOC 2012: JSON ``{name: [{"x", "y", "cls", "rank"}, ...]}``, classes 1 to 20.

    Clicks are fractions of pixels; each becomes the pixel that holds it. Background has no clicks.

    Args:
        path: the file.
        ranks: which clicks of an annotator on a class to keep, 1 being the first; all by default.

    Returns:
        Points of the 21 classes of `gingham.data.voc.VOC_LABELS`.

    Raises:
        DataError: no such file, or content that is not as above.

    Example:
        >>> path = Path("clicks.json")
        >>> _ = path.write_text('{"2008_007573": [{"x": 258.6, "y": 314.2, "cls": 7, "rank": 1}]}')
        >>> read_bearman_points(path).points["2008_007573"].tolist()
        [[7, 314, 258]]
    """
    kept = None if ranks is None else set(ranks)
    try:
        content = json.loads("\n".join(read_lines(path)))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    points: dict[str, NDArray[np.int64]] = {}
    try:
        for name, clicks in content.items():
            rows = [
                [int(click["cls"]), math.floor(click["y"]), math.floor(click["x"])]
                for click in clicks
                if kept is None or click["rank"] in kept
            ]
            points[name] = np.array(rows, np.int64).reshape(-1, 3)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: expected {{name: [{{x, y, cls, rank}}, ...]}} ({error!r})") from error
    return PointSet(21, points, str(path))
