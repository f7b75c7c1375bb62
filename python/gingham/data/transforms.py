"""Augmentation and normalisation of segmentation items, on top of torchvision.transforms.v2.

An item's points, where it has any, go with its pixels: y and x are scaled as floating point numbers, x becomes
W - 1 - x in a mirrored picture, and points outside a crop are dropped. All randomness comes from torch's generator, so
that a run resumed with its state sees the same pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from gingham.data.labels import IGNORE_INDEX, mirror_labels
from gingham.data.points import nearest_pixels
from gingham.data.segmentation import SegmentationItem
from gingham.nn.inference import mirror_channels

Pair = tuple[int, int]


class Normalize(v2.Transform):
    """Turn a uint8 RGB image [3, H, W] into float32: channels in the given order, minus `mean`, divided by `std`.

    Args:
        mean: of each channel, on the scale 0 to 255, in the order of `channels`.
        std: likewise.
        channels: the order in which the network wants the channels.

    Raises:
        ValueError: not three means and deviations, or an unknown order.

    Example:
        >>> normalize = Normalize((1.0, 2.0, 3.0), channels="BGR")
        >>> normalize(tv_tensors.Image(torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1))).flatten().tolist()
        [29.0, 18.0, 7.0]
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float] = (1.0, 1.0, 1.0),
        *,
        channels: Literal["RGB", "BGR"] = "RGB",
    ) -> None:
        super().__init__()
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(f"mean and std must have three entries, got {len(mean)} and {len(std)}")
        if channels not in ("RGB", "BGR"):
            raise ValueError(f"channels must be 'RGB' or 'BGR', got {channels!r}")
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.channels = channels

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        image = inpt.as_subclass(torch.Tensor)
        if self.channels == "BGR":
            image = image.flip(-3)
        mean, std = (torch.tensor(value, dtype=torch.float32).view(3, 1, 1) for value in (self.mean, self.std))
        return tv_tensors.Image((image.to(torch.float32) - mean) / std)


def imagenet_normalize(channels: Literal["RGB", "BGR"] = "RGB") -> Normalize:
    """By ImageNet's mean and standard deviation, as timm's and torchvision's weights expect it.

    Args:
        channels: the order in which the network wants the channels: "BGR" for SCHP's official weights.

    Returns:
        The transform.

    Raises:
        ValueError: an unknown order.

    Source: torchvision's references; SCHP's official code.

    Example:
        >>> imagenet_normalize("BGR").mean
        (103.53, 116.28, 123.675)
    """
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    return Normalize(mean, std) if channels == "RGB" else Normalize(mean[::-1], std[::-1], channels=channels)


def bgr_mean_normalize() -> Normalize:
    """BGR minus the mean, not divided, as weights converted from CCNet's official code expect it.

    Returns:
        The transform.

    Source: CCNet's official code.

    Example:
        >>> bgr_mean_normalize().std
        (1.0, 1.0, 1.0)
    """
    return Normalize((104.00698793, 116.66876762, 122.67891434), channels="BGR")


