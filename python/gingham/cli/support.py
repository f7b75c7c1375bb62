"""The images that `gingham predict` reads: those to predict, and those that show a few-shot method what to look for."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from gingham.cli.options import ConfigError
from gingham.errors import DataError

_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


class SupportImage(NamedTuple):
    """An image, uint8 RGB [3, H, W], and where in it the object is, bool [H, W]."""

    image: Tensor
    mask: Tensor


def image_files(option: str, path: Path) -> list[Path]:
    """The images that an option names: one, or those of a folder in the order of their names.

    Raises:
        DataError: there is no such file or folder, or no image in it.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{option} {path}: no such image or folder")
    files = sorted(x for x in path.iterdir() if x.suffix.lower() in _ENDINGS and not x.is_dir())
    if not files:
        raise DataError(f"{option} {path}: no image in it (looked for {', '.join(sorted(_ENDINGS))})")
    return files


def sighting_files(option: str, path: Path) -> list[Path]:
    """The images, or the folders of a tracklet's frames, that an option names.

    Raises:
        DataError: there is no such file or folder, or neither image nor folder in it.
    """
    if path.is_dir() and (folders := sorted(each for each in path.iterdir() if each.is_dir())):
        return folders
    return image_files(option, path)


def read_support(images: Path | None, masks: Path | None, value: int | None = None) -> list[SupportImage]:
    """Read the supports of a few-shot method; none where no images are given.

    Args:
        images: an image, or a folder of images.
        masks: its mask, or a folder with a mask ``<name>.png`` for each image.
        value: that is the object in the masks. None: all but 0 is; 255 is left out where there are other values too,
            since it is then the border of objects.

    Raises:
        ConfigError: one of the two options without the other.
        DataError: files are missing or unreadable, do not fit each other, or show no object.
    """
    if (images is None) != (masks is None) or (images is None and value is not None):
        raise ConfigError("--support and --support_masks go together: give the images, and the masks of the object")
    if images is None or masks is None:
        return []
    found = []
    for file in image_files("--support", images):
        path = masks / f"{file.stem}.png" if masks.is_dir() else masks
        image, values = read_upright(file), _mask_values(path)
        if values.shape != image.shape[1:]:
            raise DataError(
                f"{path}: the mask is {values.shape[1]}x{values.shape[0]} pixels (width x height), its image "
                f"{file.name} is {image.shape[2]}x{image.shape[1]}"
            )
        found.append(SupportImage(image, _object(values, value, path)))
    if masks.is_file() and len(found) > 1:
        raise DataError(f"--support_masks {masks}: one mask for {len(found)} images; give a folder of masks")
    return found


def _mask_values(path: Path) -> Tensor:
    from gingham.data.segmentation import read_label_values

    with_mask = "the mask of a support"
    if not path.is_file():
        raise DataError(f"{path}: no such file, expected {with_mask}")
    with Image.open(path) as header:
        if header.mode == "1":  # black and white
            return torch.from_numpy(np.array(header).astype(np.uint8))
    return torch.from_numpy(read_label_values(path))


def _object(values: Tensor, value: int | None, path: Path) -> Tensor:
    if value is not None:
        mask = values == value
    else:
        others = ((values != 0) & (values != 255)).any()
        mask = (values != 0) & ~((values == 255) & others)
    if not mask.any():
        raise DataError(
            f"{path}: no pixel {'but 0' if value is None else f'of value {value}'}: a support must show one"
        )
    return mask


def read_upright(file: Path) -> Tensor:
    """RGB, uint8 [3, H, W], upright as the camera's EXIF entry says.

    Raises:
        DataError: the file cannot be read, or has more than eight bits a channel.
    """
    from gingham.data.segmentation import read_image

    try:
        image = read_image(file)
        with Image.open(file) as header:
            mode, orientation = header.mode, header.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: {error}") from error
    if mode.startswith(("I", "F")):
        raise DataError(f"{file}: has more than 8 bits a channel (mode {mode}); convert it to 8 bits first")
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 2)
    return image.flip({2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation, ())).contiguous()
