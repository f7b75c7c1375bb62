"""ATR human parsing (Liang et al., TPAMI 2015, arXiv 1503.02391): fashion photographs of one person, 18 classes.

The files are read in the layout of LIP, as SCHP's official code does: ``LIP(root, split, labels=ATR_LABELS)``, see
`gingham.data.lip`.
"""

from __future__ import annotations

from gingham.data.labels import LabelSpace, bit_interleaved_palette

#: The 18 classes of ATR; the value in a file is the class index.
ATR_LABELS = LabelSpace(
    names=(
        "background",
        "hat",
        "hair",
        "sunglasses",
        "upper clothes",
        "skirt",
        "pants",
        "dress",
        "belt",
        "left shoe",
        "right shoe",
        "face",
        "left leg",
        "right leg",
        "left arm",
        "right arm",
        "bag",
        "scarf",
    ),
    palette=bit_interleaved_palette(18),
    mirror_pairs=((9, 10), (12, 13), (14, 15)),
)