class RandomScale(v2.Transform):
    """Resize by a random factor, the image bilinearly (antialiased), the label to the nearest pixel.

    For a random short side instead, take `torchvision.transforms.v2.RandomShortestSize`.

    Args:
        low: the smallest factor, above 0.
        high: the largest.
        step: draw from low, low + step, ... up to high, all equally likely; without it from the whole range.

    Raises:
        ValueError: factors not above 0, low above high, or a step not above 0.

    Example:
        >>> RandomScale(0.5, 0.5)(tv_tensors.Image(torch.zeros(3, 40, 60))).shape
        torch.Size([3, 20, 30])
    """

    def __init__(self, low: float, high: float, step: float | None = None) -> None:
        super().__init__()
        if not 0 < low <= high:
            raise ValueError(f"scale factors must satisfy 0 < low <= high, got {low} and {high}")
        if step is not None and step <= 0:
            raise ValueError(f"step must be above 0, got {step}")
        self.low = low
        self.high = high
        self.step = step

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        if self.step is None:
            factor = self.low + (self.high - self.low) * torch.rand(()).item()
        else:
            # The last factor counts although the division may come out a hair below a whole number.
            count = int((self.high - self.low) / self.step + 1e-6) + 1
            factor = self.low + self.step * int(torch.randint(count, ()))
        height, width = v2.query_size(flat_inputs)
        return {"size": [max(1, round(height * factor)), max(1, round(width * factor))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        resized = F.resize(inpt, params["size"])
        # The last row of a picture made smaller would come to lie beyond it, where padding follows.
        return F.clamp_keypoints(resized) if isinstance(resized, tv_tensors.KeyPoints) else resized


#: The factors 0.7, 0.8, ... 2.1 of CCNet's official code for Cityscapes.
CITYSCAPES_SCALE = RandomScale(0.7, 2.1, 0.1)


class SoftLabel(tv_tensors.Mask):
    """Probabilities of the classes [K, H, W], which go with the pixels of the label."""


class RandomMirror(v2.RandomHorizontalFlip):
    """Mirror the picture left to right, and exchange the classes that have a left and a right.

    Args:
        p: probability, 0 to 1.
        mirror_pairs: class indices to exchange, of the data set's `LabelSpace`.

    Example:
        >>> mirror = RandomMirror(1.0, ((1, 2),))
        >>> mirror(tv_tensors.Mask(torch.tensor([[0, 1, 1]]))).tolist()
        [[2, 2, 0]]
    """

    def __init__(self, p: float = 0.5, mirror_pairs: Sequence[tuple[int, int]] = ()) -> None:
        super().__init__(p)
        self.mirror_pairs = tuple(mirror_pairs)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        flipped = super().transform(inpt, params)
        if not isinstance(inpt, tv_tensors.Mask) or not self.mirror_pairs:
            return flipped
        mirror = mirror_channels if isinstance(inpt, SoftLabel) else mirror_labels
        return tv_tensors.wrap(mirror(flipped.as_subclass(torch.Tensor), self.mirror_pairs), like=inpt)


class RandomCropWithin(v2.Transform):
    """Cut a random window of at most `size` (rows, columns) out; what is smaller stays, see `PadTo`.

    Example:
        >>> RandomCropWithin((32, 80))(tv_tensors.Image(torch.zeros(3, 40, 60))).shape
        torch.Size([3, 32, 60])
    """

    def __init__(self, size: Pair) -> None:
        super().__init__()
        self.size = size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        rows, columns = min(self.size[0], height), min(self.size[1], width)
        top = int(torch.randint(height - rows + 1, ()))
        left = int(torch.randint(width - columns + 1, ()))
        return {"top": top, "left": left, "height": rows, "width": columns}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.crop(inpt, **params)


class RandomCropOnPoint(RandomCropWithin):
    """Cut a random window out that holds at least one of the picture's points, if it has any.

    All such windows are equally likely; without points, all windows are.

    Example:
        >>> image = tv_tensors.Image(torch.zeros(3, 40, 60))
        >>> corner = tv_tensors.KeyPoints(torch.tensor([[59.0, 0.0]]), canvas_size=(40, 60))
        >>> RandomCropOnPoint((1, 1))(image, corner)[1].tolist()
        [[0.0, 0.0]]
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        window = super().make_params(flat_inputs)
        points = next((inpt for inpt in flat_inputs if isinstance(inpt, tv_tensors.KeyPoints)), None)
        if points is None or not len(points):
            return window
        height, width = v2.query_size(flat_inputs)
        rows, columns = window["height"], window["width"]
        holding = torch.zeros(height - rows + 1, width - columns + 1, dtype=torch.bool)
        for x, y in nearest_pixels(points.as_subclass(torch.Tensor)).tolist():
            holding[max(0, y - rows + 1) : y + 1, max(0, x - columns + 1) : x + 1] = True
        places = holding.nonzero()
        top, left = places[torch.randint(len(places), ())].tolist()
        return window | {"top": top, "left": left}


class PadTo(v2.Transform):
    """Pad at the bottom and on the right up to `size` (rows, columns): images with 0, labels with the ignore index.

    Example:
        >>> PadTo((48, 64))(tv_tensors.Mask(torch.zeros(40, 60))).shape
        torch.Size([48, 64])
    """

    def __init__(self, size: Pair) -> None:
        super().__init__()
        self.size = size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        return {"padding": [0, 0, max(0, self.size[1] - width), max(0, self.size[0] - height)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        fill = IGNORE_INDEX if isinstance(inpt, tv_tensors.Mask) and not isinstance(inpt, SoftLabel) else 0
        return F.pad(inpt, params["padding"], fill=fill)


class RandomScaleCropFlip:
    """The training augmentation of CCNet: random scale, horizontal flip and crop, then normalisation and padding.

    Padding comes after normalisation, so that the padded zeros are the mean colour. The defaults are those of CCNet's
    official code; nothing is done to the colours.

    Args:
        crop_size: side of the square, or (rows, columns), that every item comes out with.
        rescale: what resizes the item first; None leaves its size.
        flip_probability: of the horizontal flip, 0 to 1.
        mirror_pairs: classes that the flip exchanges, of the data set's `LabelSpace`.
        normalize: what the network expects.
        point_crop: crop where at least one of the item's points is, see `RandomCropOnPoint`.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> from gingham.data import CueScenes
        >>> scenes = CueScenes("train", 1, transform=RandomScaleCropFlip((48, 80)))
        >>> item = scenes[0]
        >>> item["image"].shape, item["image"].dtype, item["label"].shape
        (torch.Size([3, 48, 80]), torch.float32, torch.Size([48, 80]))
    """

    def __init__(
        self,
        crop_size: int | Pair,
        *,
        rescale: v2.Transform | None = CITYSCAPES_SCALE,
        flip_probability: float = 0.5,
        mirror_pairs: Sequence[tuple[int, int]] = (),
        normalize: Normalize | None = None,
        point_crop: bool = False,
    ) -> None:
        rows, columns = (crop_size, crop_size) if isinstance(crop_size, int) else crop_size
        if rows < 1 or columns < 1:
            raise ValueError(f"crop_size must be 1 or above, got {crop_size}")
        if not 0 <= flip_probability <= 1:
            raise ValueError(f"flip_probability must be 0 to 1, got {flip_probability}")
        self.transforms = v2.Compose(
            [
                v2.Identity() if rescale is None else rescale,
                RandomMirror(flip_probability, mirror_pairs),
                (RandomCropOnPoint if point_crop else RandomCropWithin)((rows, columns)),
                normalize or imagenet_normalize(),
                PadTo((rows, columns)),
            ]
        )
        self.mirror_pairs = tuple(mirror_pairs)

    def __call__(self, item: SegmentationItem) -> SegmentationItem:
        return _apply(self.transforms, item, self.mirror_pairs)


class FixedSize:
    """Resize to one size, images bilinearly (antialiased), labels to the nearest pixel; perhaps mirror; normalise.

    Args:
        size: rows and columns, 1 or above, or None to keep those of each picture.
        flip_probability: that a picture is mirrored, 0 to 1.
        normalize: what the network expects.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> from gingham.data import CueScenes
        >>> CueScenes("val", 1, transform=FixedSize((32, 48)))[0]["label"].shape
        torch.Size([32, 48])
    """

    def __init__(self, size: Pair | None, *, flip_probability: float = 0.0, normalize: Normalize | None = None) -> None:
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"size must be rows and columns, 1 or above, got {size}")
        if not 0 <= flip_probability <= 1:
            raise ValueError(f"flip_probability must be 0 to 1, got {flip_probability}")
        self.transforms = v2.Compose(
            [
                v2.Identity() if size is None else v2.Resize(list(size)),
                RandomMirror(flip_probability),
                normalize or imagenet_normalize(),
            ]
        )

    def __call__(self, item: SegmentationItem) -> SegmentationItem:
        return _apply(self.transforms, item)


class EvaluationTransform:
    """Normalise and nothing else: images and labels keep their size.

    Args:
        normalize: what the network expects.

    Example:
        >>> from gingham.data import CueScenes
        >>> CueScenes("val", 1, transform=EvaluationTransform())[0]["image"].dtype
        torch.float32
    """

    def __init__(self, *, normalize: Normalize | None = None) -> None:
        self.normalize = normalize or imagenet_normalize()

    def __call__(self, item: SegmentationItem) -> SegmentationItem:
        return _apply(self.normalize, item)


def _apply(
    transform: v2.Transform, item: SegmentationItem, mirror_pairs: Sequence[tuple[int, int]] = ()
) -> SegmentationItem:
    # torchvision tells images from labels by their types. Plain tensors leave, which collate and pickle lightly.
    height, width = item["label"].shape
    typed: dict[str, Any] = {
        "image": tv_tensors.Image(item["image"]),
        "label": tv_tensors.Mask(item["label"]),
    }
    if "soft" in item:
        typed["soft"] = SoftLabel(item["soft"])
    points: torch.Tensor | None = item.get("points")  # type: ignore[assignment]
    if points is not None:
        typed["points"] = tv_tensors.KeyPoints(points[:, [2, 1]], canvas_size=(height, width))
        typed["edges"] = tv_tensors.KeyPoints([[0.0, 0.0], [width - 1.0, 0.0]], canvas_size=(height, width))
    moved = {name: value.as_subclass(torch.Tensor).contiguous() for name, value in transform(typed).items()}
    if points is not None:
        edges = moved.pop("edges")
        classes = mirror_labels(points[:, 0], mirror_pairs) if edges[0, 0] > edges[1, 0] else points[:, 0]
        moved["points"] = _inside(classes, moved["points"], moved["image"].shape[-2:])
    result: Any = {**item, **moved}
    return result


def _inside(classes: torch.Tensor, positions: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Points (class, y, x) [N, 3] of those positions (x, y) that lie on a pixel of the picture."""
    points = torch.stack([classes, positions[:, 1], positions[:, 0]], dim=1)
    pixels = nearest_pixels(points[:, 1:])
    return points[((pixels >= 0) & (pixels < torch.tensor(size))).all(dim=1)]
