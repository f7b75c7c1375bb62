"""Pictures of persons at one size, normalised, and how they are varied in training."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from gingham.data.transforms import imagenet_normalize

_CROP_AREA, _CROP_WIDTH = (0.64, 1.0), (1 / 3, 1 / 2)  # of the picture; width by height
_ERASED_AREA, _ERASED_SHAPE = (0.02, 0.2), (0.3, 3.3)
_ERASED_FILL = (0.4914, 0.4822, 0.4465)


class PersonTransform:
    """Resizes, varies and normalises pixels; the frames of a clip are all varied alike.

    Random numbers come from torch's generator. Without any variation it is the transform of evaluation.

    Args:
        size: rows and columns.
        flip: probability that a picture is mirrored, 0 to 1.
        crop: take a part of 64 to 100 % of the area, two to three times as high as wide, rather than the whole.
        erasing: probability, 0 to 1, that a box of 2 to 20 % of the area is filled, after normalisation, with the means
            of CIFAR-10.

    Raises:
        ValueError: an argument outside its range.

    Source: the code of Self-similarity Grouping, https://github.com/OasisYang/SSG, for crop and erasing.

    Example:
        >>> clip = torch.zeros(4, 3, 128, 64, dtype=torch.uint8)
        >>> PersonTransform((256, 128), flip=0.5)(clip).shape
        torch.Size([4, 3, 256, 128])
    """

    def __init__(
        self, size: tuple[int, int] = (256, 128), *, flip: float = 0.0, crop: bool = False, erasing: float = 0.0
    ) -> None:
        for name, probability in (("flip", flip), ("erasing", erasing)):
            if not 0 <= probability <= 1:
                raise ValueError(f"{name} must be 0 to 1, got {probability}")
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size must be rows and columns, each 1 or more, got {size}")
        self.size = (int(size[0]), int(size[1]))
        parts: list[v2.Transform] = [
            v2.RandomResizedCrop(self.size, scale=_CROP_AREA, ratio=_CROP_WIDTH) if crop else v2.Resize(self.size)
        ]
        if flip:
            parts.append(v2.RandomHorizontalFlip(flip))
        parts.append(imagenet_normalize())
        if erasing:
            parts.append(v2.RandomErasing(erasing, scale=_ERASED_AREA, ratio=_ERASED_SHAPE, value=_ERASED_FILL))
        self.transforms = v2.Compose(parts)

    def __call__(self, pixels: Tensor) -> Tensor:
        changed: Tensor = self.transforms(tv_tensors.Image(pixels)).as_subclass(torch.Tensor)
        return changed.contiguous()
