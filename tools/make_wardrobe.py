"""Make the asset of the embedded world: python/gingham/data/assets/wardrobe.npz and its licence notices.

Takes the first garments of every category whose mask is large enough from the Debian package ``dataset-fashion-mnist``
and the photographs that scikit-image carries, and writes uint8 arrays only, so that the file loads without pickle. The
masks are worked out here, which spares the shipped package SciPy and the user the time. Run again, it writes the same
bytes.

    apt-get install dataset-fashion-mnist
    pip install numpy scipy scikit-image
    python tools/make_wardrobe.py
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
import skimage.data
import skimage.transform
from numpy.typing import NDArray
from scipy import ndimage

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
ASSETS = Path(__file__).resolve().parent.parent / "python" / "gingham" / "data" / "assets"

CATEGORIES = 10
SIDE = 28  # pixels, the size of a Fashion-MNIST image
GARMENTS = {"train": 300, "test": 100}  # of every category
SMALLEST_MASK = 80  # pixels; below it the threshold found a strap or a shadow rather than a garment
PHOTOGRAPH_SIZE = (192, 256)  # rows, columns
PHOTOGRAPHS = {"train": ("brick", "gravel", "coffee", "rocket"), "test": ("grass", "chelsea")}

MIT_NOTICE = """\
The garments are a subset of Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist).

The MIT License (MIT)

Copyright (c) 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

PHOTOGRAPH_NOTICE = """\
The background photographs are scaled and cropped copies of sample images distributed with scikit-image
(https://scikit-image.org), which states their sources and terms:

brick     CC0 1.0, from CC0Textures (Bricks25)
gravel    CC0 1.0, from CC0Textures (Gravel04)
grass     CC0 1.0, from DeviantArt (linolafett, Grass 01)
coffee    CC0 1.0, photograph by Rachel Michetti, courtesy of Pikolo Espresso Bar
chelsea   CC0 1.0, photograph by Stefan van der Walt
rocket    public domain, photograph by SpaceX

CC0 1.0 Universal: https://creativecommons.org/publicdomain/zero/1.0/
"""


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read a gzip-compressed IDX file of unsigned bytes."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\x00\x00\x08":
        raise SystemExit(f"{path}: not an IDX file of unsigned bytes")
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">u4", dimensions, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape([int(size) for size in shape])


def garment_mask(image: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Threshold, close, fill and keep the largest component: [28, 28] grey values to [28, 28] bool."""
    # Room around the image: many garments touch its border, and closing would otherwise erode them there.
    room = 4
    mask = np.pad(image > 8, room)
    mask = ndimage.binary_closing(mask, np.ones((3, 3)), iterations=2)
    mask = ndimage.binary_fill_holes(mask)
    components, count = ndimage.label(mask)
    if count > 1:
        sizes = np.bincount(components.ravel())[1:]
        mask = components == 1 + int(sizes.argmax())
    return mask[room:-room, room:-room]


def select_garments(
    images: NDArray[np.uint8], labels: NDArray[np.uint8], count: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int32]]:
    """The first `count` usable garments of every category.

    Returns images [10, count, 28, 28], masks packed eight pixels to a byte [10, count, 98], and the positions of the
    garments in the source file [10, count].
    """
    chosen = np.zeros((CATEGORIES, count), np.int32)
    masks = np.zeros((CATEGORIES, count, SIDE, SIDE), bool)
    for category in range(CATEGORIES):
        found = 0
        for position in np.flatnonzero(labels == category):
            mask = garment_mask(images[position])
            if mask.sum() >= SMALLEST_MASK:
                chosen[category, found], masks[category, found] = position, mask
                found += 1
                if found == count:
                    break
        else:
            raise SystemExit(f"category {category}: {found} usable garments, {count} wanted")
    packed = np.packbits(masks.reshape(CATEGORIES, count, SIDE * SIDE), axis=-1)
    return images[chosen], packed, chosen


def photograph(name: str) -> NDArray[np.uint8]:
    """A sample photograph as [192, 256, 3], scaled to cover that size and cropped about its centre."""
    image = getattr(skimage.data, name)()
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=-1)
    rows, columns = PHOTOGRAPH_SIZE
    scale = max(rows / image.shape[0], columns / image.shape[1])
    height, width = round(image.shape[0] * scale), round(image.shape[1] * scale)
    image = skimage.transform.resize(image, (height, width), anti_aliasing=True)
    top, left = (height - rows) // 2, (width - columns) // 2
    return np.round(image[top : top + rows, left : left + columns] * 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the asset file of the embedded world.")
    parser.add_argument("--fashion-mnist", type=Path, default=FASHION_MNIST, help="folder of the four IDX files")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write to")
    options = parser.parse_args()

    arrays: dict[str, NDArray[np.generic]] = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = read_idx(options.fashion_mnist / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(options.fashion_mnist / f"{prefix}-labels-idx1-ubyte.gz")
        garments, masks, positions = select_garments(images, labels, GARMENTS[split])
        arrays[f"{split}_garments"], arrays[f"{split}_masks"], arrays[f"{split}_positions"] = garments, masks, positions
        arrays[f"{split}_photographs"] = np.stack([photograph(name) for name in PHOTOGRAPHS[split]])
    notices = MIT_NOTICE + "\n" + PHOTOGRAPH_NOTICE
    arrays["notices"] = np.frombuffer(notices.encode(), np.uint8)

    options.out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(options.out / "wardrobe.npz", allow_pickle=False, **arrays)
    (options.out / "LICENSE.fashion-mnist.txt").write_text(MIT_NOTICE)
    (options.out / "LICENSE.photographs.txt").write_text(PHOTOGRAPH_NOTICE)
    for name, array in arrays.items():
        print(f"{name:20} {array.dtype!s:6} {array.shape}")
    print(f"{options.out / 'wardrobe.npz'}: {(options.out / 'wardrobe.npz').stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
