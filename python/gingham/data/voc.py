"""PASCAL VOC 2012 segmentation (Everingham et al., IJCV 2010): photographs with 20 object classes and background."""

from __future__ import annotations

from pathlib import Path

from gingham.data.labels import LabelSpace, bit_interleaved_palette
from gingham.data.name_list import listed_files
from gingham.data.segmentation import FolderSegmentation, Transform, require_folder

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
    ``root/ImageSets/Segmentation/<split>.txt``. Images may also end in .jpeg or .png.

    Args:
        root: the folder ``VOCdevkit/VOC2012``.
        split: "train", "val", "trainval", "test", or another list in ``ImageSets/Segmentation``.
        labels: the classes.
        require_labels: whether every image of the list must be there, with its label file. If not, `read` refuses
            images that are missing, and `gingham.data.check_dataset` lists them.
        transform: applied to each item.

    Raises:
        DataError: a folder or the list is missing, the list is empty, or an image that it names or a label file is
            missing although labels are required.

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
        files = listed_files(name_list, images, label_folder, require_images=require_labels)
        super().__init__(root, split, labels, files, require_labels=require_labels, transform=transform)
