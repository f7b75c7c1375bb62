"""Attention and saliency maps in files.

Attention is kept as ``<name>.npz`` with the class numbers and their maps in half precision, and exported in the
published form, one grey image ``<name>_<class>.png`` for each class, which has 256 levels.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gingham.data.segmentation import read_grey
from gingham.errors import DataError


def write_attention(path: Path, attention: torch.Tensor, tags: torch.Tensor) -> None:
    """Write the maps of an image's tagged classes as a compressed NumPy archive.

    A file of that name is replaced as a whole, never in part.

    Args:
        path: ends in ``.npz``.
        attention: [C, H, W], 0 to 1.
        tags: [C], above 0 for classes to keep.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "cat.npz"
        ...     write_attention(file, torch.full((3, 2, 2), 0.5), torch.tensor([0, 1, 0]))
        ...     read_attention(file, 3)[:, 0, 0]
        tensor([0.0000, 0.5000, 0.0000])
    """
    (kinds,) = (tags > 0).nonzero(as_tuple=True)
    part = path.with_name(f".part-{path.name}")
    shape = np.array(attention.shape[-2:])
    np.savez_compressed(part, classes=kinds.numpy(), attention=attention[kinds].half().numpy(), shape=shape)
    part.replace(path)


def read_attention(path: Path, count: int) -> torch.Tensor:
    """Read what `write_attention` wrote: float32 [C, H, W], 0 for classes that are not in it.

    Args:
        path: the archive.
        count: C.

    Raises:
        DataError: the file is missing or damaged, or has other classes.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            kinds, maps, shape = (archive[name] for name in ("classes", "attention", "shape"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, expected the attention of an image") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as attention; write it anew with gingham predict") from error
    if kinds.size and kinds.max() >= count:
        raise DataError(f"{path}: holds class number {kinds.max()}, expected 0 to {count - 1}")
    attention = torch.zeros(count, *shape.tolist())
    attention[torch.from_numpy(kinds)] = torch.from_numpy(maps).float()
    return attention


def export_attention(folder: Path, name: str, attention: torch.Tensor, tags: torch.Tensor) -> None:
    """Write the maps of an image's tagged classes as grey images, ``<name>_<class>.png``, rounded down to 256 levels.

    Args:
        folder: where they go.
        name: of the image.
        attention: [C, H, W], 0 to 1.
        tags: [C], above 0 for classes to write.
    """
    for kind in (tags > 0).nonzero().flatten().tolist():
        grey = (255 * attention[kind]).floor().to(torch.uint8).numpy()
        Image.fromarray(grey).save(folder / f"{name}_{kind}.png")


def read_saliency(path: Path, size: tuple[int, int]) -> torch.Tensor:
    """Read a saliency map, an 8-bit grey image, as float32 [H, W] in 0 to 1.

    Args:
        path: the image.
        size: (H, W) of the picture that it belongs to.

    Raises:
        DataError: the file is missing, damaged, not grey, or of another size.
    """
    grey = read_grey(path)
    if grey.shape != size:
        raise DataError(
            f"{path}: saliency is {grey.shape[1]}x{grey.shape[0]} pixels (width x height), its picture is "
            f"{size[1]}x{size[0]}"
        )
    return torch.from_numpy(grey).float() / 255
