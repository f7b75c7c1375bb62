"""PASCAL VOC 2012 segmentation (Everingham et al., IJCV 2010): photographs with 20 object classes and background."""

from __future__ import annotations

from pathlib import Path

from gingham.data.image_tags import read_tags, tag_vector
from gingham.data.labels import LabelSpace, bit_interleaved_palette
from gingham.data.name_list import named_files, read_names
from gingham.data.segmentation import FolderSegmentation, ImageFile, SegmentationItem, Transform, require_folder

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
    ``root/ImageSets/Segmentation/<split>.txt``. Images may also end in .jpeg or .png. Lists whose names end in ``_cls``
    have the tags of an image after its name, which are left out here.

    Args:
        root: the folder ``VOCdevkit/VOC2012``.
        split: "train", "val", "trainval", "test", or another list in ``ImageSets/Segmentation``, such as "trainaug".
        labels: the classes.
        label_folder: of the labels, within the root, such as "SegmentationClassAug", or anywhere else.
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
        label_folder: str | Path = "SegmentationClass",
        require_labels: bool = True,
        transform: Transform | None = None,
    ) -> None:
        files = devkit_files(Path(root), split, "2012", label_folder=label_folder, require_labels=require_labels)
        super().__init__(Path(root), split, labels, files, require_labels=require_labels, transform=transform)


class VOCImageTags(FolderSegmentation):
    """A split of VOC 2012 with image-level labels: items have `tags`, and masks only where there are any.

    The list ``root/ImageSets/Segmentation/<split>_cls.txt`` has an image's name and its classes, see
    `gingham.data.image_tags`; of the data set's own masks, `gingham.data.image_tags.tags_of_masks` makes one.

    Args:
        root: the folder ``VOCdevkit/VOC2012`` with ``JPEGImages`` and the lists.
        split: "train", "val", or another list in ``ImageSets/Segmentation``, without ``_cls``.
        label_folder: of the masks, within the root or anywhere else; by default ``SegmentationClassAug`` where there is
            one, else ``SegmentationClass``.
        labels: the classes, the background first.
        require_labels: whether every image of the list must be there; if not, reading it is an error. Masks need never
            be there.
        transform: applied to each item.

    Raises:
        DataError: a folder or the list is missing, a line of it is wrong, or an image that it names is missing.

    Example:
        >>> dataset = VOCImageTags("/data/VOCdevkit/VOC2012", "train")  # doctest: +SKIP
        >>> len(dataset), dataset[0]["tags"].shape  # doctest: +SKIP
        (10582, torch.Size([20]))
    """

    labels_expected = False

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        label_folder: str | Path | None = None,
        labels: LabelSpace = VOC_LABELS,
        require_labels: bool = True,
        transform: Transform | None = None,
    ) -> None:
        root = Path(root)
        if label_folder is None:
            augmented = "SegmentationClassAug"
            label_folder = augmented if (root / augmented).is_dir() else "SegmentationClass"
        files = devkit_files(
            root, f"{split}_cls", "2012", label_folder=label_folder, require_labels=False, require_images=require_labels
        )
        tags = read_tags(name_list_of(root, f"{split}_cls"), labels.num_classes - 1)
        super().__init__(root, split, labels, files, require_labels=False, transform=transform)
        self.tags = [tag_vector(tags[file.name], labels.num_classes - 1) for file in files]

    def read(self, index: int) -> SegmentationItem:
        return {**super().read(index), "tags": self.tags[index]}


def name_list_of(root: Path, split: str, kind: str = "") -> Path:
    """The list of a split's images in the layout of the VOC development kit."""
    return root / "ImageSets" / f"Segmentation{kind}" / f"{split}.txt"


def devkit_files(
    root: Path,
    split: str,
    year: str,
    kind: str = "",
    *,
    label_folder: str | Path | None = None,
    require_labels: bool,
    require_images: bool | None = None,
) -> list[ImageFile]:
    """The files of a split in the layout of the VOC development kit, which other label sets borrow.

    Args:
        root: the folder with ``JPEGImages``, ``SegmentationClass<kind>`` and ``ImageSets/Segmentation<kind>``.
        split: the name of a list of images.
        year: of the kit, for error texts.
        kind: what the folders of these labels and lists have at the end of their names.
        label_folder: of the labels, within the root or elsewhere; ``SegmentationClass<kind>`` by default.
        require_labels: whether the folder of labels must be there.
        require_images: whether every image of the list must be there; by default if labels must.

    Raises:
        DataError: a folder, the list or a required image is missing, or the list is empty.
    """
    name_list = name_list_of(root, split, kind)
    usual = f"SegmentationClass{kind}"
    require_folder(root, f"the VOC{year} folder with JPEGImages/, {usual}/ and ImageSets/{name_list.parent.name}/")
    images = require_folder(root / "JPEGImages", "the images, *.jpg")
    labels = root / (label_folder or usual)
    if not labels.is_dir() and label_folder is not None:
        labels = Path(label_folder)  # not in the root but anywhere else
    if require_labels:
        require_folder(labels, "the labels, *.png")
    names = read_names(name_list)
    if split.endswith("_cls"):
        names = [name.split()[0] for name in names]
    require_images = require_labels if require_images is None else require_images
    return named_files(names, name_list, images, labels, require_images=require_images)
