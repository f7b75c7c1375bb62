"""Human parsing in the layout of LIP: Look into Person (Gong et al., CVPR 2017, arXiv 1703.05446), 20 classes.

CIHP (Gong et al., ECCV 2018, arXiv 1808.00157), ATR (`gingham.data.atr`) and Pascal-Person-Part
(`gingham.data.person_part`) are published in layouts of their own, but SCHP's official code reads them, and anybody's
own data, in this one. So does `LIP`, given their label space.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gingham.data.labels import LabelSpace, bit_interleaved_palette
from gingham.data.name_list import listed_files
from gingham.data.segmentation import FolderSegmentation, ImageFile, Transform, require_folder

#: The 20 classes of LIP; the value in a file is the class index.
LIP_LABELS = LabelSpace(
    names=(
        "background",
        "hat",
        "hair",
        "glove",
        "sunglasses",
        "upper clothes",
        "dress",
        "coat",
        "socks",
        "pants",
        "jumpsuits",
        "scarf",
        "skirt",
        "face",
        "left arm",
        "right arm",
        "left leg",
        "right leg",
        "left shoe",
        "right shoe",
    ),
    palette=bit_interleaved_palette(20),
    mirror_pairs=((14, 15), (16, 17), (18, 19)),
)

#: The 20 classes of CIHP, several persons in a picture: those of LIP, but skin of the torso instead of jumpsuits.
CIHP_LABELS = replace(LIP_LABELS, names=(*LIP_LABELS.names[:10], "torso skin", *LIP_LABELS.names[11:]))

_PARTS_OF_SPLIT = {"trainval": ("train", "val")}


class LIP(FolderSegmentation):
    """A split of LIP, or of any human-parsing data in its layout, in the order of the split's list.

    The layout is ``root/<split>_images/<ID>.jpg`` with ``root/<split>_segmentations/<ID>.png`` and the list of IDs
    ``root/<split>_id.txt``, one a line. Images may also end in .jpeg or .png.

    Args:
        root: the folder that holds all of these.
        split: "train", "val", "trainval" (both lists, one after the other), "test", or another with its own list. The
            published test split has no labels: read it with ``require_labels=False``.
        labels: the classes; `CIHP_LABELS`, `gingham.data.atr.ATR_LABELS`, `gingham.data.person_part.PERSON_PART_LABELS`
            or your own.
        require_labels: whether every image of the list must be there, with its label file. If not, `read` refuses
            images that are missing, and `gingham.data.check_dataset` lists them.
        transform: applied to each item.

    Raises:
        DataError: a folder or a list is missing, a list is empty, or an image that it names or a label file is missing
            although labels are required.

    Source: the folder layout of SCHP's official code.

    Example:
        >>> dataset = LIP("/data/LIP", "train")  # doctest: +SKIP
        >>> dataset.num_classes  # doctest: +SKIP
        20
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        labels: LabelSpace = LIP_LABELS,
        require_labels: bool = True,
        transform: Transform | None = None,
    ) -> None:
        root = Path(root)
        require_folder(root, "the folder with train_images/, train_segmentations/ and train_id.txt")
        files: list[ImageFile] = []
        for part in _PARTS_OF_SPLIT.get(split, (split,)):
            images = require_folder(root / f"{part}_images", "the images, *.jpg")
            label_folder = root / f"{part}_segmentations"
            if require_labels:
                require_folder(label_folder, "the labels, *.png")
            files += listed_files(root / f"{part}_id.txt", images, label_folder, require_images=require_labels)
        super().__init__(root, split, labels, files, require_labels=require_labels, transform=transform)
