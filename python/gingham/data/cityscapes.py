"""Cityscapes (Cordts et al., CVPR 2016, arXiv 1604.01685): street scenes with fine labels of 19 classes."""

from __future__ import annotations

from pathlib import Path

from gingham.data.labels import LabelSpace
from gingham.data.segmentation import FolderSegmentation, ImageFile, Transform, require_folder
from gingham.errors import DataError

IMAGE_SUFFIX = "_leftImg8bit.png"
LABEL_SUFFIX = "_gtFine_labelIds.png"

#: The 19 evaluated classes; their file values are the official label ids, all other ids are ignored.
CITYSCAPES_LABELS = LabelSpace(
    names=(
        "road",
        "sidewalk",
        "building",
        "wall",
        "fence",
        "pole",
        "traffic light",
        "traffic sign",
        "vegetation",
        "terrain",
        "sky",
        "person",
        "rider",
        "car",
        "truck",
        "bus",
        "train",
        "motorcycle",
        "bicycle",
    ),
    palette=(
        (128, 64, 128),
        (244, 35, 232),
        (70, 70, 70),
        (102, 102, 156),
        (190, 153, 153),
        (153, 153, 153),
        (250, 170, 30),
        (220, 220, 0),
        (107, 142, 35),
        (152, 251, 152),
        (70, 130, 180),
        (220, 20, 60),
        (255, 0, 0),
        (0, 0, 142),
        (0, 0, 70),
        (0, 60, 100),
        (0, 80, 100),
        (0, 0, 230),
        (119, 11, 32),
    ),
    values=(7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33),
    ignored=(0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30),
)


class Cityscapes(FolderSegmentation):
    """A split of Cityscapes, or of any data set written in its layout, in the order of the file names.

    The layout is ``root/leftImg8bit/<split>/<city>/<name>_leftImg8bit.png`` with
    ``root/gtFine/<split>/<city>/<name>_gtFine_labelIds.png``.

    Args:
        root: the folder that holds ``leftImg8bit`` and ``gtFine``.
        split: "train", "val", "test", or another folder name.
        labels: the classes; give another label space to read other classes from the same layout.
        require_labels: whether every image must have its label file.
        transform: applied to each item.

    Raises:
        DataError: a folder is missing, no image is found, or a required label file is missing.

    Example:
        >>> dataset = Cityscapes("/data/cityscapes", "train")  # doctest: +SKIP
        >>> dataset[0]["label"].shape  # doctest: +SKIP
        torch.Size([1024, 2048])
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        labels: LabelSpace = CITYSCAPES_LABELS,
        require_labels: bool = True,
        transform: Transform | None = None,
    ) -> None:
        root = Path(root)
        images = require_folder(root, "the Cityscapes folder with leftImg8bit/ and gtFine/") / "leftImg8bit" / split
        require_folder(images, f"one folder for each city with files *{IMAGE_SUFFIX}")
        label_folder = root / "gtFine" / split
        if require_labels:
            require_folder(label_folder, f"one folder for each city with files *{LABEL_SUFFIX}")
        files = [
            ImageFile(path, label_folder / path.parent.name / f"{name}{LABEL_SUFFIX}", name)
            for path in sorted(images.glob(f"*/*{IMAGE_SUFFIX}"))
            for name in [path.name.removesuffix(IMAGE_SUFFIX)]
        ]
        if not files:
            raise DataError(f"{images}: no images found, expected <city>/*{IMAGE_SUFFIX}")
        super().__init__(root, split, labels, files, require_labels=require_labels, transform=transform)
