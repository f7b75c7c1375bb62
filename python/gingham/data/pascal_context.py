"""PASCAL-Context (Mottaghi et al., CVPR 2014): every pixel of VOC 2010 labelled, things and stuff, 59 classes."""

from __future__ import annotations

from pathlib import Path

from gingham.data.labels import LabelSpace, bit_interleaved_palette
from gingham.data.segmentation import FolderSegmentation, Transform
from gingham.data.voc import devkit_files

_NAMES = """
aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, table, dog, horse, motorbike, person, pottedplant,
sheep, sofa, train, tvmonitor, bag, bed, bench, book, building, cabinet, ceiling, cloth, computer, cup, door, fence,
floor, flower, food, grass, ground, keyboard, light, mountain, mouse, curtain, platform, sign, plate, road, rock,
shelves, sidewalk, sky, snow, bedclothes, track, tree, truck, wall, water, window, wood
"""
_CLASSES = tuple(" ".join(name.split()) for name in _NAMES.split(","))

#: The 59 classes, 1 to 59 in the files in the official order (of the list ``59_labels.txt`` and the public point file);
#: 0, "background", is ignored.
PASCAL_CONTEXT_LABELS = LabelSpace(
    names=_CLASSES, palette=bit_interleaved_palette(60)[1:], values=tuple(range(1, 60)), ignored=(0,)
)

#: The same classes, for label files that mmsegmentation's converter wrote, whose numbers follow the alphabet.
PASCAL_CONTEXT_ALPHABETICAL_LABELS = LabelSpace(
    names=_CLASSES,
    palette=bit_interleaved_palette(60)[1:],
    values=tuple(1 + sorted(_CLASSES).index(name) for name in _CLASSES),
    ignored=(0,),
)


class PascalContext(FolderSegmentation):
    """A split of PASCAL-Context, in the order of the split's list.

    The layout is that of mmsegmentation's converter: ``root/JPEGImages/<name>.jpg`` with
    ``root/SegmentationClassContext/<name>.png`` and the list of names
    ``root/ImageSets/SegmentationContext/<split>.txt``. Images may also end in .jpeg or .png. Class indices are in the
    official order whatever the files hold.

    Args:
        root: the folder ``VOCdevkit/VOC2010``.
        split: "train", "val", or another list in ``ImageSets/SegmentationContext``.
        labels: the classes; `PASCAL_CONTEXT_ALPHABETICAL_LABELS` for files of mmsegmentation's converter.
        require_labels: whether every image of the list must be there, with its label file. If not, `read` refuses
            images that are missing, and `gingham.data.check_dataset` lists them.
        transform: applied to each item.

    Raises:
        DataError: a folder or the list is missing, the list is empty, or an image that it names or a label file is
            missing although labels are required.

    Example:
        >>> dataset = PascalContext("/data/VOCdevkit/VOC2010", "train")  # doctest: +SKIP
        >>> dataset.num_classes  # doctest: +SKIP
        59
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        labels: LabelSpace = PASCAL_CONTEXT_LABELS,
        require_labels: bool = True,
        transform: Transform | None = None,
    ) -> None:
        files = devkit_files(Path(root), split, "2010", "Context", require_labels=require_labels)
        super().__init__(Path(root), split, labels, files, require_labels=require_labels, transform=transform)
