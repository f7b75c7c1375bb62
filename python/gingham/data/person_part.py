"""Pascal-Person-Part (Chen et al., CVPR 2014, arXiv 1406.2031): persons of PASCAL VOC in six parts and background.

The files are read in the layout of LIP, as SCHP's official code does: ``LIP(root, split, labels=PERSON_PART_LABELS)``,
see `gingham.data.lip`.
"""

from __future__ import annotations

from gingham.data.labels import LabelSpace, bit_interleaved_palette

#: The seven classes; the value in a file is the class index. Left and right limbs are one class.
PERSON_PART_LABELS = LabelSpace(
    names=("background", "head", "torso", "upper arms", "lower arms", "upper legs", "lower legs"),
    palette=bit_interleaved_palette(7),
)
