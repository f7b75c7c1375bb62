"""From pictures of any size to the network's square input, and from its logits back to the pictures.

Paper: Li et al., Self-Correction for Human Parsing, https://arxiv.org/abs/1910.09777, as the official code has it.
"""

from typing import Literal

from torch import Tensor

from gingham.data.person_warp import inverse_matrix, person_matrix, warp_bilinear, warp_nearest
from gingham.data.transforms import imagenet_normalize

Protocol = Literal["labels", "logits"]

_normalize = imagenet_normalize()
_red, _green, _blue = (-mean / std for mean, std in zip(_normalize.mean, _normalize.std, strict=True))

#: Black as `imagenet_normalize` shows it to a network.
IMAGENET_BLACK = (_red, _green, _blue)


def warp_to_network(images: Tensor, side: int, *, black: tuple[float, float, float] = IMAGENET_BLACK) -> Tensor:
    """Whole pictures in the middle of a square, with black around them.

    Args:
        images: normalised, [B, 3, H, W].
        side: of the square, 2 or more.
        black: what lies around them, normalised likewise.

    Returns:
        [B, 3, side, side], of the type of the images.

    Source: the official code.

    Example:
        >>> import torch
        >>> warp_to_network(torch.zeros(1, 3, 5, 9), 9, black=(1.0, 1.0, 1.0))[0, 0, :, 4]
        tensor([1., 1., 0., 0., 0., 0., 0., 1., 1.])
    """
    matrix = person_matrix(_size(images), (side, side))
    return warp_bilinear(images, matrix, (side, side), fill=black).to(images.dtype)


def warp_from_network(
    logits: Tensor, size: tuple[int, int], *, protocol: Protocol = "labels", whole_centre: bool = False
) -> Tensor:
    """The way back of `warp_to_network`, for logits. Around them all logits are 0, so the likeliest class is class 0.

    Args:
        logits: [B, K, side, side].
        size: rows and columns of the pictures.
        protocol: "labels": each pixel takes the logits, and so the label, of the nearest one, as the official
            evaluation does it; "logits": logits are interpolated and labels follow from them, as the official extractor
            does it. They differ along the boundaries.
        whole_centre: cut the picture's centre to whole pixels, as the official evaluation does: in even sizes the
            result is off by half a pixel.

    Returns:
        [B, K, *size].

    Raises:
        ValueError: an unknown protocol.

    Source: the official code.

    Example:
        >>> import torch
        >>> logits = torch.arange(81.0).reshape(1, 1, 9, 9)
        >>> warp_from_network(logits, (5, 9))[0, 0, 0]
        tensor([18., 19., 20., 21., 22., 23., 24., 25., 26.])
    """
    if protocol not in ("labels", "logits"):
        raise ValueError(f"protocol must be 'labels' or 'logits', got {protocol!r}")
    centre = (float((size[1] - 1) // 2), float((size[0] - 1) // 2)) if whole_centre else None
    back = inverse_matrix(person_matrix(size, _size(logits), centre=centre))
    if protocol == "labels":
        return warp_nearest(logits, back, size)
    return warp_bilinear(logits, back, size)


def _size(maps: Tensor) -> tuple[int, int]:
    return maps.shape[-2], maps.shape[-1]
