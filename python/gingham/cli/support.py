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
    """The images, or the folders of a tracklet's frames, that an option names; hidden folders are none.

    Raises:
        DataError: there is no such file or folder, or neither image nor folder in it.
    """
    if path.is_dir():
        folders = sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))
        if folders:
            return folders
    return image_files(option, path)


def read_support(images: Path | None, masks: Path | None, value: int | None = None) -> list[SupportImage]:
    """Read the supports of a few-shot method; none where no images are given.

    Args:
        images: an image, or a folder of images.
        masks: its mask, or a folder with a mask ``<name>.png`` for each image.
        value: that is the object in the masks. None: all but 0 is; but 255 is left out of masks with a palette where
            there are other values too, since it is then the border of objects; and of grey masks with soft outlines, as
            JPEG or antialiasing makes them, values of 128 or more are the object.

    Raises:
        ConfigError: one of the two options without the other, or the same folder for both.
        DataError: files are missing or unreadable, do not fit each other, show no object, or leave open whether 255 is
            the object.
    """
    if (images is None) != (masks is None) or (images is None and value is not None):
        raise ConfigError("--support and --support_masks go together: give the images, and the masks of the object")
    if images is None or masks is None:
        return []
    if images.is_dir() and masks.is_dir() and images.samefile(masks):
        raise ConfigError(f"--support_masks {masks}: is the folder of --support; masks need a folder of their own")
    found = []
    for file in image_files("--support", images):
        path = masks / f"{file.stem}.png" if masks.is_dir() else masks
        image, (values, has_palette) = read_upright(file), _mask_values(path)
        if values.shape != image.shape[1:]:
            raise DataError(
                f"{path}: the mask is {values.shape[1]}x{values.shape[0]} pixels (width x height), its image "
                f"{file.name} is {image.shape[2]}x{image.shape[1]}"
            )
        found.append(SupportImage(image, _object(values, value, path, has_palette)))
    if masks.is_file() and len(found) > 1:
        raise DataError(f"--support_masks {masks}: one mask for {len(found)} images; give a folder of masks")
    return found


def _mask_values(path: Path) -> tuple[Tensor, bool]:
    """The values of a mask, and whether they are indices of a palette."""
    from gingham.data.segmentation import open_image, read_label_values

    if not path.is_file():
        raise DataError(f"{path}: no such file, expected the mask of a support")
    with open_image(path) as mask:
        if mask.mode == "1":  # black and white
            return torch.from_numpy(np.array(mask).astype(np.uint8)), False
        return torch.from_numpy(read_label_values(path)), mask.mode == "P"


def _object(values: Tensor, value: int | None, path: Path, has_palette: bool) -> Tensor:
    if value is not None:
        mask = values == value
    else:
        between = values[(values != 0) & (values != 255)].unique()
        if not has_palette and len(between) > _CLASSES_OF_A_MASK:
            mask = values >= 128
        elif not has_palette and len(between) and (values == 255).any():
            raise DataError(
                f"{path}: a grey mask with the values {', '.join(map(str, between[:3].tolist()))}"
                f"{' ...' if len(between) > 3 else ''} and 255: say with --support_value which is the object"
            )
        else:
            mask = (values != 0) & ~((values == 255) & (len(between) > 0))
    if not mask.any():
        raise DataError(
            f"{path}: no pixel {'but 0' if value is None else f'of value {value}'}: a support must show one"
        )
    return mask


#: Class indices that a mask without a palette may have; with more, it is a soft mask.
_CLASSES_OF_A_MASK = 20


class StoredImage(NamedTuple):
    """An image as its file has it, uint8 RGB [3, H, W], and how to turn it: the value of the EXIF entry Orientation."""

    pixels: Tensor
    orientation: int


def read_stored(file: Path) -> StoredImage:
    """RGB as the file has it, and how the camera says that it is to be turned.

    Raises:
        DataError: the file cannot be read, or has more than eight bits a channel.
    """
    from gingham.data.segmentation import read_image

    image = read_image(file)
    try:
        with Image.open(file) as header:
            orientation = header.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError) as error:
        raise DataError(f"{file}: {error}") from error
    return StoredImage(image, orientation)


def read_upright(file: Path) -> Tensor:
    """RGB, uint8 [3, H, W], upright as the camera's EXIF entry says.

    Raises:
        DataError: the file cannot be read, or has more than eight bits a channel.
    """
    return upright(*read_stored(file))


_MIRRORED = {2: (-1,), 3: (-2, -1), 4: (-2,), 6: (-1,), 7: (-2, -1), 8: (-2,)}
_TRANSPOSED = (5, 6, 7, 8)


def upright(stored: Tensor, orientation: int) -> Tensor:
    """Turn what a file has, [..., H, W], upright.

    Args:
        stored: as the file has it.
        orientation: the value of the EXIF entry; others than 2 to 8 turn nothing.

    Example:
        >>> upright(torch.tensor([[1, 2, 3]]), 6).tolist()
        [[1], [2], [3]]
    """
    turned = stored.transpose(-2, -1) if orientation in _TRANSPOSED else stored
    return turned.flip(_MIRRORED.get(orientation, ())).contiguous()


def as_stored(upright: Tensor, orientation: int) -> Tensor:
    """Undo `upright`.

    Args:
        upright: [..., H, W].
        orientation: of the file.

    Example:
        >>> as_stored(torch.tensor([[1], [2], [3]]), 6).tolist()
        [[1, 2, 3]]
    """
    turned = upright.flip(_MIRRORED.get(orientation, ()))
    return (turned.transpose(-2, -1) if orientation in _TRANSPOSED else turned).contiguous()
