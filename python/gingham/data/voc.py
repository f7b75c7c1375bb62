"""PASCAL VOC 2012 segmentation (Everingham et al., IJCV 2010): photographs with 20 object classes and background."""

from __future__ import annotations

from pathlib import Path

from gingham.data.labels import LabelSpace, bit_interleaved_palette
from gingham.data.segmentation import FolderSegmentation, ImageFile, Transform, require_folder
from gingham.errors import DataError

#: Background and the 20 object classes; the border of the objects, 255 in the files, is ignored.
VOC_LABELS = LabelSpace(
    names=(
        "background",
        "aeroplane",
        "bicycle",
        "bird",
        "boat",
        "bottle",
        "bus",
        "car",
        "cat",
        "chair",
        "cow",
        "dining table",
        "dog",
        "horse",
        "motorbike",
        "person",
        "potted plant",
        "sheep",
        "sofa",
        "train",
        "tv monitor",
    ),
    palette=bit_interleaved_palette(21),
)


class VOCSegmentation(FolderSegmentation):
    """A split of VOC 2012 segmentation, in the order of the split's list.

    The layout is ``root/JPEGImages/<name>.jpg`` with ``root/SegmentationClass/<name>.png`` and the list of names
    ``root/ImageSets/Segmentation/<split>.txt``.

    Args:
        root: the folder ``VOCdevkit/VOC2012``.
        split: "train", "val", "trainval", "test", or another list in ``ImageSets/Segmentation``.
        labels: the classes.
        require_labels: whether every image must have its label file.
        transform: applied to each item.

    Raises:
        DataError: a folder or the list is missing, the list is empty, an image that it names is missing, or a required
            label file is.

    Example:
        >>> dataset = VOCSegmentation("/data/VOCdevkit/VOC2012", "train")  # doctest: +SKIP
        >>> dataset.num_classes  # doctest: +SKIP
        21
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        labels: LabelSpace = VOC_LABELS,
        require_labels: bool = True,
        transform: Transform | None = None,
    ) -> None:
        root = Path(root)
        require_folder(root, "the VOC2012 folder with JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/")
        images = require_folder(root / "JPEGImages", "the images, *.jpg")
        label_folder = root / "SegmentationClass"
        if require_labels:
            require_folder(label_folder, "the labels, *.png")
        name_list = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        if not name_list.is_file():
            raise DataError(f"{name_list}: no such file, expected the names of the split's images, one a line")
        files = [
            ImageFile(images / f"{name}.jpg", label_folder / f"{name}.png", name)
            for name in name_list.read_text().split()
        ]
        if not files:
            raise DataError(f"{name_list}: no images found, expected the names of the split's images, one a line")
        for file in files:
            if not file.image.is_file():
                raise DataError(f"{file.image}: no such file, but {name_list} names it")
        super().__init__(root, split, labels, files, require_labels=require_labels, transform=transform)
