"""ADE20K scene parsing (Zhou et al., CVPR 2017, arXiv 1608.05442), the challenge data of 2016: 150 classes."""

from __future__ import annotations

from pathlib import Path

from gingham.data.labels import LabelSpace, bit_interleaved_palette
from gingham.data.segmentation import FolderSegmentation, ImageFile, Transform, require_folder
from gingham.errors import DataError

_NAMES = """
wall, building, sky, floor, tree, ceiling, road, bed, window, grass, cabinet, sidewalk, person, earth, door, table,
mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair, seat,
fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter,
sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow, screen
door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop, stove,
palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower,
chandelier, awning, streetlight, booth, television, airplane, dirt track, apparel, pole, land, bannister, escalator,
ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming pool,
stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave,
pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan,
fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag
"""

#: The 150 classes, 1 to 150 in the files; 0, "other", is ignored. The colours are the bit-interleaved ones.
ADE20K_LABELS = LabelSpace(
    names=tuple(" ".join(name.split()) for name in _NAMES.split(",")),
    palette=bit_interleaved_palette(151)[1:],
    values=tuple(range(1, 151)),
    ignored=(0,),
)

_FOLDER_OF_SPLIT = {"train": "training", "val": "validation"}


class ADE20K(FolderSegmentation):
    """A split of the ADE20K challenge data, in the order of the file names.

    The layout is ``root/images/{training,validation}/<name>.jpg`` with
    ``root/annotations/{training,validation}/<name>.png``.

    Args:
        root: the folder ``ADEChallengeData2016``.
        split: "train" or "val", or a folder's own name such as "testing".
        labels: the classes.
        require_labels: whether every image must have its label file.
        transform: applied to each item.

    Raises:
        DataError: a folder is missing, no image is found, or a required label file is missing.

    Example:
        >>> dataset = ADE20K("/data/ADEChallengeData2016", "train")  # doctest: +SKIP
        >>> dataset.num_classes  # doctest: +SKIP
        150
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        labels: LabelSpace = ADE20K_LABELS,
        require_labels: bool = True,
        transform: Transform | None = None,
    ) -> None:
        root = Path(root)
        require_folder(root, "the ADEChallengeData2016 folder with images/ and annotations/")
        folder = _FOLDER_OF_SPLIT.get(split, split)
        images = require_folder(root / "images" / folder, "the images, *.jpg")
        label_folder = root / "annotations" / folder
        if require_labels:
            require_folder(label_folder, "the labels, *.png")
        files = [ImageFile(path, label_folder / f"{path.stem}.png", path.stem) for path in sorted(images.glob("*.jpg"))]
        if not files:
            raise DataError(f"{images}: no images found, expected *.jpg")
        super().__init__(root, split, labels, files, require_labels=require_labels, transform=transform)
