"""Look through a whole data set for what would stop a training run."""

from __future__ import annotations

from collections.abc import Iterable

from gingham.data.segmentation import FolderSegmentation, SegmentationDataset
from gingham.errors import DataError


def check_dataset(dataset: SegmentationDataset, indices: Iterable[int] | None = None) -> list[str]:
    """Read every item and collect the defects, one line each, in the order of the items.

    To have images without a label file listed rather than refused, open the data set with ``require_labels=False``.

    Args:
        dataset: what to look through; its transform is not applied.
        indices: which items, all by default; pass them through a progress bar to see one.

    Returns:
        The problems: missing labels, unreadable files, sizes that differ, label values outside the label space. Empty
        if there are none.

    Example:
        >>> from gingham.data import CueScenes
        >>> check_dataset(CueScenes("val", 2))
        []
    """
    problems = []
    for index in range(len(dataset)) if indices is None else indices:
        if isinstance(dataset, FolderSegmentation) and dataset.images[index].label is None:
            problems.append(f"{dataset.images[index].image}: no label file")
        try:
            dataset.read(index)
        except DataError as error:
            problems.append(str(error))
    return problems
