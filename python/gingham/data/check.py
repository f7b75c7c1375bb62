"""Look through a whole data set for what would stop a training run."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice

from gingham.data.classification import ClassificationDataset
from gingham.data.detection import DetectionDataset
from gingham.data.points import WithPoints
from gingham.data.reid import PersonDataset, TrackletDataset
from gingham.data.segmentation import FolderSegmentation, SegmentationDataset
from gingham.errors import DataError

_AT_A_TIME = 64  # items that threads share, so that a progress bar over the indices moves


def check_dataset(
    dataset: SegmentationDataset | DetectionDataset | ClassificationDataset | PersonDataset | TrackletDataset,
    indices: Iterable[int] | None = None,
    *,
    threads: int = 1,
) -> list[str]:
    """Read every item and collect the defects, one line each, in the order of the items.

    To have images without a label file listed rather than refused, open the data set with ``require_labels=False``.

    Args:
        dataset: what to look through; its transform is not applied.
        indices: which items, all by default; pass them through a progress bar to see one.
        threads: that read files at a time.

    Returns:
        The problems: missing labels, unreadable files, sizes that differ, label values outside the label space, boxes
        outside of the picture. Empty if there are none.

    Example:
        >>> from gingham.data import CueScenes
        >>> check_dataset(CueScenes("val", 2))
        []
    """
    problems = []
    left = iter(range(len(dataset)) if indices is None else indices)
    with ThreadPoolExecutor(threads) as pool:
        while some := list(islice(left, _AT_A_TIME)):
            for found in pool.map(partial(_problems, dataset), some):
                problems += found
    return problems


def _problems(
    dataset: SegmentationDataset | DetectionDataset | ClassificationDataset | PersonDataset | TrackletDataset,
    index: int,
) -> list[str]:
    found = []
    files = dataset.dataset if isinstance(dataset, WithPoints) else dataset
    if isinstance(files, FolderSegmentation) and files.labels_expected and files.images[index].label is None:
        found.append(f"{files.images[index].image}: no label file")
    try:
        dataset.read(index)
    except DataError as error:
        found.append(str(error))
    return found
