"""PASCAL VOC 2012 segmentation (Everingham et al., IJCV 2010): photographs with 20 object classes and background."""

from __future__ import annotations

from pathlib import Path

from gingham.data.labels import LabelSpace, bit_interleaved_palette
from gingham.data.name_list import listed_files
from gingham.data.segmentation import FolderSegmentation, ImageFile, Transform, require_folder

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
        split: "train", "val", "trainval", "test", or another list in ``ImageSets/Segmentation``, such as "trainaug".
        labels: the classes.
        label_folder: where the labels are, for example in "SegmentationClassAug".
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
        label_folder: str = "SegmentationClass",
        require_labels: bool = True,
        transform: Transform | None = None,
    ) -> None:
        files = devkit_files(Path(root), split, "2012", label_folder=label_folder, require_labels=require_labels)
        super().__init__(Path(root), split, labels, files, require_labels=require_labels, transform=transform)


def devkit_files(
    root: Path, split: str, year: str, kind: str = "", *, label_folder: str | None = None, require_labels: bool
) -> list[ImageFile]:
    """The files of a split in the layout of the VOC development kit, which other label sets borrow.

    Args:
        root: the folder with ``JPEGImages``, ``SegmentationClass<kind>`` and ``ImageSets/Segmentation<kind>``.
        split: the name of a list of images.
        year: of the kit, for error texts.
        kind: what the folders of these labels and lists have at the end of their names.
        label_folder: of the labels, where it has another name.
        require_labels: whether every image of the list and the folder of labels must be there.

    Raises:
        DataError: a folder, the list or a required image is missing, or the list is empty.
    """
    labels, lists = label_folder or f"SegmentationClass{kind}", f"ImageSets/Segmentation{kind}"
    require_folder(root, f"the VOC{year} folder with JPEGImages/, {labels}/ and {lists}/")
    images = require_folder(root / "JPEGImages", "the images, *.jpg")
    if require_labels:
        require_folder(root / labels, "the labels, *.png")
    return listed_files(root / lists / f"{split}.txt", images, root / labels, require_images=require_labels)
