"""Which frames of a tracklet are looked at together: indices only, for training and for evaluation."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

#: How the clips of a tracklet are chosen for evaluation, see `evaluation_clips`.
ClipSampling = Literal["dense", "evenly", "all"]


def random_clip(length: int, frames: int, generator: torch.Generator | None = None) -> NDArray[np.int64]:
    """Different frames of a tracklet in their order, drawn with replacement where it has too few.

    Args:
        length: of the tracklet, 1 or more.
        frames: T, 1 or more.
        generator: to draw from, torch's own by default.

    Returns:
        [T], rising.

    Example:
        >>> random_clip(3, 3)
        array([0, 1, 2])
    """
    _check(length, frames)
    if length < frames:
        drawn = torch.randint(length, (frames,), generator=generator)
    else:
        drawn = torch.randperm(length, generator=generator)[:frames]
    return np.sort(drawn.numpy())


def even_clip(length: int, frames: int) -> NDArray[np.int64]:
    """Frames at equal steps from the first on, ``i * floor(length / frames)``; a shorter tracklet begins again.

    Args:
        length: of the tracklet, 1 or more.
        frames: T, 1 or more.

    Returns:
        [T].

    Example:
        >>> even_clip(11, 4), even_clip(2, 3)
        (array([0, 2, 4, 6]), array([0, 1, 0]))
    """
    _check(length, frames)
    return np.arange(frames) % length if length < frames else np.arange(frames) * (length // frames)


def dense_clips(length: int, frames: int) -> NDArray[np.int64]:
    """All frames in clips that follow on each other; the last one is filled up with its own frames, from its first on.

    Args:
        length: of the tracklet, 1 or more.
        frames: T, 1 or more.

    Returns:
        [ceil(length / T), T].

    Example:
        >>> dense_clips(6, 4)
        array([[0, 1, 2, 3],
               [4, 5, 4, 5]])
    """
    _check(length, frames)
    clips = -(-length // frames)
    start = np.arange(clips)[:, None] * frames
    return start + np.arange(frames) % np.minimum(frames, length - start)


def all_frames(length: int) -> NDArray[np.int64]:
    """Every frame once, for networks that take clips of any length.

    Args:
        length: of the tracklet, 1 or more.

    Returns:
        [length].

    Example:
        >>> all_frames(3)
        array([0, 1, 2])
    """
    _check(length, 1)
    return np.arange(length)


def evaluation_clips(length: int, frames: int, sampling: ClipSampling) -> NDArray[np.int64]:
    """The clips whose features are averaged to that of a tracklet.

    Args:
        length: of the tracklet, 1 or more.
        frames: T, 1 or more; "all" does not ask for it.
        sampling: "dense" for `dense_clips`, "evenly" for one `even_clip`, "all" for one clip of `all_frames`.

    Returns:
        [clips, T], T being the length with "all".

    Raises:
        ValueError: another sampling, or a number below 1.

    Example:
        >>> evaluation_clips(5, 2, "dense").shape, evaluation_clips(5, 2, "all").shape
        ((3, 2), (1, 5))
    """
    if sampling == "dense":
        return dense_clips(length, frames)
    if sampling == "evenly":
        return even_clip(length, frames)[None]
    if sampling == "all":
        return all_frames(length)[None]
    raise ValueError(f"sampling must be 'dense', 'evenly' or 'all', got {sampling!r}")


def _check(length: int, frames: int) -> None:
    if length < 1 or frames < 1:
        raise ValueError(f"length and frames must be 1 or more, got {length} and {frames}")
