"""Splits that are lists: a text file names the images, one a line, and folders hold the files of these names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gingham.data.segmentation import ImageFile
from gingham.errors import DataError

#: How the file of an image may end, the published ending first. PNG keeps every pixel of pictures that were made.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


def read_names(path: Path) -> list[str]:
    """Read the names in a list, without blank lines.

    Of a line of paths that begin with a slash, such as
    ``/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png`` in the lists of DeepLab, the name is the first
    file's, without folder and ending.

    Raises:
        DataError: there is no such file, it is not text, or it names nothing.
    """
    return [Path(line.split()[0]).stem if line.startswith("/") else line for line in read_lines(path)]


def read_lines(path: Path) -> list[str]:
    """Read the lines of a list, without blanks around them and without blank ones.

    Raises:
        DataError: there is no such file, it is not text, or it has no lines.
    """
    expected = "expected the names of the split's images, one a line"
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"{path}: no such file, {expected}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file, {expected}") from None
    if not lines:
        raise DataError(f"{path}: no images found, {expected}")
    return lines


def listed_files(name_list: Path, images: Path, labels: Path, *, require_images: bool) -> list[ImageFile]:
    """The files of the images that a list names, in its order.

    Args:
        name_list: the list.
        images: the folder of ``<name>.jpg``, ``<name>.jpeg`` or ``<name>.png``.
        labels: the folder of ``<name>.png``, none of which need exist.
        require_images: whether an image that is missing is an error now. If not, reading it is one, so that
            `gingham.data.check_dataset` lists all that are missing.

    Raises:
        DataError: the list cannot be used, or a required image is missing.
    """
    return named_files(read_names(name_list), name_list, images, labels, require_images=require_images)


def named_files(
    names: Sequence[str], name_list: Path, images: Path, labels: Path, *, require_images: bool
) -> list[ImageFile]:
    """The files of images by name, as `listed_files` finds them.

    Args:
        names: of the images.
        name_list: where they come from, for error texts.
        images: as there.
        labels: as there.
        require_images: as there.

    Raises:
        DataError: a required image is missing.
    """
    files = []
    for name in names:
        candidates = [images / f"{name}{suffix}" for suffix in IMAGE_SUFFIXES]
        image = next((path for path in candidates if path.is_file()), None)
        if image is None and require_images:
            raise DataError(f"{candidates[0]}: no such file, but {name_list} names it")
        files.append(ImageFile(image or candidates[0], labels / f"{name}.png", name))
    return files
